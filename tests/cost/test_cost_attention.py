"""Attention in place: the values and gradients of the library's kernel, in its layouts; only where it is faster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import partita
from partita.cost import attention, inline
from partita.cost.attention import BACKWARD, FORWARD, with_attention
from partita.cost.torch_adapter import small_product

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import assert_trains_alike, compiled, encoder, traced

pytestmark = pytest.mark.skipif(small_product() is None, reason="this torch does not export its kernel")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has these ops, or none, taken as faster in place."""

    def set_to(*targets: Any) -> None:
        def chosen_of(nodes: Any, num_threads: int) -> list[fx.Node]:
            return [node for node in nodes if node.target in targets]

        monkeypatch.setattr(attention.CHOICES, "of", chosen_of)

    return set_to


def heads(tokens: Tensor, number: int, extent: int, place: int) -> Tensor:
    """(B, H, T, E) out of the projection (B, T, 3 H E) of queries, keys and values together."""
    part = tokens[..., place * number * extent : (place + 1) * number * extent]
    return part.view(*tokens.shape[:2], number, extent).transpose(1, 2)


def block(causal: bool, scale: float | None, number: int, extent: int) -> Any:
    """Forward and backward pass of an attention, as they stand in a captured graph."""

    def function(tokens: Tensor, memory: Tensor, change: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads(tokens, number, extent, 0), heads(memory, number, extent, 1), heads(memory, number, extent, 2)
        output, sums = FORWARD(q, k, v, 0.0, causal, scale=scale)
        gradient = (output.transpose(1, 2) * change).transpose(1, 2)
        return (output, sums, *BACKWARD(gradient, q, k, v, output, sums, 0.0, causal, scale=scale))

    return function


@pytest.mark.parametrize("targets", [(FORWARD,), (BACKWARD,), (FORWARD, BACKWARD)], ids=["forward", "backward", "both"])
@pytest.mark.parametrize(
    ("extents", "causal", "scale"),
    [
        ((3, 2, 24, 24, 16), False, None),
        ((3, 2, 24, 24, 16), True, None),
        ((2, 3, 7, 33, 20), False, 0.5),
        ((2, 3, 33, 7, 20), False, None),
        ((1, 1, 1, 5, 4), False, None),
    ],
    ids=str,
)
def test_values_and_gradients_of_the_kernel(
    chosen: Any, targets: Any, extents: tuple[int, ...], causal: bool, scale: float | None
) -> None:
    chosen(*targets)
    torch.manual_seed(0)
    rows, number, num_queries, num_keys, extent = extents
    width = 3 * number * extent
    examples = (
        torch.randn(rows, num_queries, width),
        torch.randn(rows, num_keys, width),
        torch.randn(rows, num_queries, number, extent),
    )
    function = block(causal, scale, number, extent)
    changed = with_attention(traced(function, *examples), 1)
    assert not set(targets) & {node.target for node in changed.graph.nodes}
    for result, expected in zip(compiled(changed, examples), function(*examples), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return FORWARD(q, k, v, **options)[0]


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.5}, {"attn_mask": torch.zeros(8, 8)}, {"dtype": torch.float64}, {"num_threads": 2}, {"rows": 400}],
    ids=["dropout", "mask", "float64", "threads", "large"],
)
def test_other_attention_stays_as_it_is(chosen: Any, options: dict[str, Any]) -> None:
    chosen(FORWARD)
    num_threads, dtype = options.pop("num_threads", 1), options.pop("dtype", torch.float32)
    length = 80 if "rows" in options else 8
    tokens = torch.randn(options.pop("rows", 2), length, 3 * 64, dtype=dtype)
    mask = {"attn_mask": options.pop("attn_mask")} if "attn_mask" in options else {}
    module = traced(
        lambda x, *m: sdpa(
            *(heads(x, 4, 16, place) for place in range(3)), **options, **dict(zip(mask, m, strict=True))
        ),
        tokens,
        *mask.values(),
    )
    assert FORWARD in {node.target for node in with_attention(module, num_threads).graph.nodes}


def test_a_choice_is_by_the_times_of_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    examples = (torch.randn(2, 16, 96), torch.randn(2, 16, 96), torch.randn(2, 16, 2, 16))
    module = traced(block(False, None, 2, 16), *examples)
    for kernel_s, number in ((0.0, 0), (1.0, 2)):
        attention.CHOICES.forget()
        monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / str(number)))
        monkeypatch.setattr(attention, "kernel_s", lambda m, k, n, time_s=kernel_s: time_s)
        monkeypatch.setattr(attention, "time_in_turns", lambda calls: [0.01 for _ in calls])
        targets = [node.target for node in with_attention(module, 1).graph.nodes]
        assert sum(target in (FORWARD, BACKWARD) for target in targets) == number
    attention.CHOICES.forget()


def test_a_whole_model_trains_alike_with_attention_in_place(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(FORWARD, BACKWARD)
    monkeypatch.setattr(inline.CHOICES, "of", lambda nodes, num_threads: list(nodes))
    plan = partita.Constraints(data=2, pipeline=1, num_workers=2, threads_per_worker=1, compiled=True)
    assert_trains_alike(*encoder(), plan, rtol=1e-4, atol=1e-5)

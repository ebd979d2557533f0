"""Products formed in place by compiled code: the same results in every layout, taken only where they are faster."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import partita
from partita.cost import inline
from partita.cost.torch_adapter import small_product
from partita.graph.custom_ops import inline_product
from partita.runtime.segments import python_code

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import assert_trains_alike, compiled, encoder, traced

pytestmark = pytest.mark.skipif(small_product() is None, reason="this torch does not export its kernel")
INLINE = inline_product._opoverload


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has every product, or none, taken as faster."""

    def set_to(faster: bool) -> None:
        monkeypatch.setattr(inline.CHOICES, "of", lambda nodes, num_threads: list(nodes) if faster else [])

    return set_to


def matrix(rows: int, columns: int, layout: str, number: int) -> Tensor:
    """A matrix, or `number` of them, that lies in memory as `layout` says."""
    batch = [number] if number else []
    if layout == "rows":
        return torch.randn(*batch, rows, columns)
    if layout == "columns":
        return torch.randn(*batch, columns, rows).transpose(-1, -2)
    if layout == "wide rows":
        return torch.randn(*batch, rows, columns + 3)[..., 1 : columns + 1]
    if layout == "wide columns":
        return torch.randn(*batch, columns, rows + 5)[..., 2 : rows + 2].transpose(-1, -2)
    if layout == "gaps":
        return torch.randn(*batch, rows, 2 * columns)[..., ::2]
    return torch.randn(*batch, 1, columns).expand(*batch, rows, columns)


LAYOUTS = ("rows", "columns", "wide rows", "wide columns", "gaps", "one row")


EXTENTS = ((16, 20, 37), (33, 48, 16), (1, 24, 17), (40, 1, 30), (24, 40, 1), (1, 1, 1))


def every_layout(extents: tuple[int, int, int], number: int) -> list[tuple[Tensor, Tensor]]:
    m, k, n = extents
    pairs = itertools.product(LAYOUTS, repeat=2)
    return [(matrix(m, k, left, number), matrix(k, n, right, number)) for left, right in pairs]


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize(
    "extents", [(16, 20, 37), (33, 48, 16), (1, 24, 17), (40, 1, 30), (24, 40, 1), (1, 1, 1)], ids=str
)
def test_products_in_every_layout(extents: tuple[int, int, int], number: int) -> None:
    torch.manual_seed(0)
    pairs = every_layout(extents, number)
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{index}") for index in range(2 * len(pairs))]
    graph.output(tuple(graph.call_function(INLINE, pair) for pair in zip(inputs[::2], inputs[1::2], strict=True)))
    examples = [factor for pair in pairs for factor in pair]
    results = compiled(fx.GraphModule(nn.Module(), graph), examples)
    for (left, right), result in zip(pairs, results, strict=True):
        expected = left.double() @ right.double()
        assert result.is_contiguous()
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5)


def layer(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What a linear layer does in a training step, with a batch of products beside it."""
    hidden = torch.addmm(bias, x, w.t())
    heads = hidden.view(2, 24, 24)
    return torch.relu(hidden), x @ w.t(), dy @ w, dy.t() @ x, torch.bmm(heads, heads.transpose(1, 2))


_SEED = torch.Generator().manual_seed(0)
EXAMPLES = tuple(torch.randn(shape, generator=_SEED) for shape in ((48, 40), (24, 40), (24,), (48, 24)))


@pytest.mark.parametrize("run", ["compiled", "plain"])
def test_a_layer_gives_the_same_result(chosen: Any, run: str) -> None:
    chosen(True)
    changed = inline.with_inline(traced(layer, *EXAMPLES), 1)
    assert targets(changed).count(INLINE) == 5 and torch.ops.aten.mm.default not in targets(changed)
    code = python_code(changed.graph, changed)
    results = compiled(changed, EXAMPLES) if run == "compiled" else code(torch.Generator(), *EXAMPLES)
    for result, expected in zip(results, layer(*(item.double() for item in EXAMPLES)), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)


def test_what_is_slower_in_place_stays_as_it_is(chosen: Any) -> None:
    chosen(False)
    module = traced(layer, *EXAMPLES)
    assert inline.with_inline(module, 1) is module


def test_the_kernel_works_in_one_thread(chosen: Any) -> None:
    chosen(True)
    module = traced(layer, *EXAMPLES)
    assert inline.with_inline(module, 2) is module


@pytest.mark.parametrize(
    "factors",
    [
        (torch.randn(4, 3).double(), torch.randn(3, 2).double()),
        (torch.randn(0, 3), torch.randn(3, 2)),
        (torch.randn(2, 4, 3).double(), torch.randn(2, 3, 2).double()),
        (torch.randn(2, 0, 3), torch.randn(2, 3, 2)),
        (torch.randn(2100, 1000), torch.randn(1000, 2100)),
    ],
    ids=["float64", "empty", "batched float64", "batched empty", "large"],
)
def test_other_products_stay_as_they_are(chosen: Any, factors: tuple[Tensor, Tensor]) -> None:
    chosen(True)
    module = traced(torch.matmul, *factors)
    assert INLINE not in targets(inline.with_inline(module, 1))


extents = st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(extents, extents, extents, st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_the_fewest_elements_are_transposed(m: int, k: int, n: int, first: str, second: str) -> None:
    left, right = matrix(m, k, first, 0), matrix(k, n, second, 0)
    found = inline.num_transposed(left, right)
    in_rows = [value.stride(1) == 1 for value in (left, right)]
    ways = [
        m * k * (not in_rows[0]) + k * n * (not in_rows[1]),  # x w
        m * k * in_rows[0] + k * n * in_rows[1] + m * n,  # (w' x')'
    ]
    assert found == min(ways)


def test_a_choice_is_by_the_times_of_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    inline.CHOICES.forget()
    module = traced(layer, *EXAMPLES)
    monkeypatch.setattr(inline, "kernel_s", lambda m, k, n: 1.0 if (m, k, n) == (48, 40, 24) else 3.0)
    monkeypatch.setattr(inline, "_library_s", lambda node: 2.0)
    changed = inline.with_inline(module, 1)
    assert targets(changed).count(INLINE) == 2  # x w' with and without bias
    monkeypatch.setattr(inline, "_library_s", lambda node: pytest.fail("it was measured, and kept"))
    inline.CHOICES.forget()
    assert targets(inline.with_inline(module, 1)).count(INLINE) == 2
    inline.CHOICES.forget()


def test_a_whole_model_trains_alike_with_products_in_place(chosen: Any) -> None:
    chosen(True)
    plan = partita.Constraints(data=2, pipeline=1, num_workers=2, threads_per_worker=1, compiled=True)
    assert_trains_alike(*encoder(), plan, rtol=1e-4, atol=1e-5)

"""Products by another library: the same result, taken only where they are faster, in plain and in compiled code."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import partita
from partita.cost import variants
from partita.cost.measure_nodes import measure_nodes
from partita.cost.measure_ops import time_in_turns
from partita.runtime.segments import python_code
from partita.runtime.torch_adapter import compile_graph

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import assert_trains_alike, traced

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def products(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function" and variants.product_of(node)]


def step(x, w, bias, dy):
    """What a linear layer does in a training step: forward with and without bias, both gradients."""
    hidden = torch.addmm(bias, x, w.t())
    return hidden, x @ w.t(), dy @ w, dy.t() @ x


EXAMPLES = (torch.randn(48, 40), torch.randn(24, 40), torch.randn(24), torch.randn(48, 24))


@pytest.fixture
def chosen(monkeypatch):
    """Has every product, or none, taken as faster."""

    def set_to(faster: bool) -> None:
        monkeypatch.setattr(variants.CHOICES, "of", lambda nodes, num_threads: list(nodes) if faster else [])

    return set_to


@pytest.fixture
def no_choices(monkeypatch, tmp_path):
    """Nothing is chosen yet, and what will be stays out of the user's cache."""
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    variants.CHOICES.forget()
    yield
    variants.CHOICES.forget()


@pytest.mark.parametrize("compiled", [False, True])
def test_every_product_of_a_linear_layer_has_a_variant_of_the_same_result(chosen, compiled):
    chosen(True)
    module = traced(step, *EXAMPLES)
    changed = variants.with_variants(module, 1)
    targets = [node.target for node in changed.graph.nodes]
    assert targets.count(variants.ONEDNN) == 4 and torch.ops.aten.mm.default not in targets
    if compiled:
        layouts = [(tuple(item.shape), item.stride(), item.dtype) for item in EXAMPLES]
        call = compile_graph(changed, layouts, device=torch.device("cpu"), num_threads=1)
        with torch.no_grad():
            results = call(*EXAMPLES)
    else:
        results = python_code(changed.graph, changed)(torch.Generator(), *EXAMPLES)
    exact = step(*(item.double() for item in EXAMPLES))
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype is torch.float32 and result.is_contiguous()
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_seen_transposed_is_used_as_it_is_and_others_are_seen_transposed(chosen):
    chosen(True)
    changed = variants.with_variants(traced(step, *EXAMPLES), 1)
    views = [node for node in changed.graph.nodes if node.target is torch.ops.aten.permute.default]
    assert len(views) == 2  # of w in dy @ w, and of x in dy' @ x: w' is no more


def test_without_a_faster_variant_the_module_stays_as_it_is(chosen):
    chosen(False)
    module = traced(step, *EXAMPLES)
    assert variants.with_variants(module, 1) is module


@pytest.mark.parametrize(
    ("function", "examples"),
    [
        (torch.mm, (torch.randn(4, 3).double(), torch.randn(3, 2).double())),
        (torch.mm, (torch.randn(0, 3), torch.randn(3, 2))),
        (torch.addmm, (torch.randn(4, 2), torch.randn(4, 3), torch.randn(3, 2))),
        (torch.addmm, (torch.randn(1), torch.randn(4, 3), torch.randn(3, 2))),
        (lambda b, x, w: torch.addmm(b, x, w, alpha=2), (torch.randn(2), torch.randn(4, 3), torch.randn(3, 2))),
        (torch.bmm, (torch.randn(2, 4, 3), torch.randn(2, 3, 2))),
    ],
    ids=["float64", "empty", "matrix added", "one value added", "scaled", "batched"],
)
def test_other_products_have_no_variant(function, examples):
    assert products(traced(function, *examples)) == []


def test_the_choice_is_measured_once_and_kept_on_disk(monkeypatch, no_choices):
    nodes = products(traced(step, *EXAMPLES))
    measured = []

    def times(node):
        measured.append(node.name)
        return (1.0, 0.5) if node.target is torch.ops.aten.addmm.default else (1.0, 0.99)

    monkeypatch.setattr(variants, "times_s", times)
    assert [node.target for node in variants.CHOICES.of(nodes, 1)] == [torch.ops.aten.addmm.default]
    assert len(measured) == 4
    assert len(variants.CHOICES.of(nodes, 1)) == 1 and len(measured) == 4  # known
    variants.CHOICES.of(nodes, 2)
    assert len(measured) == 8  # other threads, other times
    variants.CHOICES.forget()
    assert len(variants.CHOICES.of(nodes, 1)) == 1 and len(measured) == 8  # read


def test_measuring_leaves_torchs_random_state_alone(no_choices):
    before = torch.get_rng_state()
    variants.with_variants(traced(step, *EXAMPLES), 1)
    assert len(variants.CHOICES) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_products_time_is_that_of_the_library_that_will_run(monkeypatch, no_choices):
    nodes = products(traced(step, *EXAMPLES))
    monkeypatch.setattr(variants, "times_s", lambda node: (4.0, 3.0))
    assert measure_nodes(nodes[:1], (0,), budget_s=1.0) == [3.0]
    monkeypatch.setattr(variants, "times_s", lambda node: (4.0, 3.9))
    assert measure_nodes(nodes[1:2], (0,), budget_s=1.0) == [4.0]
    variants.CHOICES.forget()
    monkeypatch.setattr(variants, "times_s", lambda node: pytest.fail("it was measured with the op, and kept"))
    assert variants.CHOICES.of(nodes[:2], 1) == nodes[:1]


def test_calls_are_timed_in_turns():
    order = []
    times = time_in_turns([lambda: order.append("a"), lambda: order.append("b")])
    assert len(times) == 2 and all(time_s > 0 for time_s in times)
    changes = sum(one != two for one, two in itertools.pairwise(order))
    assert changes >= 9  # five samples each, not one after the other


def test_a_whole_model_trains_alike_with_variants_everywhere(chosen):
    chosen(True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 8))
    batches = [(torch.randn(32, 20), torch.randn(32, 8)) for _ in range(4)]
    plan = partita.Constraints(data=2, pipeline=1, num_microbatches=1, threads_per_worker=1, compiled=False)
    assert_trains_alike(model, batches, plan, rtol=1e-5, atol=1e-6)

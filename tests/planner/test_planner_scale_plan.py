"""Plans at scale: they fit, multiply out, beat the corners they refused, and never undercut their bound."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.families.scale import Gpt
from partita.cluster.model import Cluster
from partita.cluster.presets import GPU_KINDS
from partita.cost.kernels import Kernel
from partita.cost.networks import Fabric, NodeGroup
from partita.errors import InfeasibleError, InputError
from partita.plan import Prediction
from partita.planner.scale.plan import ScalePlanner, plan_at_scale, replan, state_of
from partita.planner.scale.solution import ScaleConstraints, ScaleSolution
from partita.planner.scale.transformer import Split, Transformer, chunks_of
from partita.planner.scale.widths import WidthPlanner
from tests.planner import scale_models as models


@functools.cache
def planner_of(make: Callable[[], Any]) -> ScalePlanner:
    """Captured once."""
    return ScalePlanner(*make())


@pytest.fixture
def gpt() -> ScalePlanner:
    return planner_of(models.gpt)


def check(solution: ScaleSolution) -> None:
    axes = solution.axes
    product = axes["data"] * axes["tensor"] * axes["pipeline"] * axes["context"]
    assert product == solution.num_devices <= solution.num_devices_there
    assert axes["data"] * solution.micro_batch * solution.num_microbatches == solution.global_batch
    assert all(have <= limit for have, limit in zip(solution.memory_bytes, solution.memory_limits_bytes, strict=True))
    assert solution.lower_bound_s <= solution.step_time_s
    assert len(solution.cuts) == axes["pipeline"] * axes["virtual"] == len(solution.num_layers)


@pytest.mark.parametrize("make", [models.gpt, models.llama, models.conv_net])
@pytest.mark.parametrize("devices", [1, 8, 24, 64])
def test_plans_multiply_out_and_fit(make, devices: int) -> None:  # type: ignore[no-untyped-def]
    check(planner_of(make).plan(models.fabric("A100-80", devices)))


def test_layers_of_all_stages_are_all_layers(gpt: ScalePlanner) -> None:
    for p in (1, 2, 4, 5):
        solution = gpt.plan(models.fabric("H100", 40), ScaleConstraints(pipeline=p, virtual=1))
        assert sum(solution.num_layers) == 8 and solution.axes["pipeline"] == p


@pytest.mark.parametrize(("kind", "num_gpus"), [("A100-80", 16), ("H100", 24)])
def test_no_fixed_corner_is_faster_than_the_plan_or_its_bound(gpt: ScalePlanner, kind: str, num_gpus: int) -> None:
    fabric = models.fabric(kind, num_gpus)
    free = gpt.plan(fabric)
    assert "no other is faster" in free.reasons[-1]
    count = 0
    for t, p, z, b in itertools.product((1, 2, 4, 8), (1, 2, 3, 4, 7, 10), (0, 1, 3), (None, 1)):
        try:
            fixed = gpt.plan(fabric, ScaleConstraints(tensor=t, pipeline=p, zero=z, micro_batch=b))
        except InfeasibleError:
            continue
        count += 1
        assert fixed.step_time_s >= free.step_time_s
        assert fixed.step_time_s >= free.lower_bound_s
    assert count > 50


def test_stages_of_equal_blocks_are_even(gpt: ScalePlanner) -> None:
    """Blocks are dealt out by their times; embedding and head of this model take less than a block."""
    fabric = models.fabric("A100-80", 16)
    for p, remat in itertools.product((2, 4), ("none", "selective", "full")):
        fixed = gpt.plan(fabric, ScaleConstraints(pipeline=p, virtual=1, recompute=remat))  # type: ignore[arg-type]
        assert max(fixed.num_layers) - min(fixed.num_layers) <= 1, fixed.num_layers


def test_stages_without_pieces_are_refused(gpt: ScalePlanner) -> None:
    with pytest.raises(InfeasibleError, match="no degrees"):
        gpt.plan(models.fabric("H100", 16), ScaleConstraints(pipeline=11))


def test_all_gaps_are_shares_that_could_be_saved(gpt: ScalePlanner) -> None:
    solution = gpt.plan(models.fabric("H100", 64))
    prediction = Prediction(
        step_time_s=solution.step_time_s, lower_bound_s=solution.lower_bound_s, uncertainty=0.1, memory_bytes={}
    )
    assert prediction.gap == solution.gap == pytest.approx(1 - solution.lower_bound_s / solution.step_time_s)
    assert solution.gap > 0


def test_work_of_a_captured_block_is_that_of_the_described_transformer() -> None:
    planner = ScalePlanner(*models.gpt(hidden=1024, heads=8))
    described = Transformer(layers=8, hidden=1024, heads=8, ffn=4096, vocab=1024, seq=256, tied=False)
    for tensor, sequence in ((1, False), (4, True)):
        works = planner.maker.works(tensor=tensor, context=1, sequence_parallel=sequence, micro_batch=2)
        split = Split(tensor=tensor, micro_batch=2, sequence_parallel=sequence)
        reference = chunks_of(described, split, num_chunks=4)[1][0][0]
        block = next(work for work in works if work.name.startswith("blocks"))
        for ours, theirs in ((block.forward, reference.forward), (block.backward, reference.backward)):
            flops = [
                sum(item.flops * item.count for item in items if isinstance(item, Kernel)) for items in (ours, theirs)
            ]
            assert flops[0] == pytest.approx(flops[1], rel=1e-3)
        assert block.parameter_elements == pytest.approx(reference.parameter_elements, rel=1e-2)
        assert block.saved_bytes == pytest.approx(reference.saved_bytes, rel=0.05)


def test_replan_is_the_plan_of_the_other_cluster(gpt: ScalePlanner) -> None:
    first = gpt.plan(models.fabric("H100", 16))
    again = replan(first, cluster=models.fabric("A100-80", 32))
    fresh = ScalePlanner(*models.gpt()).plan(models.fabric("A100-80", 32))
    assert again.text() == fresh.text() and again.step_time_s == pytest.approx(fresh.step_time_s)


def test_presets_are_clusters_too(gpt: ScalePlanner) -> None:
    check(gpt.plan(Cluster.preset("2x8xH100")))


def test_slower_machines_get_fewer_layers(gpt: ScalePlanner) -> None:
    mixed = Fabric(groups=(NodeGroup.of(GPU_KINDS["H100"], 8), NodeGroup.of(GPU_KINDS["A100-40"], 8)))
    planner = ScalePlanner(*models.gpt(layers=16))
    solution = planner.plan(mixed, ScaleConstraints(pipeline=2, tensor=1, data=8))
    check(solution)
    assert solution.stage_kinds == ("H100", "A100-40") and solution.num_layers[0] > solution.num_layers[1]


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(InfeasibleError, match=r"GiB of .* GiB .* more memory"):
        plan_at_scale(*models.gpt(layers=64, hidden=8192, heads=64), None, models.fabric("A100-40", 2))


def test_widths_that_were_not_captured() -> None:
    def make(width: int) -> torch.nn.Module:
        with torch.device("meta"):
            return Gpt(8, width, 8, 1024, 256).to(torch.bfloat16)

    _, loss_fn, batch = models.gpt()
    plans = WidthPlanner(make, (512, 1024, 768), loss_fn, batch)
    fabric = models.fabric("H100", 16)
    there = plans.plan(1280, fabric)
    fresh = ScalePlanner(make(1280), loss_fn, batch).plan(fabric)
    assert there.text() == fresh.text()
    assert there.step_time_s == pytest.approx(fresh.step_time_s, rel=1e-6)
    assert there.num_parameters == fresh.num_parameters


def test_a_batch_without_samples_is_refused() -> None:
    model, loss_fn, _ = models.gpt()
    with pytest.raises(InputError, match="samples"):
        ScalePlanner(model, loss_fn, torch.zeros((), dtype=torch.long))


def test_state_of_plain_optimizers() -> None:
    state = state_of("SGD", torch.float32)
    assert (state.weight_bytes, state.gradient_bytes, state.optimizer_bytes) == (4, 4, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": 0}, "data must be a whole number, at least 1"),
        ({"micro_batch": 1.5}, "micro_batch must be a whole number"),
        ({"zero": 4}, "zero must be a whole number, at least 0 and at most 3"),
        ({"recompute": "all"}, "recompute must be one of"),
    ],
)
def test_constraints_of_a_wrong_kind_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ScaleConstraints(**given)  # type: ignore[arg-type]

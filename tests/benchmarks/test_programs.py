"""What the benchmark programs conclude from rows, on rows made by hand."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys

import msgspec
import pytest
import torch

from benchmarks import coverage, prediction, same_result
from benchmarks.same_result import CASES, Course
from partita.plan import Plan, Worker


def make_plan(case_name: str, *, processes: tuple[int, ...], num_microbatches: int = 1, mode: str = "graph") -> Plan:
    case = next(case for case in CASES if case.name == case_name)
    workers = tuple(
        Worker(index=i, process=process, machine=0, cores=(0,), stage=i // case.data, data=i % case.data)
        for i, process in enumerate(processes)
    )
    return Plan(
        mode=mode,  # type: ignore[arg-type]
        graph_fingerprint="",
        cluster_fingerprint="",
        axes={"data": case.data, "pipeline": case.pipeline},
        workers=workers,
        threads_per_worker=1,
        stage_starts=("relu",) * (case.pipeline - 1),
        num_microbatches=num_microbatches,
    )


def verdict(name: str, plan: Plan, shift: float = 0.0) -> str:
    case = next(case for case in CASES if case.name == name)
    plain = Course([2.0, 1.0], {"weight": torch.tensor([1.0, -4.0])})
    course = Course([2.0, 1.0], {"weight": torch.tensor([1.0, -4.0 + shift])})
    return str(same_result.judge(case, plan, plain, course)["verdict"])


def test_verdicts_of_same_result() -> None:
    crossing, two = "2 processes x 2 workers", "pipeline 2, 4 microbatches"
    assert verdict("1 worker", make_plan("1 worker", processes=(0,))) == "same"
    assert verdict("1 worker", make_plan("1 worker", processes=(0,)), shift=0.0039) == "same"
    assert verdict("1 worker", make_plan("1 worker", processes=(0,)), shift=0.0041) == "different"
    assert verdict("1 worker", make_plan("1 worker", processes=(0,)), shift=math.nan) == "different"
    assert verdict("1 worker", make_plan("1 worker", processes=(0,), mode="block")) == "block"
    lost = msgspec.structs.replace(
        make_plan("data 2", processes=(0, 0)), mode="block", reasons=("could not be captured",)
    )
    assert verdict("data 2", lost) == "fallback"
    assert verdict("data 2", make_plan("pipeline 2", processes=(0, 0))) == "another plan"
    assert verdict(two, make_plan(two, processes=(0, 0), num_microbatches=4)) == "same"
    assert verdict(two, make_plan(two, processes=(0, 0))) == "another plan"
    assert verdict(crossing, make_plan(crossing, processes=(0, 0, 1, 1))) == "same"
    assert verdict(crossing, make_plan(crossing, processes=(0, 1, 0, 1))) == "another plan"


def test_weights_near_zero_are_measured_against_the_floor() -> None:
    plain = {"bias": torch.tensor([1e-9, 0.0]), "empty": torch.zeros(0), "count": torch.tensor(3)}
    state = {**plain, "bias": torch.tensor([1e-6, 0.0])}
    difference, name = same_result.largest_weight_difference(state, plain)
    assert name == "bias" and difference == pytest.approx((1e-6 - 1e-9) / same_result.WEIGHT_FLOOR, rel=1e-3)


def test_same_result_counts_errors_as_misses_but_not_coupled_samples() -> None:
    key = {"family": "lstm", "case": "data 2", "optimizer": "SGD"}
    same = {**key, "verdict": "same", "loss_difference": 1e-6, "weight_difference": 1e-5}
    rows = [*[same] * 6, {**key, "verdict": "refused"}, {**key, "verdict": "error", "reason": "lost"}]
    summary, misses = same_result.summarise(rows)
    assert summary["verdicts"] == {"same": 6, "refused": 1, "error": 1}
    assert summary["largest_loss_difference"] == 1e-6
    assert misses == ["lstm, data 2, SGD: error lost"]
    _, misses = same_result.summarise(rows[1:7])
    assert misses == ["lstm, SGD: at least 6 forced plans must be the same, but 5 are (6 were tried)"]


def test_losses_that_are_not_finite_are_infinitely_different() -> None:
    assert coverage.largest_difference([1.0, 2.0], [1.0, 2.002]) == pytest.approx(0.001, rel=0.01)
    assert coverage.largest_difference([math.nan], [1.0]) == math.inf


def test_coverage_misses() -> None:
    good = {"family": "a", "source": "transformers", "captured": True, "trains": True}
    assert coverage.summarise([good] * 30)[1] == []
    summary, misses = coverage.summarise([good] * 27 + [{**good, "captured": False}] * 3)
    assert summary["captured_share"] == 0.9 and misses == ["captured_share must be at least 0.95, but is 0.9"]
    assert len(coverage.summarise([good] * 10)[1]) == 2
    assert "a does not train" in coverage.summarise([good] * 30 + [{**good, "trains": False}])[1][0]


def test_order_of_plans_counts_only_pairs_that_differ() -> None:
    def row(family: str, predicted: float, measured: float) -> dict[str, object]:
        error = prediction.relative_error(predicted, measured)
        return {"family": family, "predicted_time_s": predicted, "measured_time_s": measured, "time_error": error}

    rows = [row("a", 1.0, 1.0), row("a", 2.0, 1.05), row("a", 0.5, 2.0), row("b", 9.0, 9.0), row("c", 1, 0)]
    assert prediction.ordered(rows[:4]) == (0, 2)
    assert prediction.ordered([row("a", 1.0, 1.0), row("a", 2.0, 3.0)]) == (1, 1)
    summary, misses = prediction.summarise(rows[:4])
    assert summary["ordered_share"] == 0.0 and summary["num_measured"] == 4
    assert any("at least 30" in miss for miss in misses) and any("ordered_share" in miss for miss in misses)
    assert any("median_memory_error" in miss for miss in misses)  # nothing measured is no success
    assert prediction.relative_error(1.0, None) is None and prediction.relative_error(1.1, 1.0) == pytest.approx(0.1)


def test_live_tensors_are_counted_once_per_storage() -> None:
    before = prediction.live_tensor_bytes()
    tensor = torch.zeros(1000)
    view = tensor[10:]
    assert prediction.live_tensor_bytes() - before == 4000
    assert prediction.live_tensor_bytes(besides={"not ours": [view]}) == before
    del tensor, view


_HOLE = """
import ctypes
from benchmarks import prediction
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_size_t
libc.malloc.argtypes = libc.free.argtypes = [ctypes.c_size_t]
blocks = [libc.malloc(8192) for _ in range(1024)]
for block in blocks[:-1]:
    libc.free(block)
print(libc.malloc(1 << 17) < libc.sbrk(0))
prediction._fill_holes()
print(libc.malloc(1 << 17) < libc.sbrk(0))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_large_blocks_do_not_go_into_holes_of_the_heap() -> None:
    environment = {**os.environ, **prediction.RETURNING_ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", _HOLE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]

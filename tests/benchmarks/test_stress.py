"""Random programs with random delays and faults: a share of `python -m benchmarks.stress`, and that it can fail."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import stress
from benchmarks.plain_programs import PlainMachine, total
from benchmarks.random_programs import make_case, next_parameter
from benchmarks.random_segments import MODULUS
from benchmarks.stress import Fault, Trial, judge, run_faults, run_steps, summarise
from partita.program.check import check
from partita.program.instructions import Instruction
from partita.runtime.collectives import AllReduceOp
from partita.runtime.local import Channel

KINDS = {kind.__name__ for kind in Instruction.__args__}  # type: ignore[attr-defined]


def test_random_programs_hold_every_instruction_and_pass_the_check() -> None:
    kinds: Counter[str] = Counter()
    groups: set[tuple[int, ...]] = set()
    for seed in range(40):
        case = make_case(seed, num_processes=1 + seed % 2)
        check(case.programs)
        for program in case.programs.programs:
            kinds.update(type(item).__name__ for item in program.instructions)
            groups.update(item.group for item in program.instructions if hasattr(item, "group"))
    assert set(kinds) == KINDS and min(kinds.values()) > 50
    assert {len(group) for group in groups} == {1, 2, 3, 4}
    assert any(group != tuple(sorted(group)) for group in groups)


def test_values_stay_exact() -> None:
    """The interpreter's sums, which are formed in float64, are those of whole numbers without limit."""
    for seed in range(10):
        case = make_case(seed, num_processes=1)
        machine = PlainMachine(case.programs, case.parameters, next_parameter)
        machine.step(case.leaves)
        for value in machine.buffers.values():
            assert torch.equal(value.double(), value.double().round())
    parts = [torch.full((2,), 61.0, dtype=torch.bfloat16)] * 4
    assert total(parts).tolist() == [244.0, 244.0]
    assert next_parameter(torch.tensor([60.0]), torch.tensor([4.0 * MODULUS])) == (300 + 3 * 244) % MODULUS


@pytest.mark.parametrize("seed", range(0, 60, 5))
def test_steps_with_delays_are_right(seed: int) -> None:
    result = Trial(seed, 0, 1, None).run()
    assert result["wrong"] == [] and result["alive"] == [] and "fault_error" not in result, result


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_that_raises_ends_the_step(seed: int) -> None:
    result = Trial(seed, 0, 1, None, "raise").run()
    assert judge("raise", seed, [{"trials": [result]}]) == []
    assert result["fault_error"] == "WorkerError" and result["fault_s"] < 2.0


def test_two_processes_end_right_and_at_once() -> None:
    seeds = itertools.count(100)
    row = run_steps(40, seeds, 2)
    assert row["wrong"] == 0 and row["hangs"] == 0 and row["error"] == "" and row["steps"] == 40
    killed = run_faults("kill", 1, seeds, 2)
    assert killed["wrong"] == 0 and killed["hangs"] == 0 and killed["steps"] == 1, killed


def _run_some(seeds: range) -> list[str]:
    return [text for seed in seeds for text in Trial(seed, 0, 1, None).run()["wrong"]]


def test_a_wrong_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AllReduceOp.__call__

    def late(self: Any, values: Any) -> list[Tensor]:
        results = honest(self, values)
        return [result + 1 for result in results] if self.seat.num_local == 2 else results

    monkeypatch.setattr(AllReduceOp, "__call__", late)
    assert _run_some(range(6))


def test_values_of_a_mixed_up_channel_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Channel.put
    monkeypatch.setattr(Channel, "put", lambda self, value: honest(self, value * 0))
    assert _run_some(range(6))


def test_judgements() -> None:
    good = {"fault_error": "WorkerError", "cause": "Injected('worker 1')", "alive": [], "wrong": [], "fault_s": 0.1}
    other = {**good, "fault_error": "StepError", "cause": "None"}
    assert judge("raise", 1, [{"trials": [good]}, {"trials": [other]}]) == []
    assert "not 1" in judge("raise", 1, [{"trials": [good]}, {"trials": [good]}])[0]
    assert "no error" in judge("raise", 1, [{"trials": [{"alive": [], "wrong": []}]}])[0]
    assert "still alive" in judge("raise", 1, [{"trials": [{**good, "alive": ["worker 0"]}]}])[0]
    assert "took" in judge("raise", 1, [{"trials": [{**good, "fault_s": 99.0}]}])[0]
    gone = {"error": "ended with exit status -9", "lost": True}
    peer = {**other, "fault_error": "PeerLostError"}
    assert judge("kill", 1, [gone, {"trials": [peer]}]) == []
    assert judge("kill", 1, [{"trials": [peer]}, {"trials": [peer]}])
    assert judge("late", 1, [{"trials": [{**good, "fault_error": "WaitTimeoutError"}]}]) == []
    assert judge("late", 1, [{"trials": [other]}]) == ["late, seed 1: no process raised a time-out"]


def test_faults_are_drawn_within_the_program_and_misses_are_told() -> None:
    case = make_case(5, num_processes=1)
    for seed in range(20):
        fault = Fault.draw("raise", case, random.Random(seed))
        assert 0 <= fault.index < len(case.programs.programs[fault.worker].instructions)
        assert 0 <= fault.step < stress.STEPS_PER_CASE
    row = {"part": "steps", "processes": 1, "steps": 20, "cases": 1, "wrong": 0, "hangs": 0, "error": ""}
    broken = {**row, "part": "fault: raise", "cases": 2, "steps": 1}
    summary, misses = summarise([row, {**row, "wrong": 1}, broken])
    assert summary == {"steps": 40, "wrong": 1, "hangs": 0, "faults": 2} and len(misses) == 2

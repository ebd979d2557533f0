"""The simulator on programs whose timeline can be worked out by hand, and on lowered ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx

from partita.cost.model import CollectiveKind, Place
from partita.errors import ProgramError
from partita.graph.graph import Phase
from partita.graph.storages import GraphMemory
from partita.plan import Plan, Worker
from partita.program import ProgramSet, lower
from partita.program.instructions import (
    AllReduce,
    Await,
    Free,
    Instruction,
    Program,
    Recv,
    ReduceScatter,
    Run,
    Segment,
    Send,
    Slice,
    Start,
    TensorSpec,
    Update,
)
from partita.simulator import simulate

sys.path.insert(0, str(Path(__file__).parent.parent / "program"))
from program_cases import CASES, captured, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


@dataclass(frozen=True)
class Rates:
    """Round numbers: a segment's time is its key, a message takes a second a byte between processes."""

    per_active_s: float = 0.0
    fixed_s: float = 0.0
    start_s: float = 0.0
    interrupted_s: float = 0.0
    refined_uncertainty: float = 0.05

    def uncertainty(self, *, compiled: bool) -> float:
        return 0.1

    def op_time_s(self, node: fx.Node, place: Place, *, num_active: float = 1) -> float:
        return 1.0

    def segment_time_s(
        self, module: fx.GraphModule, key: str, place: Place, *, compiled: bool, num_active: float = 1
    ) -> float:
        base = float(key) if key.replace(".", "").isdigit() and len(key) < 6 else 1.0
        return base / (2 if compiled else 1) + self.per_active_s * (num_active - 1)

    def update_time_s(self, sizes: tuple[int, ...], optimizer: str, place: Place, *, num_active: float = 1) -> float:
        return sum(sizes) * (2.0 if optimizer == "AdamW" else 1.0)

    def transfer_time_s(self, num_bytes: int, source: Place, target: Place) -> float:
        return 0.0 if source.process == target.process else float(num_bytes)

    def collective_time_s(
        self, kind: CollectiveKind, num_bytes: int, group: tuple[Place, ...], *, num_tensors: int = 1
    ) -> float:
        return num_bytes / 8

    def gradient_sum_time_s(self, num_bytes: int, group: tuple[Place, ...], *, num_tensors: int = 1) -> float:
        return self.collective_time_s("all_reduce", num_bytes, group, num_tensors=num_tensors)

    def interruption_s(self, num_bytes: int, place: Place, *, num_processes: int, num_busy: int) -> float:
        return self.interrupted_s

    @property
    def sent_share(self) -> float:
        return 1.0

    def instruction_time_s(self) -> float:
        return self.fixed_s

    def step_time_s(self, num_workers: int) -> float:
        return self.start_s


VALUE = TensorSpec((2,), torch.float32)  # 8 bytes


def segment(key: str, workspace_bytes: int = 0) -> Segment:
    memory = GraphMemory(VALUE.num_bytes + workspace_bytes, (VALUE.num_bytes,), (0,), (True,), ())
    return Segment(key, fx.GraphModule(torch.nn.Module(), fx.Graph()), (), (VALUE,), 0, 0, memory)


def run(key: str, output: str) -> Run:
    return Run(key, (), (output,), Phase.FORWARD, 0, 0, (False,))


def job(*lists: tuple[Instruction, ...], processes: tuple[int, ...] | None = None, compiled: bool = False):
    where = processes or (0,) * len(lists)
    programs = tuple(Program(w, where[w], 0, items, ()) for w, items in enumerate(lists))
    keys = {i.segment for items in lists for i in items if isinstance(i, Run)}
    workers = tuple(Worker(index=w, process=p, machine=p, cores=(w,), stage=0, data=w) for w, p in enumerate(where))
    plan = Plan(
        mode="graph",
        graph_fingerprint="",
        cluster_fingerprint="",
        axes={"pipeline": 1, "data": len(lists)},
        workers=workers,
        threads_per_worker=1,
        compiled=compiled,
    )
    return ProgramSet(programs, {key: segment(key, 100) for key in keys}), plan


def test_one_worker_runs_one_after_the_other() -> None:
    programs, plan = job((run("3", "n:a@0"), run("4", "n:b@0"), Free(("n:a@0", "n:b@0"))))
    timeline = simulate(programs, plan, Rates(start_s=10.0))
    assert timeline.step_time_s == 17.0
    assert [(e.kind, e.start_s, e.end_s) for e in timeline.events] == [("Run", 10.0, 13.0), ("Run", 13.0, 17.0)]
    assert timeline.busy_time_s(0) == 7.0 and timeline.exposed_time_s(0) == 0.0 and timeline.skew == 0.0


def test_a_receiver_waits_and_the_sender_does_not() -> None:
    send = (run("3", "n:a@0"), Send("n:a@0", 1, "a", VALUE), run("1", "n:b@0"))
    programs, plan = job(send, (Recv("n:a@0", 0, "a", VALUE), run("2", "n:c@0")), processes=(0, 1))
    timeline = simulate(programs, plan, Rates())
    assert max(event.end_s for event in timeline.of_worker(0)) == 4.0
    assert timeline.of_worker(1)[0].end_s == 11.0, "3 s until it is sent, 8 s on the way"
    assert timeline.step_time_s == 13.0
    assert timeline.bytes_sent == 8
    assert timeline.exposed_time_s(1) == 11.0 and timeline.exposed_time_s(0) == 0.0
    assert timeline.skew == 4.0 / 3.0 - 1, "one computes for 4 s, the other for 2"


def test_one_link_carries_one_message_at_a_time() -> None:
    sends = tuple(Send("p:w", 1, key, VALUE) for key in "ab")
    receives = tuple(Recv(f"n:{key}", 0, key, VALUE) for key in "ab")
    programs, plan = job(sends, receives, processes=(0, 1))
    assert [event.end_s for event in simulate(programs, plan, Rates()).of_worker(1)] == [8.0, 16.0]


def test_within_a_process_a_value_is_handed_over_at_once() -> None:
    programs, plan = job((Send("p:w", 1, "a", VALUE),), (Recv("n:a", 0, "a", VALUE),))
    timeline = simulate(programs, plan, Rates())
    assert timeline.step_time_s == 0.0 and timeline.bytes_sent == 0


def test_a_collective_starts_when_the_last_member_has_come() -> None:
    both = AllReduce(("n:a@0",), (VALUE,), (0, 1), "sum")
    programs, plan = job((run("3", "n:a@0"), both), (run("5", "n:a@0"), both))
    timeline = simulate(programs, plan, Rates())
    meetings = [event for event in timeline.events if event.kind == "AllReduce"]
    assert [(event.worker, event.start_s, event.end_s) for event in meetings] == [(0, 3.0, 6.0), (1, 5.0, 6.0)]


@pytest.mark.parametrize(
    ("computed_s", "interrupted_s", "through_s"),
    [(6.0, 0.0, 9.0), (6.0, 0.5, 9.5), (2.5, 0.5, 6.0), (2.5, 1.0, 6.5)],
    ids=["free", "taken from computing", "hidden in the wait", "more than the wait"],
)
def test_a_sum_in_the_background_takes_what_it_computes(
    computed_s: float, interrupted_s: float, through_s: float
) -> None:
    sum_of = AllReduce(("n:a@0",), (VALUE, VALUE, VALUE), (0, 1), "sum")  # three seconds from the start of the last
    own = (run("3", "n:a@0"), Start(sum_of), run(str(computed_s), "n:b@0"), Await(sum_of))
    programs, plan = job(own, own, processes=(0, 1))
    timeline = simulate(programs, plan, Rates(interrupted_s=interrupted_s))
    assert [event.end_s for event in timeline.events if event.kind == "Await"] == [through_s] * 2


def test_optimizer_compilation_and_busy_neighbours_count() -> None:
    parts = (Slice("w", 0, 3),)
    spec = TensorSpec((3,), torch.float32)
    alone = ReduceScatter(("p:w",), (spec,), (0,), "g", parameters=("w",), slices=(parts,), replicated=(True,))
    programs, plan = job((run("4", "n:a@0"), alone, Update(parts)), (run("1", "n:a@0"),), compiled=True)
    timeline = simulate(programs, plan, Rates(per_active_s=0.5), optimizer="AdamW")
    update = next(event for event in timeline.events if event.kind == "Update")
    assert timeline.of_worker(0)[0].time_s == 2.5, "4 s halved by compilation, and half a second for the neighbour"
    assert update.time_s == 6.0


def test_memory_is_followed_register_by_register() -> None:
    first, second = run("1", "n:a@0"), run("2", "n:b@0")
    programs, plan = job((first, second, Free(("n:a@0",)), run("3", "n:c@0"), Free(("n:b@0", "n:c@0"))))
    assert simulate(programs, plan, Rates()).peak_memory_bytes == {0: 8 + 8 + 100}


def test_a_deadlock_is_an_error() -> None:
    programs, plan = job(*((Recv("n:a", 1 - w, "a", VALUE),) for w in range(2)))
    with pytest.raises(ProgramError, match="deadlock"):
        simulate(programs, plan, Rates())


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_balanced_pipeline_takes_as_long_as_its_formula(schedule: str) -> None:
    """(m + S - 1) (f + b) with equal stages (GPipe, section 2.3; PipeDream-Flush is the same)."""
    _, graph, _ = captured(CASES["denoise"], 8)
    plan = make_plan(graph, pipeline=2, microbatches=4, schedule=schedule)
    programs = lower(graph, plan)

    class OneSecondAPass(Rates):
        def segment_time_s(self, module, key, place, **_):  # type: ignore[no-untyped-def]
            return self.seconds.get(key, 0.0)  # draws take no time

        def update_time_s(self, *_, **__):  # type: ignore[no-untyped-def]
            return 0.0

        def collective_time_s(self, *_, **__):  # type: ignore[no-untyped-def]
            return 0.0

    OneSecondAPass.seconds = {}
    for program in programs.programs:
        merged = program.stage == 1 and schedule == "1f1b"
        for instruction in program.instructions:
            if isinstance(instruction, Run):
                OneSecondAPass.seconds[instruction.segment] = 2.0 if merged else 1.0
    assert simulate(programs, plan, OneSecondAPass()).step_time_s == pytest.approx((4 + 2 - 1) * 2.0)


def test_1f1b_needs_less_memory_than_gpipe() -> None:
    _, graph, _ = captured(CASES["mlp"], 16)
    peaks = {}
    for schedule in ("gpipe", "1f1b"):
        plan = make_plan(graph, pipeline=2, microbatches=8, schedule=schedule)
        peaks[schedule] = simulate(lower(graph, plan), plan, Rates()).peak_memory_bytes
    assert sum(peaks["1f1b"].values()) < sum(peaks["gpipe"].values())

"""Measures what the runtime takes for itself, by running small programs on real workers of this process.

Each program isolates one cost, the others being known: n workers that do nothing; many instructions in a row; a
meeting to which the last worker comes late, so that the others are parked, as they mostly are in training; the same
meeting with many tensors, and with large ones; a value handed to a worker that waits for it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from partita.cost.overheads import Overheads
from partita.graph.graph import Phase
from partita.graph.storages import GraphMemory
from partita.plan import Plan, Worker
from partita.program.instructions import (
    AllReduce,
    Free,
    Instruction,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Segment,
    Send,
    Slice,
    TensorSpec,
)
from partita.program.timeline import Timeline
from partita.runtime.engine import Engine, State
from partita.units import MIB, split_evenly

NUM_STEPS = 40
NUM_REPEATS = 20  # of an instruction in one program
NUM_TENSORS = 32
LATE_S = 3e-4  # longer than a waiting worker polls before it parks
LARGE_ELEMENTS = 2 * MIB  # 8 MiB of float32: more than a core's own cache
_LOSS = "n:loss"


def measure_overheads(cores: Sequence[int]) -> Overheads:
    """The overheads of workers on `cores`, one worker a core. Takes about half a second."""
    one, several = tuple(cores[:1]), tuple(cores)
    empty = {len(place): _step_s(place) for place in {one, several}}
    runs_s = _per_instruction_s(one)
    if len(several) == 1:
        return Overheads(step_s=empty, instruction_s=runs_s)
    meeting_s = _meeting_s(several, 1, 1)
    many_s = _meeting_s(several, NUM_TENSORS, 1)
    large_s = _meeting_s(several, 1, LARGE_ELEMENTS)
    moved = (len(several) + 1) * 4 * LARGE_ELEMENTS  # all workers together read every copy and write the sum
    return Overheads(
        step_s=empty,
        instruction_s=runs_s,
        meeting_s=meeting_s,
        tensor_s=max(many_s - meeting_s, 0.0) / (NUM_TENSORS - 1),
        handover_s=_handover_s((several[0], several[-1])),
        sum_bytes_per_s=moved / (large_s - meeting_s) if large_s > meeting_s else 0.0,
    )


def _step_s(cores: tuple[int, ...]) -> float:
    """A step of workers that do nothing but give a loss."""
    steps = _timelines([[_run("value", _LOSS)] for _ in cores], cores)
    return statistics.median(step.step_time_s for step in steps)


def _per_instruction_s(cores: tuple[int, ...]) -> float:
    few: list[Instruction] = [_run("value", _LOSS)]
    many = [*few, *(Free((f"n:{index}",)) for index in range(10 * NUM_REPEATS))]
    times = [statistics.median(step.step_time_s for step in _timelines([p], cores)) for p in (few, many)]
    return max(times[1] - times[0], 0.0) / (10 * NUM_REPEATS)


def _meeting_s(cores: tuple[int, ...], num_tensors: int, num_elements: int) -> float:
    """From the arrival of the last worker, which is `LATE_S` behind, until all have their slice of the sums."""
    spec = TensorSpec((num_elements,), torch.float32)
    parameters = tuple(str(index) for index in range(num_tensors))
    shares = split_evenly(num_tensors * num_elements, len(cores))
    slices = _cut(num_tensors, num_elements, shares)
    group = tuple(range(len(cores)))
    programs: list[list[Instruction]] = []
    for worker in group:
        late = [_run("late", "n:late")] if worker == group[-1] else []
        own = tuple(f"p:{worker}.{name}" for name in parameters)
        meeting = ReduceScatter(own, (spec,) * num_tensors, group, "meeting", parameters=parameters, slices=slices)
        programs.append([_run("value", _LOSS), AllReduce((), (), group, "start"), *late, meeting])
    state = {f"{worker}.{name}": torch.ones(num_elements) for worker in group for name in parameters}
    found = []
    for step in _timelines(programs, cores, state):
        events = [event for event in step.events if event.kind == "ReduceScatter"]
        found.append(max(event.end_s for event in events) - max(event.start_s for event in events))
    return statistics.median(found)


def _cut(num_tensors: int, num_elements: int, shares: Sequence[int]) -> tuple[tuple[Slice, ...], ...]:
    """The concatenation of the tensors, cut into `shares`."""
    owned: list[list[Slice]] = [[] for _ in shares]
    edges = [sum(shares[:index]) for index in range(len(shares) + 1)]
    for tensor in range(num_tensors):
        start = tensor * num_elements
        for index, (low, high) in enumerate(itertools.pairwise(edges)):
            first, last = max(low, start) - start, min(high, start + num_elements) - start
            if first < last:
                owned[index].append(Slice(str(tensor), first, last))
    return tuple(tuple(items) for items in owned)


def _handover_s(cores: tuple[int, int]) -> float:
    """From the start of a send until the receiver, which is parked, has the value."""
    spec = TensorSpec((1,), torch.float32)
    start: list[Instruction] = [_run("value", _LOSS), AllReduce((), (), (0, 1), "start")]
    send: list[Instruction] = [*start, _run("late", "n:v"), Send("n:v", 1, "v", spec)]
    receive: list[Instruction] = [*start, Recv("n:v", 0, "v", spec)]
    found = []
    for step in _timelines([send, receive], cores):
        sent = next(event for event in step.events if event.kind == "Send")
        taken = next(event for event in step.events if event.kind == "Recv")
        found.append(max(taken.end_s, sent.end_s) - sent.start_s)
    return statistics.median(found)


# Programs ------------------------------------------------------------------------------------------------------------


def _value() -> tuple[Tensor, ...]:
    return (torch.zeros(()),)


def _late() -> tuple[Tensor, ...]:
    time.sleep(LATE_S)
    return (torch.zeros(()),)


def _segment(key: str, function: Callable[[], tuple[Tensor, ...]]) -> Segment:
    graph = fx.Graph()
    graph.output(graph.call_function(function))
    spec = TensorSpec((), torch.float32)
    return Segment(key, fx.GraphModule(torch.nn.Module(), graph), (), (spec,), 0, 0, GraphMemory())


def _run(segment: str, output: str) -> Run:
    return Run(segment, (), (output,), Phase.FORWARD, 0, 0, (False,))


def _timelines(
    instructions: Sequence[Sequence[Instruction]], cores: Sequence[int], state: dict[str, Tensor] | None = None
) -> list[Timeline]:
    """Recorded timelines of steps of workers with these instructions, the first ones left out."""
    segments = {"value": _segment("value", _value), "late": _segment("late", _late)}
    programs = tuple(Program(worker, 0, 0, tuple(items), (), loss=_LOSS) for worker, items in enumerate(instructions))
    workers = tuple(
        Worker(index=index, process=0, machine=0, cores=(cores[index],), stage=0, data=index)
        for index in range(len(instructions))
    )
    plan = Plan(
        mode="graph",
        graph_fingerprint="",
        cluster_fingerprint="",
        axes={"pipeline": 1, "data": len(workers)},
        workers=workers,
        threads_per_worker=1,
    )
    with Engine(
        ProgramSet(programs, segments), plan, process=0, state=State(parameters=state or {}), update=_no_update
    ) as engine:
        steps = [engine.step((), record=True).timeline for _ in range(NUM_STEPS)]
    return [step for step in steps[NUM_STEPS // 4 :] if step is not None]


def _no_update(worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
    raise AssertionError("these programs update nothing")

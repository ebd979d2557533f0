"""Measures what the runtime takes for itself, by running small programs on real workers of this process.

Each program isolates one cost, the others being known: n workers that do nothing; many instructions in a row; a
meeting to which the last worker comes late, so that the others are parked, as they mostly are in training; the same
meeting with many tensors, and with large ones; a value handed to a worker that waits for it. What sums between
processes compute is the processor time of couriers that carry them out between two ends of a connection of this
process.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch
from torch import Tensor, fx

from partita.cost.overheads import Overheads
from partita.errors import WaitTimeoutError
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
from partita.runtime.background import Courier
from partita.runtime.engine import Engine, State
from partita.runtime.failure import Failure
from partita.runtime.sockets import Mesh
from partita.runtime.transport import Line
from partita.units import MIB, split_evenly

NUM_STEPS = 40
NUM_REPEATS = 20  # of an instruction in one program
NUM_TENSORS = 32
LATE_S = 3e-4  # longer than a waiting worker polls before it parks
LARGE_ELEMENTS = 2 * MIB  # 8 MiB of float32: more than a core's own cache
COURIER_BYTES = (4, MIB // 4)  # of sums: next to nothing, and one that goes round a ring
COURIER_LIMIT_S = 10.0
_LOSS = "n:loss"


def measure_overheads(cores: Sequence[int]) -> Overheads:
    """The overheads of workers on `cores`, one worker a core. Takes about half a second."""
    one, several = tuple(cores[:1]), tuple(cores)
    empty = {len(place): _step_s(place) for place in {one, several}}
    runs_s = _per_instruction_s(one)
    alone = Overheads(step_s=empty, instruction_s=runs_s, **_courier())
    if len(several) == 1:
        return alone
    meeting_s = _meeting_s(several, 1, 1)
    many_s = _meeting_s(several, NUM_TENSORS, 1)
    large_s = _meeting_s(several, 1, LARGE_ELEMENTS)
    moved = (len(several) + 1) * 4 * LARGE_ELEMENTS  # all workers together read every copy and write the sum
    return msgspec.structs.replace(
        alone,
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


# Couriers ------------------------------------------------------------------------------------------------------------


class _Sum:
    """A sum that a courier carries out, and the processor time that its thread has used by the end of it."""

    key = "courier"

    def __init__(self, num_bytes: int) -> None:
        self._value = torch.zeros(max(num_bytes // 4, 1))
        self.over, self.computed_s = threading.Event(), 0.0

    def carry_out(self, line: Line) -> None:
        line.all_reduce(self._value)
        self.computed_s = time.thread_time()
        self.over.set()


class _End(Mesh):
    """One end of a line of two."""

    def exchange(self, outgoing: object, incoming: object) -> dict[int, list[Tensor]]:
        raise AssertionError("these couriers only sum")


def _courier() -> dict[str, float]:
    """What a sum computes on one of its two ends: with next to no bytes, and for each byte."""
    with _two_ends() as couriers:
        small_s, large_s = (_computed_s(couriers, num_bytes) for num_bytes in COURIER_BYTES)
    small, large = COURIER_BYTES
    return {"courier_s": small_s, "courier_s_per_byte": max(large_s - small_s, 0.0) / (large - small)}


def _computed_s(couriers: Sequence[Courier], num_bytes: int) -> float:
    """Of one sum, each started when the one before is over, as by a worker that computes in between."""
    found: list[float] = []
    before = [0.0 for _ in couriers]
    for _ in range(NUM_STEPS):
        sums = [_Sum(num_bytes) for _ in couriers]
        for courier, one in zip(couriers, sums, strict=True):
            courier.submit(one)
        if not all(one.over.wait(COURIER_LIMIT_S) for one in sums):
            raise WaitTimeoutError(
                f"two sockets of this process must exchange {num_bytes} bytes within {COURIER_LIMIT_S:g} s, but they "
                "do not. See whether its processor is overloaded."
            )
        found += [one.computed_s - last for one, last in zip(sums, before, strict=True)]
        before = [one.computed_s for one in sums]
    return statistics.median(found[len(couriers) :])  # the first ones count what their threads had done before


@contextlib.contextmanager
def _two_ends() -> Iterator[list[Courier]]:
    """Couriers of two processes of a line, both in this one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname(), COURIER_LIMIT_S)
        second, _ = listener.accept()
    ends = [_End({1: first}, 0, COURIER_LIMIT_S), _End({0: second}, 1, COURIER_LIMIT_S)]
    couriers = [Courier(end, Failure(), "measured") for end in ends]
    try:
        yield couriers
    finally:
        for end in ends:
            end.interrupt()
        for courier in couriers:
            courier.close()
            courier.join(COURIER_LIMIT_S)
        for end in ends:
            end.close()


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

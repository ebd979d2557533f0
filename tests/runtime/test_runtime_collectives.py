"""Collectives over random groups on random processes, held against their definitions. Processes are threads here."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from partita.program.instructions import AllGather, AllReduce, AllToAll, ReduceScatter, Slice, TensorSpec
from partita.program.wire import sent_bytes, sum_bytes, whole_bytes
from partita.runtime.binding import cuts_of
from partita.runtime.collectives import (
    AllGatherOp,
    AllReduceOp,
    AllToAllOp,
    ReduceScatterOp,
    Seat,
    barrier,
)
from partita.runtime.failure import Failure, Waiter
from partita.runtime.local import Meeting, Party

CPU = torch.device("cpu")


@dataclass
class Network:
    """Carries messages between pretended processes: a meeting of their leaders."""

    processes: tuple[int, ...]
    meeting: Meeting


@dataclass
class FakeLine:
    network: Network
    process: int
    bytes_sent: int = 0

    def _gather(self, value: Any) -> list[Any]:
        return self.network.meeting.gather(self.network.processes.index(self.process), value)

    def all_reduce(self, value: Tensor) -> None:
        assert value.dim() == 1 and value.is_contiguous()
        processes = self.network.processes
        self.bytes_sent += sum_bytes(value.numel(), value.element_size(), len(processes), processes.index(self.process))
        parts = self._gather(value.clone())
        value.copy_(torch.stack(parts).sum(0))

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        sent = {process: [value.clone() for value in values] for process, values in outgoing.items()}
        self.bytes_sent += sum(value.nbytes for values in sent.values() for value in values)
        everything = dict(zip(self.network.processes, self._gather(sent), strict=True))
        result = {process: everything[process][self.process] for process in incoming}
        for process, specs in incoming.items():
            assert [TensorSpec(tuple(v.shape), v.dtype) for v in result[process]] == list(specs)
        return result


@dataclass
class Job:
    """A group of workers, each on some process; `run` calls a function with every worker's seat, in a thread each."""

    process_of: tuple[int, ...]
    failure: Failure = field(default_factory=Failure)
    lines: dict[int, FakeLine] = field(default_factory=dict)

    def seats(self) -> list[Seat]:
        parties = [Party(worker, Waiter(self.failure), 20.0) for worker in range(len(self.process_of))]
        positions: dict[int, tuple[int, ...]] = {}
        for process in sorted(set(self.process_of)):
            positions[process] = tuple(i for i, p in enumerate(self.process_of) if p == process)
        meetings = {process: Meeting([parties[i] for i in members]) for process, members in positions.items()}
        network = Network(tuple(positions), Meeting([parties[members[0]] for members in positions.values()]))
        self.lines = {process: FakeLine(network, process) for process in positions}
        return [
            Seat(
                meeting=meetings[process],
                member=positions[process].index(position),
                process=process,
                positions=positions,
                line=self.lines[process] if len(positions) > 1 else None,
            )
            for position, process in enumerate(self.process_of)
        ]

    def run(self, body: Callable[[int, Seat], Any]) -> list[Any]:
        results: list[Any] = [None] * len(self.process_of)

        def call(position: int, seat: Seat) -> None:
            try:
                results[position] = body(position, seat)
            except BaseException as error:
                self.failure.record(error)

        threads = [threading.Thread(target=call, args=item) for item in enumerate(self.seats())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        if self.failure.error is not None:
            raise self.failure.error
        return results

    def check_bytes(self, instruction: AllReduce | ReduceScatter | AllGather | AllToAll, num_times: int = 1) -> None:
        """What the lines carried is what `sent_bytes` says of the instruction."""
        predicted = sent_bytes(instruction, dict(enumerate(self.process_of)))
        assert {process: line.bytes_sent for process, line in self.lines.items()} == {
            process: num_times * num_bytes for process, num_bytes in predicted.items()
        }


jobs = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(lambda processes: Job(tuple(processes)))
extents = st.integers(0, 4)


def integers(*shape: int) -> Tensor:
    """Small whole numbers: sums are exact in any order."""
    return torch.randint(-9, 9, shape).float()


@settings(max_examples=40, deadline=None)
@given(jobs, st.lists(st.sampled_from([(), (3,), (2, 5), (0, 4), (9000,)]), min_size=1, max_size=3))
def test_all_reduce(job: Job, shapes: list[tuple[int, ...]]) -> None:
    values = [[integers(*shape) for shape in shapes] for _ in job.process_of]
    specs = [TensorSpec(shape, torch.float32) for shape in shapes]
    before = [[value.clone() for value in mine] for mine in values]
    results = job.run(lambda position, seat: [AllReduceOp(seat, specs)(values[position]) for _ in range(2)])
    for result in results:
        for turn in result:
            for index, value in enumerate(turn):
                assert value.shape == shapes[index]
                assert torch.equal(value, torch.stack([mine[index] for mine in before]).sum(0))
    names = tuple(map(str, range(len(shapes))))
    job.check_bytes(AllReduce(names, tuple(specs), tuple(range(len(job.process_of))), "k"), num_times=2)
    assert all(torch.equal(a, b) for x, y in zip(values, before, strict=True) for a, b in zip(x, y, strict=True))


@settings(max_examples=40, deadline=None)
@given(jobs, st.data())
def test_all_gather_of_unequal_pieces(job: Job, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(extents, min_size=len(job.process_of), max_size=len(job.process_of)))
    dim = data.draw(st.integers(0, 1))
    whole = integers(sum(sizes), 3) if dim == 0 else integers(3, sum(sizes))
    pieces = list(torch.split(whole, sizes, dim))

    def body(position: int, seat: Seat) -> Tensor:
        piece = pieces[position]
        return AllGatherOp(seat, TensorSpec(tuple(piece.shape), piece.dtype), dim, sizes)(piece)

    for result in job.run(body):
        assert torch.equal(result, whole)
    for piece in pieces:  # whosever instruction it is
        spec, group = TensorSpec(tuple(piece.shape), piece.dtype), tuple(range(len(pieces)))
        gather = AllGather("x", "y", spec, group, "k", dim, tuple(sizes))
        assert whole_bytes(gather) == whole.nbytes
        job.check_bytes(gather)


@settings(max_examples=40, deadline=None)
@given(jobs, st.data())
def test_all_to_all_changes_the_sharded_dim(job: Job, data: st.DataObject) -> None:
    count = len(job.process_of)
    lists = st.lists(extents, min_size=count, max_size=count)
    sizes, new_sizes = data.draw(lists), data.draw(lists)
    whole = integers(sum(sizes), 2, sum(new_sizes))
    old, new = torch.split(whole, sizes, 0), torch.split(whole, new_sizes, 2)

    def body(position: int, seat: Seat) -> Tensor:
        piece = old[position]
        spec = TensorSpec(tuple(piece.shape), piece.dtype)
        return AllToAllOp(seat, spec, 0, sizes, 2, new_sizes)(piece)

    for result, expected in zip(job.run(body), new, strict=True):
        assert torch.equal(result, expected)
    spec, group = TensorSpec(tuple(old[-1].shape), whole.dtype), tuple(range(count))
    turn = AllToAll("x", "y", spec, group, "k", 0, tuple(sizes), 2, tuple(new_sizes))
    assert whole_bytes(turn) == whole.nbytes
    job.check_bytes(turn)


@settings(max_examples=40, deadline=None)
@given(jobs, st.data())
def test_reduce_scatter_along_a_dim(job: Job, data: st.DataObject) -> None:
    count = len(job.process_of)
    sizes = tuple(data.draw(st.lists(extents, min_size=count, max_size=count)))
    values = [integers(2, sum(sizes)) for _ in range(count)]
    spec = TensorSpec((2, sum(sizes)), torch.float32)
    instruction = ReduceScatter(("r",), (spec,), tuple(range(count)), "k", outputs=("o",), dim=1, sizes=sizes)
    cuts = cuts_of(instruction)
    results = job.run(lambda position, seat: ReduceScatterOp(seat, cuts, CPU)([values[position]]))
    expected = torch.split(torch.stack(values).sum(0), list(sizes), 1)
    for result, piece in zip(results, expected, strict=True):
        assert torch.equal(result[0], piece)
    job.check_bytes(instruction)


@settings(max_examples=40, deadline=None)
@given(jobs, st.data())
def test_reduce_scatter_by_slices(job: Job, data: st.DataObject) -> None:
    """Any slices for any member, overlapping or none, of summed and of replicated gradients."""
    count = len(job.process_of)
    shapes = {"a": (3, 2), "b": (5,)}
    one = st.builds(
        lambda name, a, b: Slice(name, min(a, b), max(a, b)),
        st.sampled_from(sorted(shapes)),
        st.integers(0, 5),
        st.integers(0, 5),
    )
    slices = tuple(tuple(data.draw(st.lists(one, max_size=3))) for _ in range(count))
    same = integers(5)
    values = [[integers(3, 2), same] for _ in range(count)]
    instruction = ReduceScatter(
        ("ra", "rb"),
        tuple(TensorSpec(shape, torch.float32) for shape in shapes.values()),
        tuple(range(count)),
        "k",
        parameters=tuple(shapes),
        slices=slices,
        replicated=(False, True),
    )
    cuts = cuts_of(instruction)
    results = job.run(lambda position, seat: ReduceScatterOp(seat, cuts, CPU)(values[position]))
    whole = {"a": torch.stack([mine[0] for mine in values]).sum(0).view(-1), "b": same}
    for position, result in enumerate(results):
        assert len(result) == len(slices[position])
        for item, value in zip(slices[position], result, strict=True):
            assert torch.equal(value, whole[item.parameter][item.start : item.end])
    job.check_bytes(instruction)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)), st.data())
def test_sums_of_gradients_in_place(count: int, unneeded: set[int], shown: set[int], data: st.DataObject) -> None:
    """In the memory of the first one's tensors that nothing reads afterwards, unless something else shows them. The
    sums are the same, in the same order of additions, and so are all other tensors."""
    shapes = [(3, 2), (5,), (4, 3), (2,)]
    whole = data.draw(st.booleans())  # each parameter to one worker, or cut at any place
    slices: list[list[Slice]] = [[] for _ in range(count)]
    for index, shape in enumerate(shapes):
        size = math.prod(shape)
        cut = 0 if whole else data.draw(st.integers(0, size))
        owners = data.draw(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)))
        for owner, start, end in zip(owners, (0, cut), (cut, size), strict=True):
            slices[owner] += [Slice(str(index), start, end)] if start < end else []
    made = [[torch.randn(shape) for shape in shapes] for _ in range(count)]
    made[0][2] = made[0][2].t().contiguous().t()  # not flat: cannot take a sum
    before = [[value.clone() for value in mine] for mine in made]
    registers = [{f"n:{index}": value for index, value in enumerate(mine)} for mine in made]
    views = [made[0][index][:1] for index in shown]
    del made
    names = tuple(registers[0])
    specs = tuple(TensorSpec(shape, torch.float32) for shape in shapes)
    cuts = cuts_of(
        ReduceScatter(
            names, specs, tuple(range(count)), "k", parameters=("0", "1", "2", "3"), slices=tuple(map(tuple, slices))
        )
    )

    def body(position: int, seat: Seat) -> list[Tensor]:
        scatter, own = ReduceScatterOp(seat, cuts, CPU, overwritable=sorted(unneeded)), registers[position]
        return scatter([own[name] for name in names])

    results = Job((0,) * count).run(body)
    memory = [value.untyped_storage().data_ptr() for value in registers[0].values()]
    for mine, result in zip(slices, results, strict=True):
        for item, value in zip(mine, result, strict=True):
            index = int(item.parameter)
            expected = before[0][index]
            for other in before[1:]:
                expected = expected + other[index]
            assert torch.equal(value.reshape(-1), expected.reshape(-1)[item.start : item.end])
            in_place = value.untyped_storage().data_ptr() == memory[index]
            assert in_place == (index in unneeded - shown and index != 2)
    for position, own in enumerate(registers):
        for index, (value, was) in enumerate(zip(own.values(), before[position], strict=True)):
            assert torch.equal(value, was) == (position > 0 or index not in unneeded - shown or index == 2)
    assert len(views) == len(shown)


@settings(max_examples=20, deadline=None)
@given(jobs)
def test_nobody_passes_a_barrier_before_all_have_come(job: Job) -> None:
    arrived: list[int] = []

    def body(position: int, seat: Seat) -> int:
        arrived.append(position)
        barrier(seat)
        return len(arrived)

    assert job.run(body) == [len(job.process_of)] * len(job.process_of)

"""Collectives: shared memory inside a process, one exchange between processes, the result shared again.

Legend: a *group* is the tuple of workers of an instruction, a *position* an index into it; a *member* is an index
into the positions that are local to this process. The local member 0 is the leader: it alone talks to other processes.

Every sum is formed in the order of positions (local ones first per process, then processes by rank), and each element
is summed once per process, so all members hold bit-identical results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.cost.collectives import SMALL_BYTES
from partita.program.instructions import TensorSpec
from partita.runtime.local import Meeting
from partita.runtime.torch_adapter import add_all, held_by_none_else, sums
from partita.runtime.transport import Line


@dataclass(frozen=True)
class Seat:
    """One worker's place in the collectives of one key and group.

    `positions[process]` holds the positions of each process's members, ascending; `line` is the connection to the other
    processes (None: there are none).
    """

    meeting: Meeting
    member: int
    process: int
    positions: Mapping[int, tuple[int, ...]]
    line: Line | None

    @property
    def num_local(self) -> int:
        return len(self.positions[self.process])

    @property
    def position(self) -> int:
        return self.positions[self.process][self.member]

    @property
    def is_leader(self) -> bool:
        return self.member == 0

    @property
    def others(self) -> tuple[int, ...]:
        """The other processes of the group, in order."""
        return tuple(process for process in self.positions if process != self.process)


def sum_into(out: Tensor, parts: Sequence[Tensor]) -> None:
    """``out = parts[0] + parts[1] + ...``, from left to right."""
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


def barrier(seat: Seat) -> None:
    """Return when every member of the group has come here."""
    seat.meeting.gather(seat.member, None)
    if seat.line is not None:
        if seat.is_leader:
            seat.line.all_reduce(torch.zeros(1, dtype=torch.int32))
        seat.meeting.gather(seat.member, None)


class AllReduceOp:
    """Sum of several tensors of one dtype over the group.

    Small values: every member sums all of them itself. Large values: each member sums its own range of the
    concatenation of all tensors into one buffer that all members then share.
    """

    def __init__(self, seat: Seat, specs: Sequence[TensorSpec]) -> None:
        self.seat = seat
        self.specs = tuple(specs)
        self.dtype = specs[0].dtype
        self.offsets = [0]
        for spec in specs:
            self.offsets.append(self.offsets[-1] + spec.num_elements)
        self.num_elements = self.offsets[-1]
        num_bytes = self.num_elements * self.dtype.itemsize
        self.by_one = seat.line is None and num_bytes <= SMALL_BYTES
        self.ranges = self._ranges(seat.member, seat.num_local)

    def _ranges(self, member: int, num_members: int) -> list[tuple[int, int, int]]:
        """(tensor, start, end) of the elements that this member sums."""
        low = self.num_elements * member // num_members
        high = self.num_elements * (member + 1) // num_members
        found = []
        for index, (start, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            a, b = max(low, start), min(high, end)
            if a < b:
                found.append((index, a - start, b - start))
        return found

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        seat = self.seat
        if self.by_one:
            brought = seat.meeting.gather(seat.member, values)
            return [_sum([other[i] for other in brought]) for i in range(len(values))]
        flats = [value.reshape(-1) for value in values]
        out = flats[0].new_empty(self.num_elements) if seat.is_leader else None
        brought = seat.meeting.gather(seat.member, (flats, out))
        shared: Tensor = brought[0][1]
        for index, start, end in self.ranges:
            at = self.offsets[index]
            sum_into(shared[at + start : at + end], [other[index][start:end] for other, _ in brought])
        self._finish(shared)
        return [
            shared[start:end].view(spec.shape)
            for start, end, spec in zip(self.offsets, self.offsets[1:], self.specs, strict=False)
        ]

    def _finish(self, shared: Tensor) -> None:
        seat = self.seat
        if seat.num_local > 1:
            seat.meeting.gather(seat.member, None)
        if seat.line is not None:
            if seat.is_leader:
                seat.line.all_reduce(shared)
            if seat.num_local > 1:
                seat.meeting.gather(seat.member, None)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    out = parts[0].clone() if len(parts) == 1 else parts[0] + parts[1]
    for part in parts[2:]:
        out.add_(part)
    return out


@dataclass(frozen=True)
class Cut:
    """A piece of tensor number `tensor`: elements ``start:start+length`` along `dim` (-1: of the flattened tensor).

    `summed` is False where every member holds the whole sum already. `spec` is the piece's shape and dtype.
    """

    tensor: int
    dim: int
    start: int
    length: int
    spec: TensorSpec
    summed: bool = True

    def of(self, value: Tensor) -> Tensor:
        if self.dim >= 0:
            return value.narrow(self.dim, self.start, self.length)
        flat = value.reshape(-1)
        return flat if self.length == flat.numel() else flat[self.start : self.start + self.length]

    def is_whole(self, value: Tensor) -> bool:
        return self.dim < 0 and self.length == value.numel() and value.is_contiguous()


class ReduceScatterOp:
    """Every position p receives the sums of `cuts[p]`: pieces of flattened tensors flat, but whole ones, where nothing
    else has to be done, in the shape they have.

    Of the tensors at the places `overwritable` nobody needs the values afterwards. The sums are left in the leader's,
    as far as nobody holds them for another reason: else a gradient would be there once more, as its sum.
    """

    def __init__(
        self, seat: Seat, cuts: Sequence[Sequence[Cut]], device: torch.device, *, overwritable: Sequence[int] = ()
    ) -> None:
        self.seat = seat
        self.cuts = cuts
        self.mine = cuts[seat.position]
        self.alone = seat.num_local == 1 and seat.line is None
        self.places, self.lengths = [cut.tensor for cut in self.mine], [cut.length for cut in self.mine]
        self.flat = all(cut.dim < 0 for cut in self.mine)
        # Everything comes from memory of this process and is to be summed: one call does it, instead of one a tensor.
        self.together = not self.alone and seat.line is None and all(cut.summed for cut in self.mine)
        self.overwritable = tuple(overwritable) if seat.is_leader and device.type == "cpu" else ()
        self.device = device

    def _buffers(self) -> list[Tensor]:
        return [torch.empty(cut.spec.shape, dtype=cut.spec.dtype, device=self.device) for cut in self.mine]

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        if self.alone:
            own = [values[place] for place in self.places]
            if self._are_whole(own):
                return own
            return [value if cut.is_whole(value) else cut.of(value) for cut, value in zip(self.mine, own, strict=True)]
        seat = self.seat
        taken = held_by_none_else(values, self.overwritable) if self.overwritable and seat.line is None else []
        told = seat.meeting.gather(seat.member, (values, taken))
        brought = [own for own, _ in told]
        if self.together:
            return self._sum_together(brought, told[0][1])
        received = self._exchange(brought)
        results = self._buffers()
        for index, (cut, out) in enumerate(zip(self.mine, results, strict=True)):
            if not cut.summed:
                out.copy_(cut.of(values[cut.tensor]))
                continue
            sum_into(out, [cut.of(other[cut.tensor]) for other in brought])
            for pieces in received:
                out.add_(pieces[index])
        return results

    def _are_whole(self, own: Sequence[Tensor]) -> bool:
        """Whether all values are what the cuts would take of them."""
        return self.flat and list(map(Tensor.numel, own)) == self.lengths and all(map(Tensor.is_contiguous, own))

    def _sum_together(self, brought: Sequence[Sequence[Tensor]], taken: Sequence[int]) -> list[Tensor]:
        """The sums; of the tensors at the places `taken` in the memory of the leader's, where they lie flat."""
        parts: list[list[Tensor]] = [[] for _ in brought]
        for cut in self.mine:
            own = [values[cut.tensor] for values in brought]
            whole = all(map(cut.is_whole, own))  # then summed in its own shape: no views have to be made
            for part, value in zip(parts, own, strict=True):
                part.append(value if whole else cut.of(value))
        if not taken:
            return sums(parts)
        into = [cut.tensor in taken and brought[0][cut.tensor].is_contiguous() for cut in self.mine]
        totals, *others = [list(itertools.compress(part, into)) for part in parts]
        add_all(totals, others)
        in_place = iter(totals)
        anew = iter(sums([[value for value, here in zip(part, into, strict=True) if not here] for part in parts]))
        return [next(in_place if here else anew) for here in into]

    def _exchange(self, brought: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Other processes' sums for this worker's cuts, per process."""
        seat = self.seat
        if seat.line is None:
            return []

        def outgoing(process: int) -> list[Tensor]:
            return [
                _sum([cut.of(other[cut.tensor]) for other in brought])
                for position in seat.positions[process]
                for cut in self.cuts[position]
                if cut.summed
            ]

        local = seat.positions[seat.process]
        here = [(position, cut) for position in local for cut in self.cuts[position] if cut.summed]
        specs = [cut.spec for _, cut in here]
        exchanged = share_exchange(seat, outgoing, {process: specs for process in seat.others})
        result = []
        for process in seat.others:
            pieces = iter(exchanged[process])
            by_position: dict[int, list[Tensor]] = {}
            for position, _ in here:
                by_position.setdefault(position, []).append(next(pieces))
            summed = iter(by_position.get(seat.position, ()))
            result.append([next(summed) if cut.summed else torch.empty(0) for cut in self.mine])
        return result


def share_exchange(
    seat: Seat, outgoing: Callable[[int], list[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
) -> Mapping[int, list[Tensor]]:
    """The leader sends ``outgoing(q)`` to every other process q; all local members get what came from each q."""
    assert seat.line is not None
    result = None
    if seat.is_leader:
        result = seat.line.exchange({process: outgoing(process) for process in seat.others}, incoming)
    shared: Mapping[int, list[Tensor]] = seat.meeting.gather(seat.member, result)[0]
    return shared


class AllGatherOp:
    """Concatenates the members' tensors along a dim, in one buffer that the members of a process share."""

    def __init__(self, seat: Seat, spec: TensorSpec, dim: int, sizes: Sequence[int]) -> None:
        self.seat = seat
        self.dim = dim
        self.sizes = tuple(sizes)
        self.spec = spec
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes) + 1)]
        self.shape = _resized(spec.shape, dim, self.starts[-1])

    def _spec(self, position: int) -> TensorSpec:
        return TensorSpec(_resized(self.spec.shape, self.dim, self.sizes[position]), self.spec.dtype)

    def __call__(self, value: Tensor) -> Tensor:
        seat = self.seat
        out = value.new_empty(self.shape) if seat.is_leader else None
        brought = seat.meeting.gather(seat.member, (value, out))
        shared: Tensor = brought[0][1]
        self._place(shared, seat.position, value)
        if seat.line is not None and seat.is_leader:
            local = [other.contiguous() for other, _ in brought]
            incoming = {q: [self._spec(position) for position in seat.positions[q]] for q in seat.others}
            received = seat.line.exchange(dict.fromkeys(seat.others, local), incoming)
            for process, pieces in received.items():
                for position, piece in zip(seat.positions[process], pieces, strict=True):
                    self._place(shared, position, piece)
        if seat.num_local > 1:
            seat.meeting.gather(seat.member, None)
        return shared

    def _place(self, shared: Tensor, position: int, value: Tensor) -> None:
        shared.narrow(self.dim, self.starts[position], self.sizes[position]).copy_(value)


class AllToAllOp:
    """Position p gives entries ``new_sizes[q]`` along `new_dim` to position q; the pieces are joined along `dim`."""

    def __init__(
        self, seat: Seat, spec: TensorSpec, dim: int, sizes: Sequence[int], new_dim: int, new_sizes: Sequence[int]
    ) -> None:
        self.seat = seat
        self.spec = spec
        self.dim, self.sizes = dim, tuple(sizes)
        self.new_dim, self.new_sizes = new_dim, tuple(new_sizes)
        self.new_starts = [sum(self.new_sizes[:i]) for i in range(len(self.new_sizes))]

    def _piece(self, value: Tensor, target: int) -> Tensor:
        return value.narrow(self.new_dim, self.new_starts[target], self.new_sizes[target])

    def _for_process(self, process: int, brought: Sequence[Tensor]) -> list[Tensor]:
        targets = self.seat.positions[process]
        return [self._piece(value, target).contiguous() for value in brought for target in targets]

    def _spec(self, source: int, target: int) -> TensorSpec:
        shape = _resized(self.spec.shape, self.dim, self.sizes[source])
        return TensorSpec(_resized(shape, self.new_dim, self.new_sizes[target]), self.spec.dtype)

    def __call__(self, value: Tensor) -> Tensor:
        seat = self.seat
        brought = seat.meeting.gather(seat.member, value)
        here = seat.positions[seat.process]
        pieces = {position: self._piece(other, seat.position) for position, other in zip(here, brought, strict=True)}
        if seat.line is not None:
            incoming = {
                process: [self._spec(source, target) for source in seat.positions[process] for target in here]
                for process in seat.others
            }
            received = share_exchange(seat, lambda process: self._for_process(process, brought), incoming)
            for process, tensors in received.items():
                for index, source in enumerate(seat.positions[process]):
                    pieces[source] = tensors[index * len(here) + seat.member]
        return torch.cat([pieces[position] for position in sorted(pieces)], self.dim)


def _resized(shape: Sequence[int], dim: int, extent: int) -> tuple[int, ...]:
    return (*shape[:dim], extent, *shape[dim + 1 :])

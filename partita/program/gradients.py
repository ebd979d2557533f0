"""The reduction of one stage's gradients: who sums which registers into which slices.

Every worker w of a stage at coordinates (d, t) of the data and tensor axes has a register with the gradient of each
parameter, or of the box of it that it reads. Along each axis it lies in one of three ways, and the sum that w needs
of a parameter runs over the workers v with, on each axis,

    Partial    any coordinate          (every one holds a summand)
    Shard      any coordinate          (every one holds another box)
    Replicate  w's own coordinate      (every one holds the same)

The workers of one process add what they have in shared memory, each for its own slices (`ReduceScatter`); then the
slices are added (`AllReduce`) over those processes Q that together with w's process P have the sum's workers, each
once: with the same coordinates as P on every axis that is not Partial. Where parameters must be whole, some may be
updated by one of these processes, which sends them to the others (`partita.program.ownership`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from partita.errors import PlanError
from partita.graph.graph import OutputKind
from partita.plan import Worker
from partita.program.boxes import Boxes
from partita.program.instructions import (
    AllReduce,
    Box,
    Instruction,
    Recv,
    ReduceScatter,
    Send,
    Slice,
    TensorSpec,
    Update,
)
from partita.program.ownership import UpdateCosts, deal_over_processes
from partita.sharding.placement import Partial, Placement, Replicate


@dataclass(frozen=True)
class Result:
    """One output of the step, summed over microbatches, in register `register` of every worker of `stage`. `spec` is
    that of the whole tensor; `placement` is along the data axis, `over_tensor` along the tensor axis."""

    kind: OutputKind
    target: str
    register: str
    spec: TensorSpec
    stage: int
    placement: Placement
    over_tensor: Placement


def cut_slices(
    sizes: Sequence[tuple[str, int]], num_owners: int, *, rows: Mapping[str, int] | None = None
) -> tuple[tuple[Slice, ...], ...]:
    """Shares parameters (name, number of elements) among owners, as evenly as can be. Those in `rows` are only cut
    between multiples of so many elements.

    Example:
        >>> cut_slices([("w", 3), ("b", 1)], 2)
        ((Slice('w', 0, 2),), (Slice('w', 2, 3), Slice('b', 0, 1)))
    """
    owned: list[list[Slice]] = [[] for _ in range(num_owners)]
    total = sum(size for _, size in sizes)
    bounds = [total * (owner + 1) // num_owners for owner in range(num_owners)]
    position = owner = 0
    for name, size in sizes:
        start = 0
        while start < size:
            while position >= bounds[owner] and owner + 1 < num_owners:
                owner += 1
            end = min(size, start + bounds[owner] - position)
            unit = rows.get(name, 1) if rows else 1
            end = min(size, -(-end // unit) * unit)
            owned[owner].append(Slice(name, start, end))
            position += end - start
            start = end
    return tuple(tuple(items) for items in owned)


class Reduction:
    """The reduction of `gradients` by the `workers` of their stage.

    `updates` is what each worker updates: the first ones of the slices that it reduces, of which there are
    `num_reduced`; `first` numbers the first of them by worker, where the step has other reductions. With
    `whole_parameters` none is cut, and `costs` says how they are dealt. `dtypes` are those of the parameters.

    Raises:
        PlanError: the workers of the processes do not fill a grid of the two axes.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        gradients: Sequence[Result],
        boxes: Boxes,
        *,
        whole_parameters: bool,
        costs: UpdateCosts,
        dtypes: Mapping[str, torch.dtype],
        first: Mapping[int, int] | None = None,
    ) -> None:
        self.gradients, self.boxes, self.costs, self.dtypes = gradients, boxes, costs, dtypes
        self.first = first or {}
        self.members: dict[int, list[Worker]] = {}
        for worker in workers:
            self.members.setdefault(worker.process, []).append(worker)
        self.num_owners = min(map(len, self.members.values()))
        self._updating: dict[str, int] = {}  # parameter -> the one process that updates it
        self._slices = {process: self._shares(process, whole_parameters) for process in self.members}
        reduced = {
            worker.index: (process, slices)
            for process, members in self.members.items()
            for worker, slices in zip(members, self._slices[process], strict=True)
        }
        self.num_reduced = {worker: len(slices) for worker, (_, slices) in reduced.items()}
        self.updates = {
            worker: Update(tuple(part for part in slices if self.is_updated_in(process, part.parameter)),
                           self.first.get(worker, 0))
            for worker, (process, slices) in reduced.items()
        }  # fmt: skip

    def instructions(self, name: str) -> dict[int, list[Instruction]]:
        """What each worker runs; `name` tells the keys from those of other reductions."""
        found: dict[int, list[Instruction]] = {
            worker.index: [self._inside(worker, f"gradients:{name}:{process}")]
            for process, members in self.members.items()
            for worker in members
        }
        for group in dict.fromkeys(self._group(process, item) for item in self.gradients for process in self.members):
            if len(group) > 1:
                for owner in range(self.num_owners):
                    self._across(group, owner, f"gradients:{name}:owner{owner}", found)
        return found

    def moves(self) -> dict[int, list[Instruction]]:
        """What each worker runs after its update: new values of parameters that one process updates go to the others of
        its group, to the workers at the same places."""
        if not self._updating:
            return {}
        found: dict[int, list[Instruction]] = {index: [] for index in self.num_reduced}
        place_of = {part.parameter: place for slices in self._slices.values() for place, own in enumerate(slices)
                    for part in own}  # fmt: skip
        for item in self.gradients:
            source = self._updating.get(item.target)
            if source is None:
                continue
            place, spec = place_of[item.target], TensorSpec(item.spec.shape, self.dtypes[item.target])
            owner = self.members[source][place].index
            for process in self._group(source, item):
                reader = self.members[process][place].index
                if process != source:
                    key = f"updated:{item.target}:{reader}"
                    found[owner].append(Send(f"p:{item.target}", reader, key, spec))
                    found[reader].append(Recv(f"p:{item.target}", owner, key, spec))
        return found

    def is_updated_in(self, process: int, parameter: str) -> bool:
        """Whether the process updates the parameter, instead of receiving its new value."""
        return self._updating.get(parameter, process) == process

    # Who adds what ---------------------------------------------------------------------------------------------------

    def _counts(self, item: Result, reader: Worker, other: Worker) -> bool:
        """Whether `other`'s register counts in the sum that `reader` needs."""
        same_data = not isinstance(item.placement, Replicate) or other.data == reader.data
        same_tensor = not isinstance(item.over_tensor, Replicate) or other.tensor == reader.tensor
        return same_data and same_tensor

    def _group(self, process: int, item: Result) -> tuple[int, ...]:
        """The processes over which the slices of a parameter are added up."""

        def key(members: Sequence[Worker]) -> tuple[object, ...]:
            data = frozenset(worker.data for worker in members)
            tensor = frozenset(worker.tensor for worker in members)
            return (
                None if isinstance(item.placement, Partial) else data,
                None if isinstance(item.over_tensor, Partial) else tensor,
            )

        own = key(self.members[process])
        return tuple(other for other, members in self.members.items() if key(members) == own)

    def _sum_of(self, item: Result, owner: int, process: int) -> tuple[int, ...]:
        """The workers whose registers make up the sum of an owner's slices."""
        readers = [self.members[other][owner] for other in self._group(process, item)]
        found = [
            other.index
            for reader in readers
            for other in self.members[reader.process]
            if self._counts(item, reader, other)
        ]
        mine = self.members[process][owner]
        storage = self.boxes.storage(process, item.target)
        wanted = [
            other.index
            for members in self.members.values()
            for other in members
            if self._counts(item, mine, other) and self._overlaps(other, item.target, storage)
        ]
        alike = not isinstance(item.placement, Replicate) and not isinstance(item.over_tensor, Replicate)
        if len(found) != len(set(found)) or len(found) != len(wanted) or (alike and set(found) != set(wanted)):
            raise PlanError(
                f"the workers of every process must fill a grid of the data and tensor axes, but the gradient of "
                f"{item.target!r} would be summed over workers {sorted(found)} instead of {sorted(wanted)}; use an "
                "extent of the tensor axis that divides the workers of a process, or is a multiple of them"
            )
        return tuple(sorted(found))

    def _overlaps(self, worker: Worker, name: str, storage: Box) -> bool:
        box = self.boxes.box(worker, name)
        edges = zip(box.starts, box.ends, storage.starts, storage.ends, strict=True)
        return all(start < last and first < end for start, end, first, last in edges)

    # Slices ----------------------------------------------------------------------------------------------------------

    def _shares(self, process: int, whole_parameters: bool) -> tuple[tuple[Slice, ...], ...]:
        """The slices of each worker of a process: those parameters together that are added over the same processes,
        since these must cut them alike. What the process itself updates comes first."""
        groups: dict[tuple[int, ...], list[Result]] = {}
        for item in self.gradients:
            groups.setdefault(self._group(process, item), []).append(item)
        members = self.members[process]
        slices: list[list[Slice]] = [[] for _ in members]
        for group, items in groups.items():
            shapes = {item.target: self.boxes.storage(process, item.target).lengths for item in items}
            sizes = {name: math.prod(shape) for name, shape in shapes.items()}
            shares: Sequence[Sequence[Slice]]
            if whole_parameters:
                shares = self._dealt(group, items, sizes)
            else:
                rows = {name: math.prod(shape[1:]) for name, shape in shapes.items() if self.boxes.is_cut(name)}
                shares = cut_slices(list(sizes.items()), self.num_owners, rows=rows)
            for index, share in enumerate(shares):
                slices[index] += share
        for own in slices:
            own.sort(key=lambda part: not self.is_updated_in(process, part.parameter))
        return tuple(map(tuple, slices))

    def _dealt(self, group: tuple[int, ...], items: Sequence[Result], sizes: Mapping[str, int]) -> list[list[Slice]]:
        """Whole parameters by owner. Values that are cut over workers stay with every process."""
        costs = self.costs.of(sizes)
        moves = self.costs.know(sizes) and not any(self.boxes.is_cut(name) for name in sizes)
        num_bytes = {item.target: sizes[item.target] * self.dtypes[item.target].itemsize for item in items}
        dealt = deal_over_processes(costs, num_bytes, self.num_owners, len(group) if moves else 1, self.costs)
        self._updating |= {name: group[place] for name, place in dealt.process_of.items() if place >= 0}
        return [[Slice(name, 0, sizes[name]) for name in own] for own in dealt.columns]

    # Instructions ----------------------------------------------------------------------------------------------------

    def _inside(self, worker: Worker, key: str) -> ReduceScatter:
        members = self.members[worker.process]
        plain = len(members) == 1 or all(
            not self.boxes.is_cut(item.target) and len({other.tensor for other in members}) == 1
            for item in self.gradients
        )
        parts: list[tuple[Box | None, ...]] = []
        for item in () if plain else self.gradients:
            storage = self.boxes.storage(worker.process, item.target)
            parts.append(
                tuple(
                    self.boxes.box(other, item.target).within(storage) if self._counts(item, worker, other) else None
                    for other in members
                )
            )
        owner = members.index(worker)
        return ReduceScatter(
            registers=tuple(item.register for item in self.gradients),
            specs=tuple(
                TensorSpec(self.boxes.box(worker, item.target).lengths, item.spec.dtype) for item in self.gradients
            ),
            group=tuple(other.index for other in members),
            key=key,
            parameters=tuple(item.target for item in self.gradients),
            slices=self._slices[worker.process],
            first=self.first.get(worker.index, 0),
            replicated=tuple(
                isinstance(item.placement, Replicate) and not isinstance(item.over_tensor, Partial)
                for item in self.gradients
            ),
            storages=tuple(self.boxes.storage(worker.process, item.target).lengths for item in self.gradients),
            parts=tuple(parts),
            sums_over=tuple(
                self._sum_of(item, owner, worker.process) if owner < self.num_owners else () for item in self.gradients
            ),
        )

    def _across(self, group: tuple[int, ...], owner: int, key: str, found: Mapping[int, list[Instruction]]) -> None:
        kinds = {item.target: item for item in self.gradients if group == self._group(group[0], item)}
        for process in group:
            first = self.first.get(self.members[process][owner].index, 0)
            summed = [  # by their places among the worker's own slices, which may differ from process to process
                (f"g:{first + i}", TensorSpec((part.num_elements,), kinds[part.parameter].spec.dtype), part)
                for i, part in enumerate(self._slices[process][owner])
                if part.parameter in kinds
            ]
            if self._updating:  # as does their order then
                summed.sort(key=lambda item: item[2].parameter)
            for dtype in dict.fromkeys(spec.dtype for _, spec, _ in summed):
                same = [item for item in summed if item[1].dtype == dtype]
                instruction = AllReduce(
                    tuple(register for register, _, _ in same),
                    tuple(spec for _, spec, _ in same),
                    tuple(self.members[other][owner].index for other in group),
                    f"{key}:{'-'.join(map(str, group))}:{dtype}",
                    gradients=tuple(part for _, _, part in same),
                )
                found[self.members[process][owner].index].append(instruction)

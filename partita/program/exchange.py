"""The end of a step: gradients reduced by slices, the optimizer's updates, the loss and buffers where they are needed.

Per stage, the workers of one process reduce the gradients in shared memory, each its own slices (`ReduceScatter`); the
slices are added over the stage's processes (`AllReduce`), and each worker updates its slices of the one copy of the
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partita.graph.graph import Graph, OutputKind
from partita.plan import Plan, Worker
from partita.program.instructions import (
    AllReduce,
    Instruction,
    Recv,
    ReduceScatter,
    Send,
    Slice,
    TensorSpec,
    Update,
)
from partita.sharding.placement import Partial, Placement


@dataclass(frozen=True)
class Result:
    """One output of the step, summed over microbatches, in register `register` of every worker of `stage`."""

    kind: OutputKind
    target: str
    register: str
    spec: TensorSpec
    stage: int
    placement: Placement


def cut_slices(
    sizes: Sequence[tuple[str, int]], num_owners: int, *, whole_parameters: bool
) -> tuple[tuple[Slice, ...], ...]:
    """Shares parameters (name, number of elements) among owners, as evenly as can be.

    Example:
        >>> cut_slices([("w", 3), ("b", 1)], 2, whole_parameters=False)
        ((Slice('w', 0, 2),), (Slice('w', 2, 3), Slice('b', 0, 1)))
    """
    owned: list[list[Slice]] = [[] for _ in range(num_owners)]
    if whole_parameters:
        load = [0] * num_owners
        for name, size in sorted(sizes, key=lambda item: (-item[1], item[0])):
            owner = load.index(min(load))
            owned[owner].append(Slice(name, 0, size))
            load[owner] += size
        return tuple(tuple(items) for items in owned)
    total = sum(size for _, size in sizes)
    bounds = [total * (owner + 1) // num_owners for owner in range(num_owners)]
    position = owner = 0
    for name, size in sizes:
        start = 0
        while start < size:
            while position >= bounds[owner]:
                owner += 1
            end = min(size, start + bounds[owner] - position)
            owned[owner].append(Slice(name, start, end))
            position += end - start
            start = end
    return tuple(tuple(items) for items in owned)


class StepEnd:
    """Appends the end of the step to every worker's instructions."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        results: Sequence[Result],
        readers: Mapping[str, Sequence[int]],
        *,
        whole_parameters: bool,
    ) -> None:
        self.plan = plan
        self.results = results
        self.readers = readers  # persistent register -> workers that read it
        self.whole_parameters = whole_parameters
        self.programs: dict[int, list[Instruction]] = {worker.index: [] for worker in plan.workers}
        self.loss: dict[int, str] = {}
        self.buffers: dict[int, dict[str, str]] = {worker.index: {} for worker in plan.workers}
        self._shape = {item.name: item for item in graph.inputs}

    def build(self) -> None:
        for stage in range(self.plan.axes.get("pipeline", 1)):
            self._reduce_small(stage)
        self._spread_loss()
        owners = [self._gradients(stage) for stage in range(self.plan.axes.get("pipeline", 1))]
        self._barriers()
        for stage_owners in owners:
            for worker, slices in stage_owners.items():
                if slices:
                    self.programs[worker].append(Update(slices))
        self._spread_parameters()
        self._spread_buffers()

    def _workers(self, stage: int) -> list[Worker]:
        return [worker for worker in self.plan.workers if worker.stage == stage]

    def _by_process(self, workers: Sequence[Worker]) -> dict[int, list[Worker]]:
        found: dict[int, list[Worker]] = {}
        for worker in workers:
            found.setdefault(worker.process, []).append(worker)
        return found

    def _reduce_small(self, stage: int) -> None:
        """Loss and buffers that are sums over the data axis."""
        partial = [
            item
            for item in self.results
            if item.stage == stage and item.kind is not OutputKind.GRADIENT and isinstance(item.placement, Partial)
        ]
        group = tuple(worker.index for worker in self._workers(stage))
        if not partial or len(group) == 1:
            return
        for dtype in dict.fromkeys(item.spec.dtype for item in partial):
            same = [item for item in partial if item.spec.dtype == dtype]
            instruction = AllReduce(
                tuple(item.register for item in same),
                tuple(item.spec for item in same),
                group,
                f"results:{stage}:{dtype}",
            )
            for worker in group:
                self.programs[worker].append(instruction)

    def _gradients(self, stage: int) -> dict[int, tuple[Slice, ...]]:
        """Reduction of the stage's gradients; returns the slices that each worker owns."""
        gradients = [item for item in self.results if item.stage == stage and item.kind is OutputKind.GRADIENT]
        by_process = self._by_process(self._workers(stage))
        if not gradients:
            return {}
        num_owners = min(len(workers) for workers in by_process.values())
        sizes = [(item.target, item.spec.num_elements) for item in gradients]
        shares = cut_slices(sizes, num_owners, whole_parameters=self.whole_parameters)
        owned: dict[int, tuple[Slice, ...]] = {}
        for process, workers in by_process.items():
            slices = (*shares, *((),) * (len(workers) - num_owners))
            instruction = ReduceScatter(
                registers=tuple(item.register for item in gradients),
                specs=tuple(item.spec for item in gradients),
                group=tuple(worker.index for worker in workers),
                key=f"gradients:{stage}:{process}",
                parameters=tuple(item.target for item in gradients),
                slices=slices,
                replicated=tuple(not isinstance(item.placement, Partial) for item in gradients),
            )
            for worker, part in zip(workers, slices, strict=True):
                self.programs[worker.index].append(instruction)
                owned[worker.index] = part
        if len(by_process) > 1:
            self._across_processes(stage, gradients, shares, list(by_process.values()))
        return owned

    def _across_processes(
        self,
        stage: int,
        gradients: Sequence[Result],
        shares: Sequence[Sequence[Slice]],
        processes: Sequence[Sequence[Worker]],
    ) -> None:
        kinds = {item.target: item for item in gradients}
        for owner, slices in enumerate(shares):
            group = tuple(workers[owner].index for workers in processes)
            partial = [
                (f"g:{i}", TensorSpec((part.num_elements,), kinds[part.parameter].spec.dtype))
                for i, part in enumerate(slices)
                if isinstance(kinds[part.parameter].placement, Partial)
            ]
            for dtype in dict.fromkeys(spec.dtype for _, spec in partial):
                same = [(register, spec) for register, spec in partial if spec.dtype == dtype]
                instruction = AllReduce(
                    tuple(register for register, _ in same),
                    tuple(spec for _, spec in same),
                    group,
                    f"gradients:{stage}:owner{owner}:{dtype}",
                )
                for worker in group:
                    self.programs[worker].append(instruction)

    def _updated_by(self, parameter: str) -> list[Worker]:
        """Workers whose stage updates the parameter."""
        stages = {i.stage for i in self.results if i.kind is OutputKind.GRADIENT and i.target == parameter}
        return [worker for worker in self.plan.workers if worker.stage in stages]

    def _barriers(self) -> None:
        """No parameter changes while a worker of another stage in the same process may still read it."""
        for process, workers in self._by_process(self.plan.workers).items():
            crossed = False
            for item in self.results:
                if item.kind is not OutputKind.GRADIENT:
                    continue
                here = {self.plan.workers[w].stage for w in self._reading(item.target) if self._is_in(w, process)}
                updates_here = any(worker.process == process for worker in self._updated_by(item.target))
                crossed |= updates_here and bool(here - {item.stage})
            if crossed:
                self._barrier(process, workers, "before_update")

    def _barrier(self, process: int, workers: Sequence[Worker], name: str) -> None:
        group = tuple(worker.index for worker in workers)
        if len(group) > 1:
            for worker in group:
                self.programs[worker].append(AllReduce((), (), group, f"barrier:{name}:{process}"))

    def _reading(self, parameter: str) -> Sequence[int]:
        return self.readers.get(f"p:{parameter}", ())

    def _is_in(self, worker: int, process: int) -> bool:
        return self.plan.workers[worker].process == process

    def _spread_parameters(self) -> None:
        """Processes that read a parameter but do not update it receive the new value."""
        by_process = self._by_process(self.plan.workers)
        moves: list[tuple[str, Worker, int]] = []
        for item in self.results:
            if item.kind is not OutputKind.GRADIENT:
                continue
            owners = self._updated_by(item.target)
            have = {worker.process for worker in owners}
            for process in by_process:
                if process not in have and any(self._is_in(w, process) for w in self._reading(item.target)):
                    moves.append((item.target, owners[0], process))
        for process in dict.fromkeys([m[1].process for m in moves] + [m[2] for m in moves]):
            self._barrier(process, by_process[process], "before_spread")
        for name, owner, process in moves:
            known = self._shape[name]
            spec = TensorSpec(known.shape, known.dtype)
            receiver = by_process[process][0].index
            key = f"p:{name}:{process}"
            self.programs[owner.index].append(Send(f"p:{name}", receiver, key, spec))
            self.programs[receiver].append(Recv(f"p:{name}", owner.index, key, spec))

    def _spread_loss(self) -> None:
        """Every worker has the loss before it updates anything: one that is not finite must not spoil the weights."""
        item = next(item for item in self.results if item.kind is OutputKind.LOSS)
        holders = self._workers(item.stage)
        holder = {worker.process: worker for worker in reversed(holders)}
        self.loss = dict.fromkeys((worker.index for worker in self.plan.workers), item.register)
        for worker in self.plan.workers:
            if worker in holders:
                continue
            source = holder.setdefault(worker.process, worker)
            self._hand_over(item, holders[0] if source is worker else source, worker)

    def _spread_buffers(self) -> None:
        for item in self.results:
            if item.kind is not OutputKind.BUFFER:
                continue
            holders = self._workers(item.stage)
            by_process = self._by_process(holders)
            for workers in by_process.values():
                self.buffers[workers[0].index][item.target] = item.register
            for process, workers in self._by_process(self.plan.workers).items():
                reads = any(self._is_in(w, process) for w in self.readers.get(f"b:{item.target}", ()))
                if process not in by_process and reads:
                    self._hand_over(item, holders[0], workers[0])
                    self.buffers[workers[0].index][item.target] = item.register

    def _hand_over(self, item: Result, source: Worker, target: Worker) -> None:
        key = f"{item.register}:{target.index}"
        self.programs[source.index].append(Send(item.register, target.index, key, item.spec))
        self.programs[target.index].append(Recv(item.register, source.index, key, item.spec))

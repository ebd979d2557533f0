"""The end of a step: gradients reduced by slices, the optimizer's updates, the loss and buffers where they are needed.

Per stage, the workers of one process reduce the gradients in shared memory, each its own slices (`ReduceScatter`); the
slices are added over the stage's processes (`AllReduce`), and each worker updates its slices of the one copy of the
weights. Gradients in buckets (`partita.program.buckets`) are reduced and applied before the end, in the same way.

Where the plan has `bucket_bytes`, sums over processes are started as soon as a bucket is ready and go on in the
background of what is left of the backward phase; each bucket is awaited and applied at the end of the step, once the
loss is known, while later ones are still on their way. Where gradients are clipped, all are there before any is
applied: every worker squares its own slices, and the sum over all workers says how far to scale them. Whole parameters
that one process updates (`partita.program.ownership`) go to the others at the very end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partita.graph.graph import Graph, OutputKind
from partita.plan import Plan, Worker
from partita.program.boxes import Boxes
from partita.program.buckets import Bucket
from partita.program.gradients import Reduction, Result
from partita.program.instructions import (
    AllReduce,
    Await,
    Clip,
    Instruction,
    Recv,
    Send,
    Start,
    SumSquares,
    TensorSpec,
    Update,
)
from partita.program.ownership import UpdateCosts
from partita.program.uses import SQUARE, reads
from partita.sharding.placement import Partial


class StepEnd:
    """Appends the end of the step to every worker's instructions."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        results: Sequence[Result],
        readers: Mapping[str, Sequence[int]],
        boxes: Boxes,
        *,
        whole_parameters: bool,
        costs: UpdateCosts,
        clips: bool = False,
        buckets: Sequence[Bucket] = (),
    ) -> None:
        self.plan = plan
        self.square = "norm:square" if clips else ""
        self.results = results
        self.readers = readers  # persistent register -> workers that read it
        self.boxes = boxes
        self.whole_parameters, self.costs = whole_parameters, costs
        self._moves: list[Mapping[int, list[Instruction]]] = []  # by reduction: values that one process updates
        self._updated_in: dict[str, set[int]] = {}  # parameter -> processes
        self.programs: dict[int, list[Instruction]] = {worker.index: [] for worker in plan.workers}
        self.loss: dict[int, str] = {}
        self.buffers: dict[int, dict[str, str]] = {worker.index: {} for worker in plan.workers}
        self.released: list[dict[int, list[Instruction]]] = []  # by bucket and worker
        self._overlaps = plan.bucket_bytes > 0
        self._awaited: list[dict[int, list[Instruction]]] = []  # by bucket and worker: what ends a sum in background
        self._buckets = buckets
        self._in_bucket = frozenset[str]().union(*(bucket.parameters for bucket in buckets))
        self._num_reduced = dict.fromkeys(self.programs, 0)  # slices of each worker so far
        self._shape = {item.name: item for item in graph.inputs}

    def build(self) -> None:
        self._release_buckets()
        for stage in range(self.plan.axes.get("pipeline", 1)):
            self._reduce_small(stage, OutputKind.BUFFER if self._buckets and not self._overlaps else None)
        self._spread_loss()
        owners = [self._gradients(stage) for stage in range(self.plan.axes.get("pipeline", 1))]
        self._barriers()
        for awaited in self._awaited:
            for worker, instructions in awaited.items():
                self.programs[worker] += instructions
        for updates in owners:
            self._append(updates)
        if self.square:
            self._clip()
        for moves in self._moves:
            self._append(moves)
        self._spread_parameters()
        self._spread_buffers()

    def _append(self, instructions: Mapping[int, Sequence[Instruction]]) -> None:
        for worker, own in instructions.items():
            self.programs[worker] += own

    def _workers(self, stage: int) -> list[Worker]:
        return [worker for worker in self.plan.workers if worker.stage == stage]

    def _clip(self) -> None:
        """Puts the scaling of all gradients before the first update."""
        everyone = tuple(worker.index for worker in self.plan.workers)
        for worker in self.plan.workers:
            own = self.programs[worker.index]
            updates = [item for item in own if isinstance(item, Update)]
            registers = tuple(register for update in updates for register in reads(update))
            weights = tuple(self._weight(worker.process, part.parameter) for u in updates for part in u.slices)
            own[:] = [item for item in own if not isinstance(item, Update)]
            own.append(SumSquares(registers, weights, self.square))
            if len(everyone) > 1:
                own.append(AllReduce((self.square,), (SQUARE,), everyone, "norm"))
            if registers:
                own.append(Clip(registers, self.square))
            own += updates

    def _weight(self, process: int, parameter: str) -> float:
        """One over the number of processes that update the same entries of a parameter."""
        processes = self._updated_in[parameter]
        mine = self.boxes.storage(process, parameter)
        return 1 / sum(self.boxes.storage(other, parameter) == mine for other in processes)

    def _by_process(self, workers: Sequence[Worker]) -> dict[int, list[Worker]]:
        found: dict[int, list[Worker]] = {}
        for worker in workers:
            found.setdefault(worker.process, []).append(worker)
        return found

    def _release_buckets(self) -> None:
        """What every worker does where a bucket is released. The first release needs the loss as well."""
        for number, bucket in enumerate(self._buckets):
            before = {worker: len(instructions) for worker, instructions in self.programs.items()}
            if number == 0 and not self._overlaps:
                self._reduce_small(0, OutputKind.LOSS)
            gradients = [i for i in self.results if i.kind is OutputKind.GRADIENT and i.target in bucket.parameters]
            self._append(self._reduce(0, gradients, f"0.{number}"))
            released = {worker: items[before[worker] :] for worker, items in self.programs.items()}
            if self._overlaps:
                self._awaited.append({worker: _ending(items) for worker, items in released.items()})
                released = {worker: _beginning(items) for worker, items in released.items()}
            self.released.append(released)
            for worker, items in self.programs.items():
                del items[before[worker] :]

    def _reduce_small(self, stage: int, kind: OutputKind | None) -> None:
        """Loss and buffers (or one `kind` of them) that are sums over the data axis; all workers of a tensor axis have
        the same."""
        partial = [
            item
            for item in self.results
            if item.stage == stage
            and item.kind is not OutputKind.GRADIENT
            and kind in (None, item.kind)
            and isinstance(item.placement, Partial)
        ]
        workers = self._workers(stage)
        for tensor in sorted({worker.tensor for worker in workers}):
            group = tuple(worker.index for worker in workers if worker.tensor == tensor)
            if not partial or len(group) == 1:
                return
            for dtype in dict.fromkeys(item.spec.dtype for item in partial):
                same = [item for item in partial if item.spec.dtype == dtype]
                instruction = AllReduce(
                    tuple(item.register for item in same),
                    tuple(item.spec for item in same),
                    group,
                    f"results:{stage}:{tensor}:{dtype}:{kind.value if kind else 'all'}",
                )
                for worker in group:
                    self.programs[worker].append(instruction)

    def _gradients(self, stage: int) -> dict[int, list[Instruction]]:
        """Reduction of the stage's gradients; returns each worker's update."""
        gradients = [
            item
            for item in self.results
            if item.stage == stage and item.kind is OutputKind.GRADIENT and item.target not in self._in_bucket
        ]
        return self._reduce(stage, gradients, str(stage)) if gradients else {}

    def _reduce(self, stage: int, gradients: Sequence[Result], name: str) -> dict[int, list[Instruction]]:
        reduction = Reduction(
            self._workers(stage),
            gradients,
            self.boxes,
            whole_parameters=self.whole_parameters,
            costs=self.costs,
            dtypes={item.target: self._shape[item.target].dtype for item in gradients},
            first=dict(self._num_reduced),
        )
        self._append(reduction.instructions(name))
        for worker, num in reduction.num_reduced.items():
            self._num_reduced[worker] += num
        self._moves.append(reduction.moves())
        for item in gradients:
            everyone = {worker.process for worker in self._updated_by(item.target)}
            self._updated_in[item.target] = {p for p in everyone if reduction.is_updated_in(p, item.target)}
        return {worker: [update] for worker, update in reduction.updates.items() if update.slices}

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
        """Processes that read a parameter but do not update it receive the new value, or the parts that they read, from
        the workers at the same coordinates of the stage that updates it."""
        by_process = self._by_process(self.plan.workers)
        moves: list[tuple[str, Worker, Worker]] = []
        for item in self.results:
            if item.kind is not OutputKind.GRADIENT:
                continue
            owners = {(worker.data, worker.tensor): worker for worker in self._updated_by(item.target)}
            have = {worker.process for worker in owners.values()}
            for process in by_process:
                readers = [w for w in by_process[process] if w.index in self._reading(item.target)]
                if process not in have and readers:
                    boxes = {self.boxes.box(worker, item.target): worker for worker in reversed(readers)}
                    moves += [(item.target, owners[w.data, w.tensor], w) for w in reversed(boxes.values())]
        for process in dict.fromkeys([m[1].process for m in moves] + [m[2].process for m in moves]):
            self._barrier(process, by_process[process], "before_spread")
        for name, owner, reader in moves:
            spec = TensorSpec(self.boxes.box(reader, name).lengths, self._shape[name].dtype)
            key = f"p:{name}:{reader.index}"
            self.programs[owner.index].append(Send(f"p:{name}", reader.index, key, spec))
            self.programs[reader.index].append(Recv(f"p:{name}", owner.index, key, spec))

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


def _beginning(instructions: Sequence[Instruction]) -> list[Instruction]:
    """What of a bucket's reduction runs at once: sums inside the process, and the start of those over processes."""
    found = (Start(item) if isinstance(item, AllReduce) else item for item in instructions)
    return [item for item in found if not isinstance(item, Update)]


def _ending(instructions: Sequence[Instruction]) -> list[Instruction]:
    found = (Await(item) if isinstance(item, AllReduce) else item for item in instructions)
    return [item for item in found if isinstance(item, (Await, Update))]

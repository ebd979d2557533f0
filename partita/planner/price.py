"""The predicted step time of a corner by the planner's own formula, with the best stage boundaries.

    step = fixed + makespan of the pipeline's tasks

The makespan (`partita.planner.inter.schedule_time`) follows from the figures of the stages (`stage_costs`): forward and
backward of one microbatch, divided by the tensor axis, transfers between the stages, reduction of the stage's gradients
and the optimizer on the slice of one worker. `boundaries` minimises it, with a proof. Simulation of the lowered
programs, where the caller offers it, replaces the formula for the best plans.

Bounds of a corner, in the order of what they cost: `Pricer.bound_s` for any split of the ops,

    max(T, m max(T / S, max_i t_i), T + ((m - 1) B + (m - k) F) / S),     T = F + B = sum_i t_i

with every op on the fastest worker of the corner and k the most forward tasks before a backward task (one microbatch
passes all stages; the largest of S numbers is at least their mean), `Pricer.chain_bound_s` for contiguous stages
(`partita.planner.inter.chain`), and the lower bound of `Price`, from the solver.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from torch import fx

from partita.cluster.model import Cluster
from partita.cost.memory import block_bytes
from partita.cost.model import CostModel
from partita.errors import InfeasibleError, PlanError
from partita.graph.graph import Graph
from partita.plan import Worker
from partita.planner.boundaries import Boundaries, best_boundaries
from partita.planner.inter.chain import prefix_sums
from partita.planner.space import Corner
from partita.planner.stage_costs import Host, StageCosts, StageGroup
from partita.planner.work import Array, PhaseTimes, Work
from partita.units import format_bytes, proportional

_PROBE_BYTES = 2**20  # two messages tell a link's latency and bandwidth
_ROUNDING = 1e-12  # sums in another order differ by rounding


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a corner costs with its best stage boundaries. `lower_bound_s`: no boundaries give a faster step;
    `memory_bytes` is per process rank."""

    step_time_s: float
    lower_bound_s: float
    starts: tuple[int, ...]
    stage_time_s: tuple[float, ...]  # of one microbatch
    memory_bytes: dict[int, int]
    bytes_sent: int


class Pricer:
    """Prices the corners of one search; op times are asked once per (op, kind of device, number of active workers)."""

    def __init__(
        self,
        graph: Graph,
        work: Work,
        cluster: Cluster,
        cost: CostModel,
        *,
        optimizer: str,
        state_bytes_per_element: float,
    ) -> None:
        self._graph, self._work, self._cluster, self._cost = graph, work, cluster, cost
        self._optimizer, self._state_bytes = optimizer, state_bytes_per_element
        self._phase_times: dict[tuple[object, ...], PhaseTimes] = {}
        self._prefixes: dict[tuple[object, ...], tuple[Array, Array]] = {}
        self._least: dict[frozenset[tuple[object, ...]], tuple[float, float, float]] = {}
        self._factors: dict[tuple[object, ...], float] = {}
        self._ends: dict[tuple[object, ...], float] = {}
        self._links: dict[tuple[int, int], tuple[float, float]] = {}
        self._memory_limits = {p.rank: float(p.memory_bytes or np.inf) for p in cluster.processes}
        static = 2 * work.parameter_bytes + state_bytes_per_element * work.parameter_elements
        self._static, self._saved = prefix_sums(static), prefix_sums(work.saved_bytes)

    def bound_s(self, corner: Corner) -> float:
        """Lower bound of the corner's step time for any split of the ops (see the module's docstring); of a corner
        without a pipeline its time."""
        if corner.pipeline == 1:
            group = self._group(corner, 0)
            run_s = corner.num_microbatches * float(group.forward_s[:, -1].max() + group.backward_s[:, -1].max())
            end_s = group.end_s(int(self._work.parameter_elements.sum()), int(self._work.parameter_bytes.sum()))
            return (self._fixed_s(corner) + run_s + end_s) * (1 - _ROUNDING)
        m, count = corner.num_microbatches, corner.pipeline
        kinds = {self._kind_in(corner, worker): worker for worker in corner.workers}
        key = frozenset(kinds)
        if key not in self._least:
            spans = [tuple(map(np.diff, self._prefix_of(corner, worker))) for worker in kinds.values()]
            forward, backward = (np.minimum.reduce(phase) for phase in zip(*spans, strict=True))
            together = np.minimum.reduce([f + b for f, b in spans])
            self._least[key] = float(forward.sum()), float(backward.sum()), float(together.max(initial=0.0))
        forward_s, backward_s, largest_s = self._least[key]
        ahead = m if corner.schedule == "gpipe" else min(m, count)
        path_s = forward_s + backward_s
        steady_s = ((m - 1) * backward_s + (m - ahead) * forward_s) / count
        pipeline_s = max(path_s + steady_s, m * max(path_s / count, largest_s))
        return (self._fixed_s(corner) + pipeline_s) * (1 - _ROUNDING)

    def chain_bound_s(self, corner: Corner) -> float:
        """Lower bound of the corner's step time for contiguous stages that fit their memory; infinity where none do."""
        return self._fixed_s(corner) + self._stage_costs(corner).chain().bound_s()

    def price(self, corner: Corner, stage_starts: tuple[str, ...] | None, worth_s: float = np.inf) -> Price:
        """The best split of the corner; those of a step of at least `worth_s` are not told apart. Raises
        `InfeasibleError` where none fits the memory, or is below `worth_s`, `PlanError` for unknown starts."""
        costs = self._stage_costs(corner)
        if stage_starts is not None:
            found = self._forced(costs, stage_starts)
        else:
            found = best_boundaries(costs, worth_s - self._fixed_s(corner))
            if self._too_much(self._memory(costs, found.starts)) is not None:
                found = self._with_even_memory(costs, found)
        memory = self._memory(costs, found.starts)
        worst = self._too_much(memory)
        if worst is not None:
            limit = self._memory_limits[worst]
            raise InfeasibleError(
                f"The plan must fit the memory of every process, but process {worst} needs "
                f"{format_bytes(memory[worst])} and has "
                f"{format_bytes(limit)}. The smallest change: {format_bytes(memory[worst] - limit)} more memory there, "
                "more stages or microbatches, or a smaller batch."
            )
        times, fixed_s = costs.times(found.starts), self._fixed_s(corner)
        return Price(
            step_time_s=fixed_s + found.makespan_s,
            lower_bound_s=fixed_s + found.lower_bound_s,
            starts=found.starts,
            stage_time_s=tuple(f + b for f, b in zip(times.forward_s, times.backward_s, strict=True)),
            memory_bytes=memory,
            bytes_sent=self._bytes_sent(corner, (0, *found.starts, len(self._work.names))),
        )

    def whole_time_s(self, place: Worker, compiled: bool) -> float:
        """Forward, backward and update of the whole batch as one plain PyTorch block on `place`."""
        key = f"whole:{self._graph.fingerprint}"
        run_s = self._cost.segment_time_s(self._graph.module, key, place, compiled=compiled)
        elements = int(self._work.parameter_elements.sum())
        return run_s + self._cost.update_time_s((elements,), self._optimizer, place)

    def whole_memory_bytes(self) -> int:
        """Peak of plain PyTorch on the whole batch."""
        return block_bytes(self._graph, self._state_bytes)

    def _fixed_s(self, corner: Corner) -> float:
        per_microbatch = 2 if corner.pipeline == 1 else 6
        per_process = max(Counter(worker.process for worker in corner.workers).values())
        num_instructions = per_microbatch * corner.num_microbatches + 2
        return self._cost.step_time_s(per_process) + num_instructions * self._cost.instruction_time_s()

    def _with_even_memory(self, costs: StageCosts, relaxed: Boundaries) -> Boundaries:
        """Several stages in one process, each with an equal share of its memory. What is proven for stages that may
        each take all of it stays proven."""
        hosted = Counter(host.rank for group in costs.groups for host in group.hosts)
        groups = tuple(
            replace(
                group,
                hosts=tuple(replace(host, limit_bytes=host.limit_bytes / hosted[host.rank]) for host in group.hosts),
            )
            for group in costs.groups
        )
        found = best_boundaries(replace(costs, groups=groups))
        return replace(found, lower_bound_s=relaxed.lower_bound_s)

    def _forced(self, costs: StageCosts, names: tuple[str, ...]) -> Boundaries:
        index = {name: place for place, name in enumerate(self._work.names)}
        for name in names:
            if name not in index:
                near = difflib.get_close_matches(name, index, n=1)
                hint = f" The nearest is {near[0]!r}." if near else ""
                raise PlanError(f"stage_starts must name forward ops of the graph, but it has no {name!r}.{hint}")
        starts = tuple(index[name] for name in names)
        makespan_s = costs.makespan_s(starts)
        if makespan_s is None:
            raise InfeasibleError(
                f"stage_starts must be in the graph's order, start after the first op and fit the memory, but got "
                f"{names}."
            )
        return Boundaries(starts=starts, makespan_s=makespan_s, lower_bound_s=makespan_s)

    def _memory(self, costs: StageCosts, starts: Sequence[int]) -> dict[int, int]:
        used: dict[int, float] = defaultdict(float)
        for needs in costs.memory_bytes(starts):
            for process, need in needs.items():
                used[process] += need
        return {process: int(need) for process, need in sorted(used.items())}

    def _too_much(self, memory: dict[int, int]) -> int | None:
        return next((process for process, need in memory.items() if need > self._memory_limits[process]), None)

    def _stage_costs(self, corner: Corner) -> StageCosts:
        return StageCosts(
            work=self._work,
            groups=tuple(self._group(corner, stage) for stage in range(corner.pipeline)),
            num_microbatches=corner.num_microbatches,
            schedule=corner.schedule,
        )

    def _group(self, corner: Corner, stage: int) -> StageGroup:
        workers = _of_stage(corner, stage)
        kinds = {self._kind_in(corner, worker): worker for worker in workers}
        times = [self._prefix_of(corner, worker) for worker in kinds.values()]
        fractions: dict[int, float] = defaultdict(float)
        for worker in workers:
            fractions[worker.process] += self._fraction(corner, worker.data)
        before = _of_stage(corner, stage - 1) if stage else []

        def fraction(data: int) -> float:
            return self._fraction(corner, data)

        ranks = ", ".join(map(str, sorted(fractions)))
        return StageGroup(
            name=f"stage {stage} (process{'es' if len(fractions) > 1 else ''} {ranks})",
            forward_s=np.stack([forward for forward, _ in times]),
            backward_s=np.stack([backward for _, backward in times]),
            static_bytes=self._static,
            saved_bytes=self._saved,
            hosts=tuple(
                Host(rank=rank, fraction=fraction, limit_bytes=self._memory_limits[rank])
                for rank, fraction in fractions.items()
            ),
            link=self._slowest_link(before, workers, fraction),
            back_link=self._slowest_link(workers, before, fraction),
            shared_link=self._slowest_link(workers, _of_stage(corner, stage + 1), lambda data: 1.0),
            end_s=self._end_of(corner, workers),
        )

    def _slowest_link(
        self, source: Sequence[Worker], target: Sequence[Worker], fraction: Callable[[int], float]
    ) -> tuple[float, float]:
        """(latency_s, seconds for a byte) of what the workers of one stage send to those of another, each to the one of
        its coordinates; `fraction` of the bytes by data coordinate."""
        found = [(0.0, 0.0)]
        for one, two in zip(source, target, strict=False):
            latency_s, byte_s = self._link(one, two)
            found.append((latency_s, byte_s * fraction(one.data)))
        return max(latency_s for latency_s, _ in found), max(byte_s for _, byte_s in found)

    def _link(self, source: Worker, target: Worker) -> tuple[float, float]:
        key = (source.process, target.process)
        if key not in self._links:
            latency_s = self._cost.transfer_time_s(0, source, target)
            byte_s = (self._cost.transfer_time_s(_PROBE_BYTES, source, target) - latency_s) / _PROBE_BYTES
            self._links[key] = latency_s, max(byte_s, 0.0)
        return self._links[key]

    def _end_of(self, corner: Corner, workers: Sequence[Worker]) -> Callable[[int, int], float]:
        """Reduction of the stage's gradients and its update, by (elements, bytes) of its parameters."""
        fewest = min(Counter(worker.process for worker in workers).values())
        active = self._active(corner, workers[0].machine)
        kinds = {self._kind(worker): worker for worker in workers}
        group = tuple(workers)
        told = (tuple(kinds), fewest, active, tuple((worker.process, worker.machine) for worker in workers))

        def end_s(elements: int, num_bytes: int) -> float:
            key = (told, elements, num_bytes)
            if key not in self._ends:
                slice_ = (-(-elements // fewest),)
                update_s = max(
                    self._cost.update_time_s(slice_, self._optimizer, worker, num_active=active)
                    for worker in kinds.values()
                )
                reduce_s = self._cost.gradient_sum_time_s(num_bytes, group) if len(group) > 1 else 0.0
                self._ends[key] = update_s + reduce_s
            return self._ends[key]

        return end_s

    def _fraction(self, corner: Corner, data: int) -> float:
        """Rows of the largest microbatch on a data coordinate, relative to the batch."""
        batch = self._graph.batch_size
        if not batch:
            return 1.0
        rows = -(-batch // corner.num_microbatches)
        return proportional(rows, corner.shares)[data] / batch

    def _active(self, corner: Corner, machine: int) -> int:
        at_once = [w for w in corner.workers if w.machine == machine and (corner.num_microbatches > 1 or w.stage == 0)]
        return max(len(at_once), min(corner.data, sum(w.machine == machine for w in corner.workers)), 1)

    def _kind(self, worker: Worker) -> tuple[object, ...]:
        return (worker.machine, len(worker.cores), worker.gpu is not None)

    def _kind_in(self, corner: Corner, worker: Worker) -> tuple[object, ...]:
        """Workers of equal kind take equal times in the corner."""
        active = self._active(corner, worker.machine)
        return (*self._kind(worker), active, self._fraction(corner, worker.data), corner.compiled, corner.tensor)

    def _prefix_of(self, corner: Corner, worker: Worker) -> tuple[Array, Array]:
        """Prefix sums of a worker's forward and backward times for one microbatch. Split over a tensor axis, ops take
        at best an equal part of their time: a bound, which simulation replaces."""
        key = self._kind_in(corner, worker)
        if key not in self._prefixes:
            active, fraction = self._active(corner, worker.machine), self._fraction(corner, worker.data)
            times = self._times(worker, active)
            factor = (self._compiled_factor(worker, active) if corner.compiled else 1.0) / corner.tensor
            self._prefixes[key] = (
                prefix_sums((times.forward_fixed_s + fraction * times.forward_row_s) * factor),
                prefix_sums((times.backward_fixed_s + fraction * times.backward_row_s) * factor),
            )
        return self._prefixes[key]

    def _times(self, worker: Worker, active: int) -> PhaseTimes:
        key = (*self._kind(worker), active)
        if key not in self._phase_times:

            def op_time_s(node: fx.Node) -> float:
                return self._cost.op_time_s(node, worker, num_active=active)

            self._phase_times[key] = self._work.times(op_time_s)
        return self._phase_times[key]

    def _compiled_factor(self, worker: Worker, active: int) -> float:
        """Time of the compiled over the uncompiled step, as the cost model has it for the whole graph."""
        key = (*self._kind(worker), active)
        if key not in self._factors:
            name = f"whole:{self._graph.fingerprint}"
            times = [
                self._cost.segment_time_s(self._graph.module, name, worker, compiled=compiled, num_active=active)
                for compiled in (True, False)
            ]
            self._factors[key] = times[0] / times[1] if times[1] > 0 else 1.0
        return self._factors[key]

    def _bytes_sent(self, corner: Corner, edges: Sequence[int]) -> int:
        by_mesh = {(worker.stage, worker.data): worker for worker in corner.workers if worker.tensor == 0}
        crossing = self._work.there_bytes + self._work.back_bytes
        rows = sum(corner.shares)
        sent = 0.0
        for stage, (low, high) in enumerate(pairwise(edges)):
            processes = len({worker.process for worker in _of_stage(corner, stage)})
            sent += 2 * (processes - 1) * float(self._work.parameter_bytes[low:high].sum()) * self._cost.sent_share
            for data in range(corner.data if stage else 0):
                if by_mesh[stage, data].process != by_mesh[stage - 1, data].process:
                    sent += float(crossing[low]) * (corner.shares[data] / rows if rows else 1.0)
        return int(sent)


def _of_stage(corner: Corner, stage: int) -> list[Worker]:
    return [worker for worker in corner.workers if worker.stage == stage]

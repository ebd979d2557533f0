"""The predicted step time of a corner by the planner's own formula, with the best stage boundaries.

    step = fixed + [sum_s t_s + (m - 1) max_s t_s + transfers] + max_s (r_s + u_s) + instructions

t_s: forward and backward of one microbatch on stage s (worker with the most rows), divided by the tensor axis; r_s:
reduction of the stage's gradients over its data workers; u_s: optimizer on the slice of one worker. The bracket is
minimised exactly by `partita.planner.stages`; r and u follow from its solution. Simulation of the lowered programs,
where the caller offers it, replaces the formula for the best plans.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from partita.cluster.model import Cluster
from partita.cost.memory import block_bytes
from partita.cost.model import CostModel
from partita.errors import InfeasibleError, PlanError
from partita.graph.graph import Graph
from partita.plan import Worker
from partita.planner.bound import pipeline_bound_s
from partita.planner.space import Corner
from partita.planner.stages import Array, StageProblem, StageSolution, evaluate_starts, solve_stages
from partita.planner.work import Work
from partita.units import format_bytes, split_evenly


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a corner costs. `memory_bytes` is per process rank; `time_s` of the bracket is in `solution`."""

    step_time_s: float
    solution: StageSolution
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
        self._op_times: dict[tuple[object, ...], float] = {}
        self._factors: dict[tuple[object, ...], float] = {}
        self._memory_limits = {p.rank: float(p.memory_bytes or np.inf) for p in cluster.processes}

    def bound_s(self, corner: Corner) -> float:
        """Lower bound of the corner's step time (see `partita.planner.bound`)."""
        per_process = max(Counter((w.stage, w.process) for w in corner.workers).values())
        elements = float(self._work.parameter_elements.sum()) / corner.pipeline / per_process
        update_s = min(self._cost.update_time_s((int(elements),), self._optimizer, worker) for worker in corner.workers)
        pipeline_s = pipeline_bound_s(self._stage_times(corner), corner.pipeline, corner.num_microbatches)
        return self._fixed_s(corner) + pipeline_s + update_s * (1 - 1e-12)

    def price(self, corner: Corner, stage_starts: tuple[str, ...] | None) -> Price:
        """The best split of the corner. Raises `InfeasibleError` where none fits the memory, `PlanError` for unknown
        starts."""
        problem = self._problem(corner)
        solution = solve_stages(problem) if stage_starts is None else self._forced(problem, stage_starts)
        memory = self._memory(corner, problem, solution)
        if (
            self._too_much(memory) is not None and stage_starts is None
        ):  # several stages in one process: give each an equal share
            hosted = Counter(worker.process for worker in corner.workers if worker.data == 0)
            shares = [
                limit / max(hosted[self._of_stage(corner, s)[0].process], 1)
                for s, limit in enumerate(problem.limit_bytes)
            ]
            problem = replace(problem, limit_bytes=np.array(shares))
            solution = solve_stages(problem)
            memory = self._memory(corner, problem, solution)
        worst = self._too_much(memory)
        if worst is not None:
            limit = self._memory_limits[worst]
            raise InfeasibleError(
                f"The plan must fit the memory of every process, but process {worst} needs "
                f"{format_bytes(memory[worst])} and has "
                f"{format_bytes(limit)}. The smallest change: {format_bytes(memory[worst] - limit)} more memory there, "
                "more stages or microbatches, or a smaller batch."
            )
        edges = (0, *solution.starts, len(self._work.names))
        end_s = max(self._end_s(corner, s, slice(edges[s], edges[s + 1])) for s in range(corner.pipeline))
        return Price(
            step_time_s=self._fixed_s(corner) + solution.objective_s + end_s,
            solution=solution,
            memory_bytes=memory,
            bytes_sent=self._bytes_sent(corner, edges),
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

    def _static_bytes(self) -> Array:
        return 2 * self._work.parameter_bytes + self._state_bytes * self._work.parameter_elements

    def _fixed_s(self, corner: Corner) -> float:
        per_microbatch = 2 if corner.pipeline == 1 else 6
        per_process = max(Counter(worker.process for worker in corner.workers).values())
        num_instructions = per_microbatch * corner.num_microbatches + 2
        return self._cost.step_time_s(per_process) + num_instructions * self._cost.instruction_time_s()

    def _of_stage(self, corner: Corner, stage: int) -> list[Worker]:
        return [worker for worker in corner.workers if worker.stage == stage]

    def _fraction(self, corner: Corner) -> float:
        """Rows of a microbatch of the fullest worker, relative to the batch."""
        batch = self._graph.batch_size
        if not batch:
            return 1.0
        return -(-split_evenly(batch, corner.data)[0] // corner.num_microbatches) / batch

    def _active(self, corner: Corner, machine: int) -> int:
        at_once = [w for w in corner.workers if w.machine == machine and (corner.num_microbatches > 1 or w.stage == 0)]
        return max(len(at_once), min(corner.data, sum(w.machine == machine for w in corner.workers)), 1)

    def _stage_times(self, corner: Corner) -> Array:
        rows = []
        for stage in range(corner.pipeline):
            kinds = {self._kind(worker): worker for worker in self._of_stage(corner, stage)}
            rows.append(np.max([self._worker_times(corner, worker) for worker in kinds.values()], axis=0))
        return np.array(rows)

    def _kind(self, worker: Worker) -> tuple[object, ...]:
        return (worker.machine, len(worker.cores), worker.gpu is not None)

    def _worker_times(self, corner: Corner, worker: Worker) -> Array:
        active = self._active(corner, worker.machine)
        kind = (*self._kind(worker), active)

        def op_time_s(node: fx.Node) -> float:
            key = (node.name, *kind)
            if key not in self._op_times:
                self._op_times[key] = self._cost.op_time_s(node, worker, num_active=active)
            return self._op_times[key]

        floor_s = min((time_s for node in self._work.nodes if (time_s := op_time_s(node)) > 0), default=0.0)
        # Split over a tensor axis, ops take at best an equal part of their time: a bound, which simulation replaces.
        times = self._work.times(op_time_s, self._fraction(corner), floor_s) / corner.tensor
        return times * self._compiled_factor(worker, active) if corner.compiled else times

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

    def _problem(self, corner: Corner) -> StageProblem:
        fraction, stages = self._fraction(corner), corner.pipeline
        transfer = np.zeros((stages, len(self._work.names)))
        memory, limits = np.zeros_like(transfer), np.zeros(stages)
        for stage in range(stages):
            workers = self._of_stage(corner, stage)
            if stage:
                transfer[stage] = self._transfers(self._of_stage(corner, stage - 1)[0], workers[0], fraction)
            in_flight = (
                min(corner.num_microbatches, stages - stage) if corner.schedule == "1f1b" else corner.num_microbatches
            )
            together = max(Counter(worker.process for worker in workers).values())
            memory[stage] = self._static_bytes() + self._work.saved_bytes * fraction * in_flight * together
            limits[stage] = min(self._memory_limits[worker.process] for worker in workers)
        return StageProblem(
            time_s=self._stage_times(corner),
            transfer_s=transfer,
            memory_bytes=memory,
            limit_bytes=limits,
            num_microbatches=corner.num_microbatches,
        )

    def _transfers(self, source: Worker, target: Worker, fraction: float) -> Array:
        sizes, index = np.unique((self._work.crossing_bytes * fraction).astype(np.int64), return_inverse=True)
        return np.array([self._cost.transfer_time_s(int(size), source, target) for size in sizes])[index]

    def _forced(self, problem: StageProblem, names: tuple[str, ...]) -> StageSolution:
        index = {name: place for place, name in enumerate(self._work.names)}
        for name in names:
            if name not in index:
                near = difflib.get_close_matches(name, index, n=1)
                hint = f" The nearest is {near[0]!r}." if near else ""
                raise PlanError(f"stage_starts must name forward ops of the graph, but it has no {name!r}.{hint}")
        solution = evaluate_starts(problem, tuple(index[name] for name in names))
        if solution is None:
            raise InfeasibleError(
                f"stage_starts must be in the graph's order, start after the first op and fit the memory, but got "
                f"{names}."
            )
        return solution

    def _memory(self, corner: Corner, problem: StageProblem, solution: StageSolution) -> dict[int, int]:
        edges = (0, *solution.starts, len(self._work.names))
        used: dict[int, float] = defaultdict(float)
        for stage in range(corner.pipeline):
            need = float(problem.memory_bytes[stage, edges[stage] : edges[stage + 1]].sum())
            for process in {worker.process for worker in self._of_stage(corner, stage)}:
                used[process] += need
        return {process: int(need) for process, need in sorted(used.items())}

    def _too_much(self, memory: dict[int, int]) -> int | None:
        return next((process for process, need in memory.items() if need > self._memory_limits[process]), None)

    def _end_s(self, corner: Corner, stage: int, ops: slice) -> float:
        """Reduction of the stage's gradients and its update."""
        workers = self._of_stage(corner, stage)
        elements = int(self._work.parameter_elements[ops].sum())
        fewest = min(Counter(worker.process for worker in workers).values())
        active = self._active(corner, workers[0].machine)
        update_s = max(
            self._cost.update_time_s((-(-elements // fewest),), self._optimizer, w, num_active=active) for w in workers
        )
        if len(workers) == 1:
            return update_s
        group: tuple[Worker, ...] = tuple(workers)
        return update_s + self._cost.collective_time_s("all_reduce", int(self._work.parameter_bytes[ops].sum()), group)

    def _bytes_sent(self, corner: Corner, edges: tuple[int, ...]) -> int:
        by_mesh = {(worker.stage, worker.data): worker for worker in corner.workers if worker.tensor == 0}
        sent = 0.0
        for stage in range(corner.pipeline):
            processes = len({worker.process for worker in self._of_stage(corner, stage)})
            sent += 2 * (processes - 1) * float(self._work.parameter_bytes[edges[stage] : edges[stage + 1]].sum())
            for data in range(corner.data if stage else 0):
                if by_mesh[stage, data].process != by_mesh[stage - 1, data].process:
                    sent += float(self._work.crossing_bytes[edges[stage]]) / corner.data
        return int(sent)

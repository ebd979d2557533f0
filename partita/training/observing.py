"""What the segments and updates of a plan take in real steps, and what the plan is predicted to take with that.

A plan is chosen by the times of single ops; of compiled segments, which fuse ops and find in the caches what the one
before has left, these say too little. The steps that train with the plan are the best measurement there is, and cost
nothing: their times replace those of the ops, and the simulator adds what lies between the segments as before.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from partita.cluster import Cluster
from partita.cost.sums import EXACT_SUM, SumCost
from partita.cost.table import CostTable
from partita.plan import Plan
from partita.program.instructions import ProgramSet, Run, Update
from partita.program.timeline import Timeline
from partita.simulator import activity, simulate
from partita.training.job import Team
from partita.training.optimizers import OptimizerFacts

Key = str | tuple[int, ...]  # of a segment, or the sizes of the slices of an update


def observed_plan(
    plan: Plan,
    programs: ProgramSet,
    timelines: Sequence[Timeline],
    cluster: Cluster,
    facts: OptimizerFacts,
    team: Team,
    sums: SumCost = EXACT_SUM,
) -> Plan:
    """The plan with the step time that is predicted from its own segments and updates.

    Args:
        plan: what made the steps.
        programs: its programs.
        timelines: of this process in these steps.
        cluster: of the job.
        facts: of the user's optimizer.
        team: all processes of the job, which make the same call.
        sums: what sums of gradients cost between processes.
    """
    own = msgspec.json.encode(timelines).decode()
    everywhere = [
        msgspec.json.decode(text, type=list[Timeline])
        for text in team.gather(own, "what the adopted plan's segments take")
    ]
    found: Plan = plan
    if team.rank == 0 and plan.prediction is not None:
        cost = CostTable(cluster, sums=sums)
        steps = [_joined(parts) for parts in zip(*everywhere, strict=True)]
        keep(cost, plan, programs, steps, facts.name)
        outcome = simulate(programs, plan, cost, optimizer=facts.name, update_values=facts.update_values)
        prediction = msgspec.structs.replace(
            plan.prediction, step_time_s=outcome.step_time_s, uncertainty=cost.refined_uncertainty
        )
        reason = f"its step time is predicted from what its parts took in {len(steps)} of its own steps"
        found = msgspec.structs.replace(plan, prediction=prediction, reasons=(*plan.reasons, reason))
    return Plan.from_json(team.from_first(found.to_json()))


def _joined(parts: Sequence[Timeline]) -> Timeline:
    """One step's events of all processes; each counts from its own start of the step."""
    events = sorted((event for part in parts for event in part.events), key=lambda event: (event.start_s, event.worker))
    return Timeline(events=tuple(events), step_time_s=max(part.step_time_s for part in parts))


def keep(cost: CostTable, plan: Plan, programs: ProgramSet, steps: Iterable[Timeline], optimizer: str) -> None:
    """From now on, segments and updates take what they took in these steps: the median over the steps of the slowest
    worker of a stage, for which the others wait."""
    times: dict[Key, list[float]] = defaultdict(list)
    actives: dict[Key, list[float]] = defaultdict(list)
    for step in steps:
        for key, (time_s, active) in _of_step(step, plan, programs).items():
            times[key].append(max(time_s - cost.instruction_time_s(), 0.0))
            actives[key].append(active)
    threads = len(plan.workers[0].cores) or 1
    for key, values in times.items():
        time_s, active = statistics.median(values), statistics.median(actives[key])
        if isinstance(key, str):
            cost.keep_segment_time(key, time_s, num_threads=threads, compiled=plan.compiled, num_active=active)
        else:
            cost.keep_update_time(key, optimizer, time_s, num_threads=threads, num_active=active)


def _of_step(step: Timeline, plan: Plan, programs: ProgramSet) -> dict[Key, tuple[float, float]]:
    """By segment or update: seconds, and how many workers of the machine computed meanwhile."""
    instructions = {program.worker: program.instructions for program in programs.programs}
    num_active = activity(step, plan)
    runs: dict[Key, dict[int, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    actives: dict[Key, list[float]] = defaultdict(list)
    for event in step.events:
        instruction = instructions[event.worker][event.index]
        if isinstance(instruction, Run):
            key: Key = instruction.segment
        elif isinstance(instruction, Update):
            key = tuple(part.num_elements for part in instruction.slices)
        else:
            continue
        runs[key][plan.workers[event.worker].stage][event.worker].append(event.time_s)
        actives[key].append(num_active[event.worker, event.index])
    return {key: (_slowest_s(by_stage), statistics.fmean(actives[key])) for key, by_stage in runs.items()}


def _slowest_s(by_stage: dict[int, dict[int, list[float]]]) -> float:
    """A worker's mean over its microbatches; of these the slowest of a stage; of these the mean over the stages."""
    return statistics.fmean(
        max(statistics.fmean(times_s) for times_s in workers.values()) for workers in by_stage.values()
    )

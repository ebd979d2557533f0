"""What a pipeline of stages costs and which constraints it breaks, straight from the definition in `piper_problem`.

No solver's arithmetic is used here, and every solution passes through here before it is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.planner.placement.piper_problem import PiperProblem, Stage, Way


@dataclass(frozen=True, kw_only=True)
class PricedPipeline:
    stage_time_s: tuple[float, ...]  # for one sample
    stage_memory_bytes: tuple[float, ...]  # of one device
    objective_s: float  # the largest stage time
    broken: tuple[str, ...]  # constraints that do not hold, one sentence each


def price_pipeline(problem: PiperProblem, stages: Sequence[Stage]) -> PricedPipeline:
    """Price stages in the order of the pipeline."""
    times, memories = [], []
    for i, stage in enumerate(stages):
        behind = sum(later.data_degree for later in stages[i:])
        in_flight = -(-behind // stage.data_degree)
        ways = _ways(problem, stage)
        memories.append(
            sum(way.memory_per_microbatch_bytes * in_flight + way.memory_fixed_bytes for way in ways.values())
        )
        times.append(_time_s(problem, stage, ways))
    return PricedPipeline(
        stage_time_s=tuple(times),
        stage_memory_bytes=tuple(memories),
        objective_s=max(times, default=0.0),
        broken=tuple(_broken(problem, stages, memories)),
    )


def _ways(problem: PiperProblem, stage: Stage) -> dict[int, Way]:
    return {
        layer: problem.layers[layer].ways[stage.tensor_degree][way]
        for layer, way in zip(stage.layers, stage.ways, strict=True)
    }


def _time_s(problem: PiperProblem, stage: Stage, ways: dict[int, Way]) -> float:
    degree = stage.data_degree
    moved_bytes = 0.0
    for tail, head, edge_bytes in problem.edges:
        if head in ways and tail not in ways:
            moved_bytes += 2 * (edge_bytes + ways[head].sync_in_bytes[tail]) / degree
        if tail in ways and head not in ways:
            moved_bytes += 2 * (edge_bytes + ways[tail].sync_out_bytes[head]) / degree
    for way in ways.values():
        moved_bytes += 4 * (degree - 1) * way.weight_bytes / (degree * problem.num_microbatches)
    return sum(way.time_s for way in ways.values()) / degree + moved_bytes / problem.bandwidth_bytes_per_s


def _broken(problem: PiperProblem, stages: Sequence[Stage], memories: Sequence[float]) -> list[str]:
    broken = []
    stage_of = {layer: i for i, stage in enumerate(stages) for layer in stage.layers}
    placed = sum(len(stage.layers) for stage in stages)
    if placed != len(problem.layers) or len(stage_of) != placed:
        broken.append(f"{len(problem.layers)} layers must be in one stage each, but the stages hold {placed}")
    for tail, head, _ in problem.edges:
        if stage_of.get(tail, 0) > stage_of.get(head, len(stages)):
            broken.append(f"the edge {problem.layers[tail].id} - {problem.layers[head].id} goes to an earlier stage")
    num_devices = sum(stage.data_degree * stage.tensor_degree for stage in stages)
    if num_devices > problem.num_devices:
        broken.append(f"the stages use {num_devices} devices of {problem.num_devices}")
    if sum(stage.data_degree for stage in stages) > problem.num_microbatches:
        broken.append(f"the data degrees sum to more than the {problem.num_microbatches} microbatches")
    for i, (stage, memory_bytes) in enumerate(zip(stages, memories, strict=True)):
        if problem.num_microbatches % stage.data_degree:
            broken.append(f"data degree {stage.data_degree} of stage {i} does not divide {problem.num_microbatches}")
        if memory_bytes > problem.limit_bytes:
            broken.append(f"stage {i} needs {memory_bytes:g} bytes, but the limit is {problem.limit_bytes:g}")
    return broken

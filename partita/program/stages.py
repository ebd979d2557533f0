"""Which stage every node of a local graph runs on.

Forward ops follow the cuts of the plan in the captured graph's order. A backward op runs where the values are that the
forward phase kept for it, and never on a later stage than the gradients that it reads come from. Ops that
depend on parameters, constants and factories alone are *free*: every stage that needs one computes it itself.

Random draws that depend on data (others are made before the step) follow one another in one stream, as in plain
PyTorch. They all run on one stage, the latest that the cuts give any of them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from partita.errors import PlanError
from partita.graph.graph import Graph, Input, OpInfo, Phase
from partita.graph.homes import free_nodes, homes, least_places
from partita.graph.randomness import is_random


@dataclass(frozen=True)
class Staging:
    """Stage and phase of every op node by name; `free` nodes have no stage of their own."""

    num_stages: int
    stage: Mapping[str, int]
    phase: Mapping[str, Phase]
    free: frozenset[str]


class StageCuts:
    """The plan's cuts as a function from the captured graph's nodes to stages.

    Raises:
        PlanError: a cut names no forward op of the graph, or the cuts are not in the graph's order.
    """

    def __init__(self, graph: Graph, stage_starts: Sequence[str]) -> None:
        order = {node.name: index for index, node in enumerate(graph.nodes)}
        for name in stage_starts:
            if name not in order:
                raise PlanError(
                    f"every stage must start at an op of the graph, but there is no op {name!r}; "
                    "the plan was made for another model, loss or batch shape"
                )
        self._cuts = [order[name] for name in stage_starts]
        if self._cuts != sorted(set(self._cuts)):
            raise PlanError(f"stage_starts must be in the graph's order without repeats, but got {list(stage_starts)}")
        self._order = order
        self.num_stages = len(stage_starts) + 1

    def stage_of(self, origin: str) -> int:
        position = self._order.get(origin, 0)
        return sum(position >= cut for cut in self._cuts)


def assign_stages(
    module: fx.GraphModule, cuts: StageCuts, inputs: Mapping[str, Input], gradients: Mapping[str, str]
) -> Staging:
    """Stages of one local graph. `inputs` describes its placeholders by name (those of the captured graph); `gradients`
    maps the nodes that give a parameter's gradient to the parameter's placeholder: they run where it is read first."""
    phase = _phases(module)
    free = free_nodes(module.graph.nodes, inputs)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    forward = [node for node in nodes if phase[node.name] is Phase.FORWARD and node.name not in free]
    stage = _forward_stages(forward, cuts, 0)
    drawing = {stage[node.name] for node in forward if is_random(node)}
    if len(drawing) > 1:
        stage = _forward_stages(forward, cuts, max(drawing))
    home = homes(module.graph.nodes, stage, free)
    least = least_places((node for node in nodes if phase[node.name] is Phase.BACKWARD), gradients, home)
    for node in nodes:
        if phase[node.name] is Phase.BACKWARD and node.name not in free:
            if node.target is operator.getitem:
                stage[node.name] = stage[node.args[0].name]
                continue
            found = _backward_stage(node, stage, home, phase, cuts.num_stages, least.get(node.name, 0))
            stage[node.name] = min(found, home.get(gradients.get(node.name, ""), found))
    _check_draws(nodes, stage)
    return Staging(cuts.num_stages, stage, phase, free)


def _forward_stages(forward: Sequence[fx.Node], cuts: StageCuts, least_of_draws: int) -> dict[str, int]:
    """Ops that draw random numbers run on stage `least_of_draws` or later, all others where the cuts put them, but no
    op before what it reads."""
    stage: dict[str, int] = {}
    for node in forward:
        before = [stage[item.name] for item in node.all_input_nodes if item.name in stage]
        own = 0 if node.target is operator.getitem else cuts.stage_of(node.meta.get("origin", node.name))
        stage[node.name] = max([own, *before, least_of_draws if is_random(node) else 0])
    return stage


def _check_draws(nodes: Sequence[fx.Node], stage: Mapping[str, int]) -> None:
    """Draws that depend on data continue one stream of random numbers, which only one worker at a time can have."""
    places = {stage[node.name]: node.name for node in nodes if is_random(node) and node.name in stage}
    if len(places) > 1:
        first, last = min(places), max(places)
        raise PlanError(
            f"all ops that draw random numbers which depend on data must run on one stage, but {places[first]!r} runs "
            f"on stage {first} and {places[last]!r} in the backward phase of stage {last}; use pipeline=1"
        )


def _phases(module: fx.GraphModule) -> dict[str, Phase]:
    phase: dict[str, Phase] = {}
    for node in module.graph.nodes:
        info = node.meta.get("op")
        backward = isinstance(info, OpInfo) and info.phase is Phase.BACKWARD
        backward = backward or any(phase.get(item.name) is Phase.BACKWARD for item in node.all_input_nodes)
        phase[node.name] = Phase.BACKWARD if backward and node.op == "call_function" else Phase.FORWARD
    return phase


def _backward_stage(
    node: fx.Node,
    stage: Mapping[str, int],
    home: Mapping[str, int],
    phase: Mapping[str, Phase],
    num_stages: int,
    least: int,
) -> int:
    kept: list[int] = []
    gradients: list[int] = []
    for item in node.all_input_nodes:
        if phase[item.name] is Phase.BACKWARD and item.name in stage:
            gradients.append(stage[item.name])
        elif item.name in stage:
            kept.append(stage[item.name])
        elif item.name in home:
            kept.append(home[item.name])
    limit = min(gradients, default=num_stages - 1)
    return min(max(*kept, least), limit) if kept else limit

"""The tasks of one local graph: per stage and phase, its levels, what it receives and what it sends."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import fx

from partita.graph.graph import Graph, OutputKind, Phase
from partita.graph.torch_adapter import module_of
from partita.program.buckets import Bucket, buckets_of
from partita.program.segments import Level, SegmentStore, common_levels, cut_task, is_exchange
from partita.program.stages import StageCuts, Staging, assign_stages

Phases = tuple[Phase, ...]
BOTH: Phases = (Phase.FORWARD, Phase.BACKWARD)


@dataclass(frozen=True)
class Transfer:
    """A value that goes from one stage to another, for tasks of `phase` there."""

    node: fx.Node
    source: int
    target: int
    phase: Phase


@dataclass(frozen=True)
class LocalTasks:
    """Everything that lowering needs to know of one local graph.

    `levels[stage, phases]` are the levels of a task; `receives` / `sends` its transfers, with sends keyed by the phase
    that produces the value. `results[i]` is the node of output i, `result_stage[i]` the stage that has it.
    """

    module: fx.GraphModule
    nodes: Mapping[str, fx.Node]
    staging: Staging
    levels: Mapping[tuple[int, Phases], tuple[Level, ...]]
    receives: Mapping[tuple[int, Phases], tuple[Transfer, ...]]
    sends: Mapping[tuple[int, Phases], tuple[Transfer, ...]]
    results: tuple[fx.Node, ...]
    result_stage: tuple[int, ...]
    buckets: tuple[Bucket, ...] = ()


@dataclass(frozen=True)
class _Staged:
    """A local graph whose ops have found their stages."""

    module: fx.GraphModule
    staging: Staging
    members: Mapping[tuple[int, Phase], set[fx.Node]]
    results: tuple[fx.Node, ...]

    def nodes_of(self, stage: int, phases: Phases) -> list[fx.Node]:
        """The ops of one task, in order."""
        groups = [self.members[stage, phase] for phase in phases]
        return [node for node in self.module.graph.nodes if any(node in group for group in groups)]


def build_tasks(
    graph: Graph,
    modules: Sequence[fx.GraphModule],
    cuts: StageCuts,
    merged: Sequence[bool],
    store: SegmentStore,
    *,
    in_buckets: bool = False,
    bucket_bytes: int = 0,
) -> list[LocalTasks]:
    """Builds the tasks of the local graphs of one job, whose exchanges all come in one order. `merged[stage]`: forward
    and backward of the stage run as one task; where that is the whole step, `in_buckets` has gradients released while
    it runs, in buckets of `bucket_bytes` (0: of the size that `buckets_of` chooses)."""
    staged = [_stage(graph, module, cuts) for module in modules]
    common: dict[tuple[int, Phases], dict[str, int]] = {}
    if len(staged) > 1:
        _share_exchanges(staged)
        for stage in range(cuts.num_stages):
            for phases in _task_phases(merged[stage]):
                common[stage, phases] = common_levels([item.nodes_of(stage, phases) for item in staged])
    buckets: tuple[Bucket, ...] = ()
    if in_buckets and tuple(merged) == (True,):
        tasks = [item.nodes_of(0, BOTH) for item in staged]
        buckets = buckets_of(
            graph, tasks, [item.results for item in staged], common.get((0, BOTH), {}), bucket_bytes=bucket_bytes
        )
    releases = [[(bucket.level, bucket.after[place]) for bucket in buckets] for place in range(len(staged))]
    return [
        _local_tasks(item, cuts.num_stages, merged, common, store, buckets, cut)
        for item, cut in zip(staged, releases, strict=True)
    ]


def _task_phases(merged: bool) -> list[Phases]:
    return [BOTH] if merged else [(Phase.FORWARD,), (Phase.BACKWARD,)]


def _stage(graph: Graph, module: fx.GraphModule, cuts: StageCuts) -> _Staged:
    module = with_plain_results(module)
    inputs = {item.node: item for item in graph.inputs}
    staging = assign_stages(module, cuts, inputs, _gradient_homes(graph, module))
    results: tuple[fx.Node, ...] = tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]
    return _Staged(module, staging, _members(module, staging, results), results)


def _local_tasks(
    staged: _Staged,
    num_stages: int,
    merged: Sequence[bool],
    common: Mapping[tuple[int, Phases], Mapping[str, int]],
    store: SegmentStore,
    buckets: tuple[Bucket, ...],
    releases: Sequence[tuple[int, int]],
) -> LocalTasks:
    module, staging, members, results = staged.module, staged.staging, staged.members, staged.results
    transfers = _transfers(members, staging)
    levels: dict[tuple[int, Phases], tuple[Level, ...]] = {}
    receives: dict[tuple[int, Phases], list[Transfer]] = defaultdict(list)
    sends: dict[tuple[int, Phases], list[Transfer]] = defaultdict(list)
    for stage in range(num_stages):
        for phases in _task_phases(merged[stage]):
            nodes = staged.nodes_of(stage, phases)
            inside = set(nodes)
            sent = {transfer.node for transfer in transfers if transfer.source == stage}
            later = {node.name: node in sent or _read_outside(node, inside, members, stage) for node in nodes}
            own_results = [node for node in results if _stage_of_result(node, staging) == stage]
            levels[stage, phases] = cut_task(nodes, later, own_results, store, common.get((stage, phases)), releases)
            receives[stage, phases] += [t for t in transfers if t.target == stage and t.phase in phases]
            sends[stage, phases] += [t for t in transfers if t.source == stage and t.node in inside]
    return LocalTasks(
        module=module,
        nodes={node.name: node for node in module.graph.nodes},
        staging=staging,
        levels=levels,
        receives={key: tuple(value) for key, value in receives.items()},
        sends={key: tuple(value) for key, value in sends.items()},
        results=results,
        result_stage=tuple(_stage_of_result(node, staging) for node in results),
        buckets=buckets,
    )


_PLAIN: WeakKeyDictionary[fx.GraphModule, fx.GraphModule] = WeakKeyDictionary()


def with_plain_results(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every output is a node of its own that is neither an exchange nor a placeholder. Made once: plans
    of one split share it, and only read it."""
    if module not in _PLAIN:
        _PLAIN[module] = _with_plain_results(module)
    return _PLAIN[module]


def _with_plain_results(module: fx.GraphModule) -> fx.GraphModule:
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            break
        mapping[node] = new.node_copy(node, mapping.__getitem__)
        mapping[node].meta = dict(node.meta)
    seen: set[fx.Node] = set()
    results: list[fx.Node] = []
    for original in module.graph.output_node().args[0]:  # type: ignore[union-attr]
        node = mapping[original]  # type: ignore[index]
        if node.op == "placeholder" or is_exchange(node) or node in seen:
            copied = new.call_function(torch.ops.aten.clone.default, (node,))
            copied.meta = {key: node.meta[key] for key in ("val", "origin") if key in node.meta}
            node = copied
        seen.add(node)
        results.append(node)
    new.output(tuple(results))
    return module_of(new)


def _gradient_homes(graph: Graph, module: fx.GraphModule) -> dict[str, str]:
    """Node that computes a parameter's gradient -> the parameter's placeholder."""
    placeholder = {item.name: item.node for item in graph.inputs}
    homes: dict[str, str] = {}
    results: Sequence[fx.Node] = module.graph.output_node().args[0]  # type: ignore[assignment]
    for output, node in zip(graph.outputs, results, strict=True):
        if output.kind is OutputKind.GRADIENT:
            while node.target is operator.getitem:
                node = node.args[0]  # type: ignore[assignment]
            homes.setdefault(node.name, placeholder[output.target])
    return homes


def _stage_of_result(node: fx.Node, staging: Staging) -> int:
    """Results that depend on no data belong to the last stage."""
    return staging.stage.get(node.name, staging.num_stages - 1)


def _share_exchanges(staged: Sequence[_Staged]) -> None:
    """An exchange runs on the same stages on all workers of its axis: also where a worker does not read what comes of
    it, or where what it brings is free of data (zeros in the place of a summand)."""
    wanted: dict[tuple[int, Phase], set[str]] = defaultdict(set)
    for item in staged:
        for key, group in item.members.items():
            wanted[key] |= {node.name for node in group if is_exchange(node)}
    for item in staged:
        for (stage, phase), names in wanted.items():
            for node in item.module.graph.nodes:
                if node.name in names and node.name in item.staging.free:
                    _add(node, item.staging, dict.fromkeys(BOTH, item.members[stage, phase]))


def _add(node: fx.Node, staging: Staging, groups: Mapping[Phase, set[fx.Node]]) -> None:
    """Adds a node and the free ones that it needs, each to the group of its phase."""
    group = groups[staging.phase[node.name]]
    if node.op != "call_function" or node in group:
        return
    group.add(node)
    for source in node.all_input_nodes:
        if source.name in staging.free:
            _add(source, staging, groups)


def _members(
    module: fx.GraphModule, staging: Staging, results: Sequence[fx.Node]
) -> dict[tuple[int, Phase], set[fx.Node]]:
    """Op nodes of each (stage, phase), the free ones included wherever the stage needs them."""
    members: dict[tuple[int, Phase], set[fx.Node]] = {
        (stage, phase): set() for stage in range(staging.num_stages) for phase in BOTH
    }

    def add(node: fx.Node, stage: int) -> None:
        _add(node, staging, {phase: members[stage, phase] for phase in BOTH})

    for node in module.graph.nodes:
        if node.name in staging.stage:
            add(node, staging.stage[node.name])
    for node in results:
        if node.name in staging.free:
            add(node, _stage_of_result(node, staging))
    return members


def _transfers(members: Mapping[tuple[int, Phase], set[fx.Node]], staging: Staging) -> list[Transfer]:
    """Values read on another stage than theirs: each once per target stage, for the first phase there that reads it."""
    found: dict[tuple[fx.Node, int], Transfer] = {}
    for phase in BOTH:
        for stage in range(staging.num_stages):
            for node in sorted(members[stage, phase], key=lambda item: item.name):
                for item in node.all_input_nodes:
                    source = staging.stage.get(item.name)
                    if source is not None and source != stage:
                        found.setdefault((item, stage), Transfer(item, source, stage, phase))
    return sorted(found.values(), key=lambda item: (item.source, item.target, item.phase.value, item.node.name))


def _read_outside(
    node: fx.Node, inside: set[fx.Node], members: Mapping[tuple[int, Phase], set[fx.Node]], stage: int
) -> bool:
    """Whether another task of the same stage reads the node."""
    return any(user not in inside and any(user in members[stage, phase] for phase in BOTH) for user in node.users)

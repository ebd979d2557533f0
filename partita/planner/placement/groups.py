"""Operators contracted into groups that share a device, as arrays.

A *net* is an operator's output: its pins are the groups of the operator and of its readers. With S the groups of one
accelerator, a net costs that accelerator its c exactly if S holds some but not all of its pins: the producer pays if a
reader is elsewhere, a reader pays if the producer is elsewhere. Hence nets with equal pins are one net with the sum of
their costs, and nets with one pin or without cost disappear.

Contractions that lose nothing:
  colour classes share a device by definition;
  a *leaf* u with a single neighbour group v, no CPU latency, and p_u at most the cost of the net between them: moving u
  to v's device raises no load (the sizes must be harmless: all of them together fit one accelerator, or u has none);
  an *expensive* net, c >= B, in the search for a largest load below B: an accelerator that it touches would pay c, so
  it is cut only between CPU cores, which one core, or a pin with q >= B, rules out.

The *order* graph is for pipelines, where devices follow each other: u before v for edges between forward operators, and
for backward operators v before u (`mirrored`) or u before v, as a file has it. Groups on its cycles are one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partita.planner.placement.problem import PlacementProblem

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A contracted problem with G groups: latencies and sizes have one entry a group."""

    problem: PlacementProblem
    labels: tuple[int, ...]  # the group of each operator
    accelerator_latency: Array
    cpu_latency: Array
    size_bytes: Array
    pins: tuple[tuple[int, ...], ...]  # of each net, ascending, at least two
    costs: Array  # of each net
    before: tuple[tuple[int, int], ...]  # edges of the order graph; empty for a problem without order

    @property
    def num_groups(self) -> int:
        return len(self.size_bytes)

    def devices_of_operators(self, devices: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(devices[label]) for label in self.labels)

    def groups_of_operators(self, devices: Sequence[int]) -> list[int]:
        """The inverse: a device for each group, from operators that agree within each."""
        found = [0] * self.num_groups
        for label, device in zip(self.labels, devices, strict=True):
            found[label] = device
        return found


def contract_colors(problem: PlacementProblem) -> Groups:
    """One group for each colour class and each operator without one, less the leaves that lose nothing."""
    first: dict[int, int] = {}
    pairs = [
        (i, first.setdefault(operator.color, i))
        for i, operator in enumerate(problem.operators)
        if operator.color is not None
    ]
    groups = _grouped(problem, _labels(len(problem.operators), pairs))
    while leaves := _leaves(groups):
        groups = merged(groups, leaves)
    return groups


def merged(groups: Groups, pairs: Iterable[tuple[int, int]]) -> Groups:
    """With both groups of each pair made one; the result has no order."""
    labels = _labels(groups.num_groups, pairs)
    return _grouped(groups.problem, [labels[label] for label in groups.labels])


def merge_expensive(groups: Groups, bound: float) -> Groups:
    """Without the nets that no assignment below `bound` cuts."""
    pairs = []
    for pins, cost in zip(groups.pins, groups.costs, strict=True):
        fixed = groups.problem.num_cpus <= 1 or any(groups.cpu_latency[pin] >= bound for pin in pins)
        if cost >= bound and fixed:
            pairs += [(pins[0], pin) for pin in pins[1:]]
    return merged(groups, pairs) if pairs else groups


def both_orders(groups: Groups) -> list[tuple[bool, Groups]]:
    """(mirrored, groups with that order graph), the one with more groups first; one where they are the same."""
    found = [(mirrored, ordered(groups, mirrored)) for mirrored in (True, False)]
    found.sort(key=lambda order: -order[1].num_groups)
    return found[:1] if found[0][1].before == found[1][1].before else found


def ordered(groups: Groups, mirrored: bool) -> Groups:
    """With the order graph, its cycles contracted."""
    before = _order(groups.problem, groups.labels, mirrored)
    component = strong_components(groups.num_groups, before)
    labels = [component[label] for label in groups.labels]
    contracted = _grouped(groups.problem, labels)
    edges = _order(groups.problem, contracted.labels, mirrored)
    return Groups(**{**vars(contracted), "before": edges})


def _order(problem: PlacementProblem, labels: Sequence[int], mirrored: bool) -> tuple[tuple[int, int], ...]:
    edges = set()
    for tail, head in problem.edges:
        backward = problem.operators[tail].is_backward
        if backward == problem.operators[head].is_backward and labels[tail] != labels[head]:
            turned = backward and mirrored
            edges.add((labels[head], labels[tail]) if turned else (labels[tail], labels[head]))
    return tuple(sorted(edges))


def _labels(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Numbers 0, 1, ... for the classes that `pairs` join, in the order of their first members."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(count)]


def _grouped(problem: PlacementProblem, labels: Sequence[int]) -> Groups:
    numbers: dict[int, int] = {}
    labels = [numbers.setdefault(label, len(numbers)) for label in labels]
    sums = np.zeros((3, len(numbers)))
    readers: list[set[int]] = [set() for _ in problem.operators]
    for tail, head in problem.edges:
        readers[tail].add(labels[head])
    nets: dict[tuple[int, ...], float] = {}
    for label, operator, heads in zip(labels, problem.operators, readers, strict=True):
        sums[:, label] += (operator.accelerator_latency, operator.cpu_latency, operator.size_bytes)
        pins = tuple(sorted(heads | {label}))
        if len(pins) > 1 and operator.transfer_latency > 0:
            nets[pins] = nets.get(pins, 0.0) + operator.transfer_latency
    return Groups(
        problem=problem,
        labels=tuple(labels),
        accelerator_latency=sums[0],
        cpu_latency=sums[1],
        size_bytes=sums[2],
        pins=tuple(nets),
        costs=np.array(list(nets.values())),
        before=(),
    )


def _leaves(groups: Groups) -> list[tuple[int, int]]:
    """(leaf, its only neighbour), no neighbour being itself in another pair."""
    loose = groups.size_bytes.sum() <= groups.problem.limit_bytes
    neighbours: list[set[int]] = [set() for _ in range(groups.num_groups)]
    for tail, head in groups.problem.edges:
        a, b = groups.labels[tail], groups.labels[head]
        if a != b:
            neighbours[a].add(b)
            neighbours[b].add(a)
    touching = np.zeros(groups.num_groups)
    for pins, cost in zip(groups.pins, groups.costs, strict=True):
        touching[list(pins)] += cost if len(pins) == 2 else 0.0
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for leaf, others in enumerate(neighbours):
        harmless = loose or groups.size_bytes[leaf] == 0
        if len(others) != 1 or not harmless or groups.cpu_latency[leaf] > 0:
            continue
        (other,) = others
        if groups.accelerator_latency[leaf] <= touching[leaf] and not {leaf, other} & used:
            pairs.append((leaf, other))
            used.add(leaf)
    return pairs


def strong_components(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The number of the strongly connected component of each vertex (Tarjan 1972, without recursion)."""
    heads: list[list[int]] = [[] for _ in range(count)]
    for tail, head in edges:
        heads[tail].append(head)
    index, low, component = [-1] * count, [0] * count, [-1] * count
    stack: list[int] = []
    clock = components = 0
    for start in range(count):
        work = [(start, 0)] if index[start] < 0 else []
        while work:
            vertex, step = work.pop()
            if step == 0:
                index[vertex] = low[vertex] = clock
                clock += 1
                stack.append(vertex)
            else:
                low[vertex] = min(low[vertex], low[heads[vertex][step - 1]])
            for position in range(step, len(heads[vertex])):
                head = heads[vertex][position]
                if index[head] < 0:
                    work += [(vertex, position + 1), (head, 0)]
                    break
                if component[head] < 0:
                    low[vertex] = min(low[vertex], index[head])
            else:
                if low[vertex] == index[vertex]:
                    while component[vertex] < 0:
                        component[stack.pop()] = components
                    components += 1
    return component

"""Which placement every tensor of a piece gets along one axis: an integer programme, solved exactly.

Symbols: op ``o`` runs in one way ``w`` of ``W(o)`` (`partita.planner.scale.ways`); value ``v`` is made in placement
``p``; in phase ``f`` (forward, backward) it is needed in placements ``q``. Parameters and boundary values are ops too:
their ways are the placements in which they may lie.

    variables    x[o,w]      1: op o runs in way w
                 z[v,f,p,q]  1: in phase f, v is turned from p into q (p = q: read as it is)
    minimise     sum x[o,w] work(o,w) + sum z[v,f,p,q] convert(v,p,q)
    choose       sum_w x[o,w] = 1                                       for every op
    have         z[v,f,p,q] <= sum of x[o,w] over ways of v's maker that give p
    need         sum_p z[v,f,p,q] >= sum of x[o,w] over ways of one reader that want v in q      for every reader

``work`` is the roofline time at the rates below, for ``1/size`` of the op where the way cuts something; ``convert``
that
of the ring algorithm (`partita.cost.collectives`). A parameter that every worker holds whole costs what keeping it in
shares and gathering it at every use would cost (two gathers, one reduce-scatter), times `WHOLE_PRICE`: it is the
purpose of the tensor axis to hold shares. On the context axis all parameters are whole, and boundary values are cut.

A value is converted once in each phase: what the backward pass needs gathered is gathered again rather than kept, as in
Korthikanti et al. 2022, section 4.2.2. The two all-reduces (or gather and scatter pairs) for each layer of Megatron-LM
(Shoeybi et al. 2019, section 3) are what comes out for a transformer block; they are not built in.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

from partita.errors import InfeasibleError
from partita.graph.graph import Phase
from partita.planner.highs import SilentHighs
from partita.planner.scale.one_row import PartsOf
from partita.planner.scale.ways import (
    Lay,
    P,
    R,
    Sized,
    Way,
    conversion,
    divides,
    is_view,
    lay_text,
    ways_of,
)
from partita.sharding.calls import Op, Value

# Only ratios matter here (the step's time comes from the cost model): a GPU of 400 TFLOP/s, 2 TB/s, links of 300 GB/s.
FLOPS_PER_S = 4e14
MEMORY_BYTES_PER_S = 2e12
LINK_BYTES_PER_S = 3e11
LATENCY_S = 5e-6
WHOLE_PRICE = 10.0
_TIME_LIMIT_S = 20.0
_GAP = 1e-4
_PART_PRICE_S = 1e-9  # for each part of a parameter's cut: of equals, the plain one


@dataclass(frozen=True)
class Conversion:
    """``value`` is turned from ``source`` into ``target`` in one phase."""

    value: Value
    source: Lay
    target: Lay
    phase: Phase


@dataclass
class Problem:
    """Ops with their ways, and the values around them.

    Attributes:
        ops: in order; with their phases and rules.
        parameters: values that are parameters, and the values that are their gradients (None: frozen).
        boundary: values made outside that lie like the block boundary.
        boundary_out: values made inside that others read, and that must lie like the boundary.
        free: values made outside of which every worker has a copy.
        sums: values made inside that others read in whatever form, but not cut (losses, gradients of side inputs).
        num_bytes: of a value, for one row; flops: of an op, for one row.
        boundary_lays: the placements among which the boundary's is chosen.
        parameter_lays: fixed placements of parameters (tied ones; all of them on the context axis).
    """

    size: int
    ops: Sequence[Op]
    phases: Sequence[Phase]
    rules: Sequence[tuple[Sized, ...]]
    parameters: Mapping[Value, Value | None]
    boundary: Sequence[Value]
    boundary_out: Sequence[Value]
    free: Sequence[Value]
    sums: Sequence[Value]
    boundary_lays: Sequence[Lay]
    num_bytes: Mapping[Value, float]
    flops: Mapping[Op, float]
    parameter_lays: Mapping[Value, Lay] = field(default_factory=dict)

    @functools.cached_property
    def stay(self) -> frozenset[Value]:
        """Parameters and their gradients, and views of them: what the tensor axis does not send about."""
        kept = {*self.parameters, *(gradient for gradient in self.parameters.values() if gradient is not None)}
        for op in self.ops:
            if is_view(op) and op.inputs[0] in kept:
                kept.update(output for output in op.outputs if output is not None)
        for op in reversed(self.ops):
            if is_view(op) and any(output in kept for output in op.outputs):
                kept.add(op.inputs[0])
        return frozenset(kept)


@dataclass(frozen=True)
class Chosen:
    """A solution: the way of every op, the placements of values and parameters, and the conversions.

    ``cost_s`` is the objective, priced here; ``bound_s`` the solver's proven lower bound.
    """

    ops: tuple[Op, ...]
    phases: tuple[Phase, ...]
    ways: tuple[Way, ...]
    lays: Mapping[Value, Lay]
    conversions: tuple[Conversion, ...]
    boundary: Lay
    cost_s: float
    bound_s: float


def solve(problem: Problem) -> Chosen:
    """The cheapest placements.

    Raises:
        InfeasibleError: the boundary cannot lie in any of the given placements.
    """
    return _Programme(problem).solve()


def convert_s(source: Lay, target: Lay, num_bytes: float, size: int) -> float:
    """Seconds of a conversion of a value of ``num_bytes``; infinite if there is none."""
    kind = conversion(source, target)
    if kind is None:
        return float("inf")
    if kind == "":
        return 0.0 if source == target else num_bytes / MEMORY_BYTES_PER_S / size
    wire = num_bytes * (size - 1) / size / LINK_BYTES_PER_S
    factor = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0, "all_to_all": 1.0 / size}[kind]
    return LATENCY_S * (2 if kind == "all_reduce" else 1) + factor * wire


def work_s(problem: Problem, op: Op, way: Way) -> float:
    """Roofline seconds of one op in one way."""
    if is_view(op):
        return 0.0
    share = problem.size if way.spreads else 1
    pairs = [*zip(op.inputs, way.inputs, strict=True), *zip(op.outputs, way.outputs, strict=True)]
    num_bytes = sum(
        problem.num_bytes[value] / (problem.size if isinstance(lay, tuple) else 1)
        for value, lay in pairs
        if value is not None
    )
    return max(problem.flops[op] / share / FLOPS_PER_S, num_bytes / MEMORY_BYTES_PER_S)


def turn_s(problem: Problem, value: Value, source: Lay, target: Lay) -> float:
    """Seconds of a conversion; of parameters and their gradients dearer, because they are to stay where they are."""
    price = WHOLE_PRICE if value in problem.stay else 1.0
    return price * convert_s(source, target, problem.num_bytes[value], problem.size)


class _Programme:
    """Variables and rows of the integer programme for one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.costs: list[float] = []
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.parts = PartsOf(problem.ops, problem.rules)
        self.ways = [
            ways_of([(rule, self.parts.of_rule(op, rule)) for rule in rules], problem.size)
            for op, rules in zip(problem.ops, problem.rules, strict=True)
        ]
        self.makes: dict[Value, dict[Lay, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.needs: dict[tuple[Value, Phase], list[dict[Lay, list[int]]]] = defaultdict(list)
        self.turns: dict[tuple[Value, Phase, Lay, Lay], int] = {}
        self.choices: list[list[int]] = []

    def _variable(self, cost: float) -> int:
        self.costs.append(cost)
        return len(self.costs) - 1

    def _choose(self, variables: list[int]) -> None:
        self.rows.append((variables, [1.0] * len(variables), 1.0, 1.0))

    def _reader(self, value: Value, phase: Phase, wanted: Mapping[Lay, list[int]]) -> None:
        if wanted:
            self.needs[value, phase].append(dict(wanted))

    def solve(self) -> Chosen:
        for place, op in enumerate(self.problem.ops):
            self._add_op(place, op)
        self._add_parameters()
        self.boundary_choice = self._add_boundary()
        for value in self.problem.free:
            variable = self._variable(0.0)
            self._choose([variable])
            self.makes[value][R].append(variable)
        self._add_conversions()
        values, bound_s = self._run()
        return self._read(values, bound_s)

    def _add_op(self, place: int, op: Op) -> None:
        problem = self.problem
        variables = [self._variable(work_s(problem, op, way)) for way in self.ways[place]]
        self._choose(variables)
        self.choices.append(variables)
        for index, value in enumerate(op.inputs):
            wanted: dict[Lay, list[int]] = defaultdict(list)
            for way, variable in zip(self.ways[place], variables, strict=True):
                lay = way.inputs[index]
                if lay is not None:
                    wanted[lay].append(variable)
            self._reader(value, problem.phases[place], wanted)
        for index, output in enumerate(op.outputs):
            if output is None:
                continue
            for way, variable in zip(self.ways[place], variables, strict=True):
                lay = way.outputs[index]
                if lay is not None:
                    self.makes[output][lay].append(variable)

    def _add_parameters(self) -> None:
        """A parameter lies where it is read, and its gradient must come to lie there too (or stay a sum if whole)."""
        self.parameter_choice: dict[Value, dict[Lay, int]] = {}
        size = self.problem.size
        for value, gradient in self.problem.parameters.items():
            fixed = self.problem.parameter_lays.get(value)
            lays = [fixed] if fixed is not None else self._possible_lays(value)
            share = self.problem.num_bytes[value] * (size - 1) / size / LINK_BYTES_PER_S
            whole_s = 0.0 if fixed is not None else WHOLE_PRICE * 3 * share
            chosen = {
                lay: self._variable(_PART_PRICE_S * len(lay[1]) if isinstance(lay, tuple) else whole_s) for lay in lays
            }
            self._choose(list(chosen.values()))
            self.parameter_choice[value] = chosen
            for lay, variable in chosen.items():
                self.makes[value][lay].append(variable)
            if gradient is None:
                continue
            wanted: dict[Lay, list[int]] = {lay: [variable] for lay, variable in chosen.items() if lay != R}
            if R in chosen:  # once a step, not once a micro-batch, a sum is reduced: no price here
                whole, part = self._variable(0.0), self._variable(0.0)
                self.rows.append(([whole, part, chosen[R]], [1.0, 1.0, -1.0], 0.0, 0.0))
                wanted[R], wanted[P] = [whole], [part]
            self._reader(gradient, Phase.BACKWARD, wanted)

    def _possible_lays(self, value: Value) -> list[Lay]:
        size = self.problem.size
        cuts: list[Lay] = [
            (dim, parts)
            for dim, extent in enumerate(value.spec.shape)
            for parts in self.parts.of_value(value, dim)
            if divides(extent, parts, size)
        ]
        return [R, *cuts]

    def _add_boundary(self) -> dict[Lay, int]:
        chosen = {lay: self._variable(0.0) for lay in self.problem.boundary_lays}
        self._choose(list(chosen.values()))
        for value in self.problem.boundary:
            for lay, variable in chosen.items():
                self.makes[value][lay].append(variable)
        made_in = {
            value: phase
            for op, phase in zip(self.problem.ops, self.problem.phases, strict=True)
            for value in op.outputs
            if value is not None
        }
        for value in self.problem.boundary_out:
            self._reader(value, made_in[value], {lay: [variable] for lay, variable in chosen.items()})
        for value in self.problem.sums:
            ready: dict[Lay, list[int]] = {R: [self._variable(0.0)], P: [self._variable(0.0)]}
            self._choose([variables[0] for variables in ready.values()])
            self._reader(value, made_in[value], ready)
        return chosen

    def _add_conversions(self) -> None:
        for (value, phase), readers in self.needs.items():
            made = self.makes.get(value)
            assert made, f"{value} is made by nothing"
            wanted = {lay for reader in readers for lay in reader}
            for target in wanted:
                arriving = []
                for source, makers in made.items():
                    cost = turn_s(self.problem, value, source, target)
                    if cost == float("inf"):
                        continue
                    turn = self._variable(cost)
                    self.turns[value, phase, source, target] = turn
                    arriving.append(turn)
                    self.rows.append(([turn, *makers], [1.0] + [-1.0] * len(makers), -highspy.kHighsInf, 0.0))
                for reader in readers:
                    if target in reader:
                        takers = reader[target]
                        row = ([*arriving, *takers], [1.0] * len(arriving) + [-1.0] * len(takers))
                        self.rows.append((*row, 0.0, highspy.kHighsInf))

    def _run(self) -> tuple[np.ndarray, float]:
        """First the relaxation, which is nearly always integral; only otherwise the integer programme."""
        model = highspy.HighsLp()
        num = len(self.costs)
        scale = 1e6  # microseconds: costs near the solver's tolerances would be taken for zero
        model.num_col_, model.num_row_ = num, len(self.rows)
        model.col_cost_ = np.array(self.costs) * scale
        model.col_lower_, model.col_upper_ = np.zeros(num), np.ones(num)
        model.row_lower_ = np.array([row[2] for row in self.rows])
        model.row_upper_ = np.array([row[3] for row in self.rows])
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0, *(len(row[0]) for row in self.rows)])
        model.a_matrix_.index_ = np.array([item for row in self.rows for item in row[0]])
        model.a_matrix_.value_ = np.array([item for row in self.rows for item in row[1]])
        solver = SilentHighs()
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("time_limit", _TIME_LIMIT_S)
        solver.setOptionValue("mip_rel_gap", _GAP)
        solver.passModel(model)
        solver.run()
        bound = solver.getInfo().objective_function_value
        values = np.array(solver.getSolution().col_value)
        integral = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal and all(
            max(values[variables]) > 1 - 1e-6 for variables in self.choices
        )
        if not integral:
            solver.changeColsIntegrality(num, np.arange(num), np.array([highspy.HighsVarType.kInteger] * num))
            solver.run()
            bound = solver.getInfo().mip_dual_bound
            values = np.array(solver.getSolution().col_value)
        if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible or not len(values):
            names = ", ".join(map(lay_text, self.problem.boundary_lays))
            raise InfeasibleError(f"no placements on {self.problem.size} workers let blocks begin and end as {names}")
        return values, bound / scale

    def _read(self, values: np.ndarray, bound_s: float) -> Chosen:
        """The solution, with its cost computed anew from the ways alone."""
        problem = self.problem
        ways = tuple(w[int(np.argmax(values[v]))] for w, v in zip(self.ways, self.choices, strict=True))
        cost = sum(work_s(problem, op, way) for op, way in zip(problem.ops, ways, strict=True))
        lays: dict[Value, Lay] = dict.fromkeys(problem.free, R)
        for op, way in zip(problem.ops, ways, strict=True):
            for output, lay in zip(op.outputs, way.outputs, strict=True):
                if output is not None and lay is not None:
                    lays[output] = lay
        for value, chosen in self.parameter_choice.items():
            lays[value] = max(chosen, key=lambda lay: values[chosen[lay]])
            cost += self.costs[chosen[lays[value]]]
        boundary = max(self.boundary_choice, key=lambda lay: values[self.boundary_choice[lay]])
        lays.update(dict.fromkeys(problem.boundary, boundary))
        conversions = _conversions(problem, ways, lays, boundary)
        cost += sum(turn_s(problem, c.value, c.source, c.target) for c in conversions)
        return Chosen(
            tuple(problem.ops), tuple(problem.phases), ways, lays, conversions, boundary, cost, min(bound_s, cost)
        )


def _conversions(
    problem: Problem, ways: Sequence[Way], lays: Mapping[Value, Lay], boundary: Lay
) -> tuple[Conversion, ...]:
    """Every conversion that the ways need, once per value, target and phase."""
    found: dict[Conversion, None] = {}

    def need(value: Value, target: Lay | None, phase: Phase) -> None:
        source = lays.get(value)
        if target is not None and source is not None and source != target:
            found[Conversion(value, source, target, phase)] = None

    for op, way, phase in zip(problem.ops, ways, problem.phases, strict=True):
        for value, target in zip(op.inputs, way.inputs, strict=True):
            need(value, target, phase)
    for value, gradient in problem.parameters.items():
        if gradient is not None and not (lays[value] == R and lays.get(gradient) == P):
            need(gradient, lays[value], Phase.BACKWARD)
    made_in = {
        v: phase for op, phase in zip(problem.ops, problem.phases, strict=True) for v in op.outputs if v is not None
    }
    for value in problem.boundary_out:
        need(value, boundary, made_in[value])
    for value in problem.sums:
        if isinstance(lays.get(value), tuple):
            need(value, R, made_in[value])
    return tuple(found)

"""Placements of pieces: Megatron-LM's come out, and the solver's optimum is that of enumeration."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from partita.errors import InfeasibleError
from partita.graph.graph import Phase
from partita.planner.scale.placements import Problem, _conversions, solve, turn_s, work_s
from partita.planner.scale.plan import ScalePlanner
from partita.planner.scale.solve_pieces import Layout
from partita.planner.scale.ways import R, conversion, is_attention, lay_text, ways_of
from tests.planner import scale_models as models


@pytest.fixture(scope="module")
def gpt() -> ScalePlanner:
    return ScalePlanner(*models.gpt())


def texts(planner: ScalePlanner, layout: Layout) -> dict[str, str]:
    return {planner.model.parameter_name(name): lay_text(lay) for name, lay in layout.parameter_lays.items()}


def block_exchanges(planner: ScalePlanner, layout: Layout) -> Counter[tuple[str, str]]:
    block = next(piece for piece in planner.model.pieces if not piece.is_gap)
    return Counter(
        (item.phase.value, kind)
        for item, place in layout.conversions
        if place in set(block.ops) and (kind := conversion(item.source, item.target))
    )


@pytest.mark.parametrize("sequence", [False, True])
def test_columns_then_rows_come_out_for_a_transformer_block(gpt: ScalePlanner, sequence: bool) -> None:
    layout = gpt.maker.solver.layout(4, sequence=sequence)
    found = texts(gpt, layout)
    assert found["blocks.*.qkv.weight"] == "S(0 in 3 parts)" and found["blocks.*.out.weight"] == "S(1)"
    assert found["blocks.*.up.weight"] == "S(0)" and found["blocks.*.down.weight"] == "S(1)"
    counts = block_exchanges(gpt, layout)
    moved = sum(2 if kind == "all_reduce" else 1 for _, kind in counts.elements())
    assert moved == 8, counts  # two all-reduces, or two pairs, in each pass


def test_heads_that_do_not_divide_are_not_cut() -> None:
    planner = ScalePlanner(*models.gpt(hidden=384, heads=3))
    layout = planner.maker.solver.layout(4, sequence=False)
    assert texts(planner, layout)["blocks.*.up.weight"] == "S(0)"
    ops = planner.model.programs[0].ops
    attention = [way for place, way in layout.ways.items() if is_attention(ops[place].call)]
    assert attention and all(lay in (None, R) or lay[0] != 1 for way in attention for lay in way.inputs)


def test_boundary_that_cannot_be_cut_is_refused(gpt: ScalePlanner) -> None:
    with pytest.raises(InfeasibleError, match="3 equal shares"):
        gpt.maker.solver.layout(3, sequence=True)


def problems(planner: ScalePlanner, size: int) -> list[Problem]:
    """Windows of a few consecutive ops of the block, their surroundings free."""
    solver = planner.maker.solver
    program = planner.model.programs[0]
    block = next(piece for piece in planner.model.pieces if not piece.is_gap)
    found = []
    for start in range(0, len(block.forward) - 4, 3):
        places = block.forward[start : start + 4]
        ops = [program.ops[place] for place in places]
        inside = set(ops)
        read = list(dict.fromkeys(value for op in ops for value in op.inputs))
        last = [value for value in ops[-1].outputs if value is not None]
        found.append(
            Problem(
                size=size, ops=ops, phases=[Phase.FORWARD] * 4,
                rules=[solver.rules(place, "tensor") for place in places],
                parameters={}, boundary=(), boundary_out=(), free=[v for v in read if v.producer not in inside],
                sums=last[:1], boundary_lays=[R], num_bytes=solver._num_bytes, flops=solver._flops,
            )
        )  # fmt: skip
    return found


def enumerated_cost(problem: Problem) -> float:
    def parts(op: Any, rule: Any) -> list[Any]:
        from partita.planner.scale.one_row import PartsOf

        return PartsOf(problem.ops, problem.rules).of_rule(op, rule)

    choices = [
        ways_of([(rule, parts(op, rule)) for rule in rules], problem.size)
        for op, rules in zip(problem.ops, problem.rules, strict=True)
    ]
    best = float("inf")
    for ways in itertools.product(*choices):
        lays: dict[Any, Any] = dict.fromkeys(problem.free, R)
        for op, way in zip(problem.ops, ways, strict=True):
            lays.update({v: lay for v, lay in zip(op.outputs, way.outputs, strict=True) if v is not None and lay})
        turns = _conversions(problem, ways, lays, R)
        if any(conversion(turn.source, turn.target) is None for turn in turns):
            continue
        cost = sum(work_s(problem, op, way) for op, way in zip(problem.ops, ways, strict=True))
        best = min(best, cost + sum(turn_s(problem, t.value, t.source, t.target) for t in turns))
    return best


def test_the_programme_finds_what_enumeration_finds(gpt: ScalePlanner) -> None:
    for problem in problems(gpt, 4):
        assert solve(problem).cost_s == pytest.approx(enumerated_cost(problem), rel=2e-4)

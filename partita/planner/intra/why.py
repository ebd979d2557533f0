"""Why ops and inputs of a stage are placed as they are: the programme solved again with one decision changed.

The price of an alternative is ``T(best with it) - T(best)``: all other decisions are chosen anew. Ops that are tied
(equal blocks) change together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from partita.errors import InfeasibleError
from partita.plan_layout import Exchange
from partita.planner.intra.from_graph import Stage
from partita.planner.intra.problem import IntraProblem, Window
from partita.planner.intra.solve import IntraSolution, solve_intra
from partita.planner.intra.ways import MeshPlacement
from partita.planner.why import Other
from partita.sharding.conversions import conversion_kind
from partita.sharding.placement import Replicate

MOST_OPS, MOST_WAYS = 4, 6  # that are tried, each with a solve of its own
TIME_LIMIT_S = 10.0


def with_rules(stage: Stage, rules: Mapping[str, Mapping[str, str]]) -> IntraProblem:
    """The problem with ops run by the rules that ``rules`` (op -> axis -> text) names; all ways where it names none."""
    kept: dict[object, list[int]] = {}
    for index, (op, item) in enumerate(zip(stage.problem.ops, stage.items, strict=True)):
        wanted = rules.get(item.op.name) if item is not None and not item.again else None
        key = op.tie if op.tie is not None else index
        before = kept.get(key, list(range(len(op.choices))))
        if wanted is not None:
            same = [n for n in before if dict(zip(stage.axes, stage.ways[index][n].rules, strict=True)) == wanted]
            before = same or before
        kept[key] = before
    ops = tuple(
        replace(op, choices=tuple(op.choices[n] for n in kept[op.tie if op.tie is not None else index]))
        for index, op in enumerate(stage.problem.ops)
    )
    return replace(stage.problem, ops=ops)


def in_full(stage: Stage, planned: IntraProblem, solution: IntraSolution) -> tuple[int, ...]:
    """A solution's choices of ops of `with_rules`' problem, numbered as in the stage's own."""
    found = []
    for index, choice in enumerate(solution.assignment.ops):
        taken = planned.ops[index].choices[choice]
        found.append(next(n for n, one in enumerate(stage.problem.ops[index].choices) if one is taken))
    return tuple(found)


def forced(problem: IntraProblem, index: int, choice: int) -> IntraProblem:
    """`problem` with op ``index`` (and those tied to it) run in one way."""
    tie = problem.ops[index].tie
    ops = tuple(
        replace(op, choices=(op.choices[choice],)) if number == index or (tie is not None and op.tie == tie) else op
        for number, op in enumerate(problem.ops)
    )
    return replace(problem, ops=ops)


def ops_in(stage: Stage, is_wanted: Callable[[str, str], bool]) -> list[int]:
    """Ops (views apart) for which ``is_wanted(module path, op name)``, those with most time first."""
    found = [
        index
        for index, item in enumerate(stage.items)
        if item is not None
        and not item.is_view
        and is_wanted(item.op.info.module if item.op.info is not None else "", item.op.name)
    ]
    return sorted(found, key=lambda index: -min(choice.time_s for choice in stage.problem.ops[index].choices))


def exchanges_of_ops(stage: Stage, solution: IntraSolution, ops: list[int]) -> list[Exchange]:
    """Conversions of values that one of ``ops`` makes or reads."""
    problem, wanted = stage.problem, set(ops)
    found = []
    for paid in solution.priced.conversions:
        touching = [i for i, op in enumerate(problem.ops) if paid.value in op.inputs or paid.value in op.outputs]
        if not wanted & set(touching):
            continue
        source, target = stage.placement(paid.value, paid.source), stage.placement(paid.value, paid.target)
        item = stage.items[next(i for i in touching if i in wanted)]
        info = item.op.info if item is not None else None
        found.append(
            Exchange(
                block="",
                value=problem.values[paid.value].name,
                module=info.module if info is not None else "",
                phase="forward" if paid.window is Window.FORWARD else "backward",
                axis="+".join(axis for axis, old, new in zip(stage.axes, source, target, strict=True) if old != new),
                kind="+".join(
                    str(conversion_kind(old, new)) for old, new in zip(source, target, strict=True) if old != new
                ),
                source=text_of(stage.axes, source),
                target=text_of(stage.axes, target),
                num_bytes=float(max(problem.values[paid.value].num_bytes)),
                time_s=paid.time_s,
                count=problem.num_microbatches,
            )
        )
    return found


def text_of(axes: tuple[str, ...], placement: MeshPlacement) -> str:
    """``"data R, tensor S(1)"``, or one axis' placement alone."""
    texts = [_text(item) for item in placement]
    return texts[0] if len(texts) == 1 else ", ".join(f"{a} {t}" for a, t in zip(axes, texts, strict=True))


def _text(item: object) -> str:
    dim = getattr(item, "dim", None)
    return "R" if isinstance(item, Replicate) else f"S({dim})" if dim is not None else "P"


def other_ways(stage: Stage, taken: tuple[int, ...], step_s: float, ops: list[int]) -> list[Other]:
    """The other ways of the first `MOST_OPS` of ``ops``, each priced by a solve with that way fixed.

    Args:
        taken: choice of every op as planned.
        step_s: the objective with these.
    """
    problem, found = stage.problem, []
    for index in ops[:MOST_OPS]:
        item = stage.items[index]
        name = item.op.name if item is not None else problem.ops[index].name
        ways = stage.ways[index]
        order = sorted(range(len(ways)), key=lambda one: problem.ops[index].choices[one].time_s)
        instead = _rules_text(stage.axes, ways[taken[index]].rules)
        for choice in [one for one in order if one != taken[index]][:MOST_WAYS]:
            text = _rules_text(stage.axes, ways[choice].rules)
            if text == instead:
                continue
            try:
                time_s = solve_intra(forced(problem, index, choice), time_limit_s=TIME_LIMIT_S).objective_s
            except InfeasibleError:
                other = Other(name=name, instead_of=instead, text=text, time_s=None, slower_s=None)
            else:
                other = Other(name=name, instead_of=instead, text=text, time_s=time_s, slower_s=time_s - step_s)
            found.append(other)
    return sorted(found, key=lambda other: (other.slower_s is None, other.slower_s or 0.0))


def _rules_text(axes: tuple[str, ...], rules: tuple[str, ...]) -> str:
    return ", ".join(f"{axis} {rule}" for axis, rule in zip(axes, rules, strict=True))


def placements_of_ops(stage: Stage, taken: tuple[int, ...], ops: list[int]) -> Mapping[str, dict[str, str]]:
    """The rule of every op of ``ops``, per axis."""
    found: dict[str, dict[str, str]] = {}
    for index in ops:
        item = stage.items[index]
        if item is not None:
            rules = stage.ways[index][taken[index]].rules
            found[item.op.name] = dict(zip(stage.axes, rules, strict=True))
    return found

"""What a search has learnt, as text: the best network, the Pareto front, which values mattered, what to try next."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partita.search.candidates import Candidate
from partita.units import format_bytes, format_time

if TYPE_CHECKING:
    from partita.search.result import SearchResult

NUM_LISTED = 8
EDGE = 0.05  # of a range: a best value so near to its end wants a wider one
UNIMPORTANT, IMPORTANT = 0.02, 0.1
FEW = 10  # judged candidates, below which a search has hardly begun
MANY_REJECTED = 0.3
MORE_TIME = 4.0
WORTH_IT = 0.02  # of the range of all scores


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a value was suggested from: numbers from `low` to `high`, or `choices`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def place(self, value: float) -> float:
        """Where in the range a value lies: 0 at its low end, 1 at its high one."""
        if self.high <= self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def report(result: SearchResult) -> str:
    """The text of `SearchResult.explain`."""
    parts = [_best(result), _table(result), _importance(result), _next(result)]
    return "\n\n".join(part for part in parts if part)


def values_of(candidate: Candidate) -> str:
    """What a candidate is made of, in a line."""
    return ", ".join(f"{name} {short(value)}" for name, value in candidate.params.items())


def short(value: object) -> str:
    """A value in few characters.

    >>> short(0.0012345), short(64)
    ('0.00123', '64')
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _best(result: SearchResult) -> str:
    best, early_s = result.best, result.budget.deadline_s - result.delivered_s
    when = f"{format_time(early_s)} before" if early_s >= 0 else f"{format_time(-early_s)} after"
    states = Counter(one.state for one in result.trials)
    judged = sum(bool(one.points) for one in result.trials)
    rejected = f", {states['rejected']} rejected" if states["rejected"] else ""
    failed = states["failed"] + states["raised"]
    memory = "" if best.memory_bytes is None else f", {format_bytes(best.memory_bytes)} of memory predicted"
    lines = [
        f"score {result.score:.6g}, delivered {when} the deadline: {result.weights}",
        f"candidate {best.number}: {values_of(best)}",
        f"{best.num_parameters:,} parameters{memory}; {format_time(best.train_s)} of training, "
        f"{best.points[-1].samples:,.0f} samples; {format_time(best.step_time_s)} a step by {best.plan}",
        f"{len(result.trials)} candidates: {judged} judged{rejected}" + (f", {failed} failed" if failed else ""),
    ]
    return "\n".join([*lines, *best.notes])


def _table(result: SearchResult) -> str:
    """The Pareto front; scores of all but the delivered one are cautious predictions."""
    shown = result.pareto[:NUM_LISTED]
    rows = [("candidate", "score", "parameters", "step", "values")]
    rows += [
        (
            f"{one.number}{' *' if one.number == result.best.number else ''}",
            f"{result.predicted(one):.4g}",
            f"{one.num_parameters:,}",
            format_time(one.step_time_s),
            values_of(one),
        )
        for one in shown
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    more = len(result.pareto) - len(shown)
    told = (
        "Pareto front of score, parameters and step time. Scores are those to be relied on at the deadline, but of the "
    )
    tail = [f"... and {more} more"] if more else []
    return "\n".join([told + "delivered one (*), which has it.", *(line.rstrip() for line in lines), *tail])


def _importance(result: SearchResult) -> str:
    if not result.importance:
        return ""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result.importance.items())
    return f"What mattered for the score (PED-ANOVA): {shares}"


def _next(result: SearchResult) -> str:
    hints = [*_edges(result), *_unimportant(result), *_time(result), *_rejected(result)]
    return "\n".join(["What to try next:", *(f"- {hint}" for hint in hints)]) if hints else ""


def _edges(result: SearchResult) -> list[str]:
    found = []
    for name, value in result.best.params.items():
        known = result.ranges.get(name)
        if known is None or known.choices or result.importance.get(name, 1.0) < IMPORTANT:
            continue
        place = known.place(float(value))
        if place <= EDGE or place >= 1 - EDGE:
            end, where = (known.low, "below") if place <= EDGE else (known.high, "above")
            found.append(f"values of {name} {where} {short(end)}: the best one, {short(value)}, is at that end")
    return found


def _unimportant(result: SearchResult) -> list[str]:
    names = [name for name, share in result.importance.items() if share < UNIMPORTANT and len(result.importance) > 1]
    if not names:
        return []
    fixed = ", ".join(f"{name} = {short(result.best.params[name])}" for name in names if name in result.best.params)
    return [f"a smaller space: {', '.join(names)} hardly mattered" + (f"; fix {fixed}" if fixed else "")]


def _time(result: SearchResult) -> list[str]:
    found, judged = [], [one for one in result.trials if one.points]
    if len(judged) < FEW:
        found.append(f"more time, or a smaller space: only {len(judged)} candidates were judged")
    aims, longer_s = result.aims, (MORE_TIME - 1) * result.best.train_s
    scores = [one.points[-1].score for one in judged]
    later = aims.predicted(result.best, result.budget, result.budget.last_s - longer_s).score
    if abs(later - result.score) > WORTH_IT * (max(scores) - min(scores)) and (later > result.score) == aims.maximize:
        found.append(f"a later deadline: {MORE_TIME:.0f} times the training is predicted to give {later:.4g}")
    return found


def _rejected(result: SearchResult) -> list[str]:
    reasons = [one.why for one in result.trials if one.state == "rejected"]
    if len(reasons) < MANY_REJECTED * len(result.trials):
        return []
    return [f"a space with fewer candidates that cannot be trained: {len(reasons)} were rejected, the last one as "
            f"{reasons[-1]}"]  # fmt: skip

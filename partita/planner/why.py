"""Why something lies as it does: its placements, the exchanges that they cause, and what others would cost.

`Why` is the answer for a module, parameter or op; `partita.planner.scale.why` gives it for described GPUs and
`partita.planner.intra.why` for the machines here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from partita.errors import InputError
from partita.plan import Plan
from partita.plan_layout import Exchange
from partita.planner.describe import exchange_text
from partita.units import format_time


@dataclass(frozen=True, kw_only=True)
class Other:
    """Something else that was possible: what, and the predicted step with it (all else chosen anew).

    ``time_s`` is None where it is not possible; `note` says why, or what it would change.
    """

    name: str
    instead_of: str
    text: str
    time_s: float | None
    slower_s: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Why:
    """The answer for `name`.

    Attributes:
        placements: of parameters (and ops, where the model was given), per axis.
        exchanges: that they cause, longest first.
        others: other placements with their price, cheapest first; empty without the model.
        notes: what a reader should know.
    """

    name: str
    placements: dict[str, dict[str, str]]
    exchanges: tuple[Exchange, ...]
    others: tuple[Other, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.name]
        for name, axes in self.placements.items():
            lines.append(f"  {name}: {', '.join(f'{axis} {text}' for axis, text in axes.items()) or 'whole'}")
        total_s = sum(item.time_s * item.count for item in self.exchanges)
        if self.exchanges:
            lines.append(f"exchanges: {format_time(total_s)} a step on one worker, before what hides them")
            lines += [f"  {exchange_text(item)}" for item in self.exchanges]
        else:
            lines.append("exchanges: none")
        if self.others:
            lines.append("instead (all else chosen anew)")
        for other in self.others:
            price = "not possible" if other.slower_s is None else f"{_signed(other.slower_s)} a step"
            note = f" ({other.note})" if other.note else ""
            lines.append(f"  {other.name}: {other.text} instead of {other.instead_of}: {price}{note}")
        return "\n".join([*lines, *self.notes])


def _signed(time_s: float) -> str:
    return f"{'+' if time_s >= 0 else '-'}{format_time(abs(time_s))}"


def is_in(pattern: str, name: str) -> bool:
    """Whether what `pattern` tells (a module, parameter or op; ``*`` for a block's number) lies in `name` or is it.

    >>> is_in("layers.*.up.weight", "layers.3.up"), is_in("layers.*.up", "layers.*.upper")
    (True, False)
    """
    parts, wanted = pattern.split("."), name.split(".")
    pairs = zip(parts, wanted, strict=False)
    return len(wanted) <= len(parts) and all(
        part == one or (part.startswith("*") and (one.isdigit() or one == "*")) for part, one in pairs
    )


def unknown(name: str, known: Iterable[str]) -> InputError:
    """There is nothing called `name`."""
    names = sorted({*known} - {""})
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:5]
    return InputError(
        f"--why must name a module, parameter or op of the model, but there is no {name!r}. Nearest: {', '.join(near)}."
    )


def why_in_plan(plan: Plan, name: str) -> Why:
    """What a saved plan for described GPUs itself tells.

    Raises:
        InputError: the plan tells nothing of `name`, or is for machines here.
    """
    layout = plan.layout
    if layout is None:
        raise InputError(
            "of a plan for the machines here, --why needs the model: add --target file.py:function (the one that the "
            "plan was made for)."
        )
    placed = {pattern: axes for pattern, axes in plan.inputs.items() if is_in(pattern, name)}
    exchanges = [
        item
        for item in layout.exchanges
        if any(is_in(text, name) for text in (item.value, item.module, item.block) if text)
    ]
    for item in exchanges:
        if item.axis == "data" and item.value not in placed and is_in(item.value, name):
            placed[item.value] = {}
    if not placed and not exchanges:
        every = [*plan.inputs, *(text for item in layout.exchanges for text in (item.value, item.module))]
        raise unknown(name, every)
    zero = ("whole on every replica", "its optimizer state", "its gradient and optimizer state", "all of it")
    notes = []
    if plan.axes.get("data", 1) > 1:
        kept = zero[plan.zero_stage]
        notes.append(f"data axis: ZeRO {plan.zero_stage}: {kept}{' is shared out' if plan.zero_stage else ''}.")
    if plan.axes.get("tensor", 1) > 1:
        notes.append(f"values between blocks lie as {layout.activations} along the tensor axis.")
    return Why(
        name=name,
        placements=placed,
        exchanges=tuple(sorted(exchanges, key=lambda item: -item.time_s * item.count)),
        notes=tuple(notes),
    )

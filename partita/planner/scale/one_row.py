"""Rules for one sample: what the rows of a micro-batch have in common is cut inside every row.

A captured step has several rows (samples); a dim whose extent changes with their number holds the rows (``[rows, ..]``,
``[rows * tokens, ..]``). Cutting rows apart is the data axis' business. Along the tensor and context axes a dim that
holds rows is cut inside each row: ``parts`` then describe one row, and a rule's blocks are those of one row. So the
programme of placements is that of a single sample, however many rows were captured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from partita.planner.scale.ways import PLAIN, Lay, Parts, Sized, Way
from partita.sharding.calls import Op, Value

MAX_PARTS = 6  # fused projections have two or three; dims cut inside each of many heads help nothing
Dims = frozenset[int]


def row_dims(op: Op, other: Op) -> tuple[tuple[Dims, ...], tuple[Dims, ...]]:
    """Of every input and output of ``op``, the dims that differ in ``other``, the same op with other rows."""

    def changed(left: Sequence[object], right: Sequence[object]) -> tuple[Dims, ...]:
        return tuple(
            frozenset()
            if one is None or two is None
            else frozenset(d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b)  # type: ignore[attr-defined]
            for one, two in zip(left, right, strict=True)
        )

    return changed(op.call.inputs, other.call.inputs), changed(op.call.outputs, other.call.outputs)


def inside_rows(rule: Sized, dims: tuple[tuple[Dims, ...], tuple[Dims, ...]], rows: int) -> Sized | None:
    """``rule`` for one row; None if it cuts rows apart or composes a dim of too many parts."""
    if rule.extent == 0:
        return rule
    cuts = [
        (lay, lay[0] in changed)
        for lay, changed in zip((*rule.way.inputs, *rule.way.outputs), (*dims[0], *dims[1]), strict=True)
        if isinstance(lay, tuple)
    ]
    by_rows = [len(lay[1]) % rows == 0 and len(set(lay[1])) == 1 for lay, varies in cuts if varies]
    extent = rule.extent
    if by_rows and not all(by_rows):
        if any(by_rows) or len(by_rows) != len(cuts) or extent % rows or extent == rows:
            return None
        extent //= rows  # a rule for any blocks: those of one row
    inputs = tuple(_one_row(lay, changed, rows) for lay, changed in zip(rule.way.inputs, dims[0], strict=True))
    outputs = tuple(_one_row(lay, changed, rows) for lay, changed in zip(rule.way.outputs, dims[1], strict=True))
    found = Sized(Way(inputs, outputs), extent)
    return None if any(len(parts) > MAX_PARTS for parts in found.parts) else found


def _one_row(lay: Lay | None, changed: Dims, rows: int) -> Lay | None:
    if isinstance(lay, tuple) and lay[0] in changed and len(lay[1]) % rows == 0:
        return lay[0], (1,) * (len(lay[1]) // rows)
    return lay


# -- which parts a dim can be composed of ----------------------------------------------------------------------------

_Place = tuple[Value, int]  # a value and one of its dims


class PartsOf:
    """The ways in which dims are composed of parts, carried along ops that keep dims as they are."""

    def __init__(self, ops: Sequence[Op], rules: Sequence[tuple[Sized, ...]]) -> None:
        self._root: dict[_Place, _Place] = {}
        origins: list[tuple[_Place, Parts]] = []
        for op, of_op in zip(ops, rules, strict=True):
            for rule in of_op:
                places = list(_places(op, rule))
                if rule.parts - {PLAIN}:
                    origins += [(place, parts) for place, parts in places if parts != PLAIN]
                else:
                    for place, _ in places[1:]:
                        self._join(places[0][0], place)
        found: dict[_Place, set[Parts]] = defaultdict(set)
        for place, parts in origins:
            found[self._find(place)].add(parts)
        self._found: Mapping[_Place, set[Parts]] = found

    def _find(self, place: _Place) -> _Place:
        path = []
        while (above := self._root.setdefault(place, place)) != place:
            path.append(place)
            place = above
        for below in path:
            self._root[below] = place
        return place

    def _join(self, left: _Place, right: _Place) -> None:
        self._root[self._find(left)] = self._find(right)

    def of_value(self, value: Value, dim: int) -> list[Parts]:
        return [PLAIN, *sorted(self._found.get(self._find((value, dim)), ()))]

    def of_rule(self, op: Op, rule: Sized) -> list[Parts]:
        for (value, dim), _ in _places(op, rule):
            return self.of_value(value, dim)
        return [PLAIN]


def _places(op: Op, rule: Sized) -> list[tuple[_Place, Parts]]:
    pairs = [*zip(op.inputs, rule.way.inputs, strict=True), *zip(op.outputs, rule.way.outputs, strict=True)]
    return [((value, lay[0]), lay[1]) for value, lay in pairs if value is not None and isinstance(lay, tuple)]

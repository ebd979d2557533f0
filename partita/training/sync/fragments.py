"""Fragments of a model: parts of about equal size that are exchanged one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from partita.training.sync.method import Part


@dataclass(frozen=True)
class Piece:
    """Rows ``start:end`` (of dim 0) of a parameter; all of it where it has no dims."""

    parameter: Part
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        return (self.start, self.end) == (0, _rows(self.parameter))

    @property
    def part(self) -> Part:
        if self.is_whole:
            return self.parameter
        name = f"{self.parameter.name}[{self.start}:{self.end}]"
        return Part(name, (self.end - self.start, *self.parameter.shape[1:]))

    def of(self, value: Tensor) -> Tensor:
        """The view of the parameter's value."""
        return value if self.is_whole else value[self.start : self.end]


def fragments_of(parts: Sequence[Part], num: int) -> list[list[Piece]]:
    """At most `num` runs of pieces of about equal size, none of them empty: cut at the rows next to where equal runs
    would end.

    Example:
        >>> [[piece.part.name for piece in own] for own in fragments_of([Part("a", (6,)), Part("b", (2,))], 2)]
        [['a[0:4]'], ['a[4:6]', 'b']]
    """
    total = sum(part.num_elements for part in parts)
    found: list[list[Piece]] = [[]]
    done, number = 0, 1  # elements, and the edge that comes next
    for part in parts:
        rows, start = _rows(part), 0
        size = part.num_elements // rows if rows else 0
        while size and number < num and (edge := round((total * number / num - done) / size)) <= rows:
            number += 1
            if edge > start:
                found[-1].append(Piece(part, start, edge))
                start = edge
            if found[-1]:  # else no row lies between two edges
                found.append([])
        if start < rows or not rows:
            found[-1].append(Piece(part, start, rows))
        done += part.num_elements
    return [own for own in found if any(piece.part.num_elements for piece in own)]


def _rows(part: Part) -> int:
    return part.shape[0] if part.shape else 1

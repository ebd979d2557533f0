"""The placements of all pieces of a model along one axis: a problem for each kind of block, one for all gaps together.

Two ways of lying at block boundaries are solved: whole (tensor parallelism), and cut along a dim of the activations
(sequence parallelism). The dim is chosen by the block that is most frequent and then holds for all.

The programme is solved once for each set of degrees that permit the same ways; degrees of one set share the placements
(sizes change what is exchanged and computed in proportion, so the order of alternatives hardly ever changes).
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partita.errors import InfeasibleError
from partita.graph.graph import Phase
from partita.planner.scale.one_row import inside_rows, row_dims
from partita.planner.scale.pieces import CutModel, Piece
from partita.planner.scale.placements import Chosen, Conversion, Problem, solve
from partita.planner.scale.ways import PLAIN, Lay, R, Sized, Way, is_float, sized_rules, whole_bytes
from partita.sharding.calls import Op, Value


@dataclass(frozen=True, eq=False)
class Layout:
    """Placements of all ops along one axis of ``size`` workers.

    Attributes:
        boundary: how values lie between blocks.
        chosen: solution per group of pieces, with the ops' positions it covers.
        parameter_lays: by node name of the parameter.
    """

    size: int
    axis: str
    boundary: Lay
    chosen: tuple[tuple[tuple[int, ...], Chosen], ...]
    parameter_lays: Mapping[str, Lay]

    @functools.cached_property
    def ways(self) -> dict[int, Way]:
        """Way of the op at each position."""
        return {place: way for places, one in self.chosen for place, way in zip(places, one.ways, strict=True)}

    @functools.cached_property
    def lays(self) -> dict[Value, Lay]:
        """Placement of every value that ops make or read."""
        return {value: lay for _, one in reversed(self.chosen) for value, lay in one.lays.items()}

    def lay_of(self, value: Value) -> Lay:
        """Placement in which a value is made."""
        return self.lays.get(value, R)

    @functools.cached_property
    def conversions(self) -> tuple[tuple[Conversion, int], ...]:
        """Conversions with the position of the op before or after which they happen."""
        found = []
        for places, one in self.chosen:
            position: dict[tuple[Value, Phase], int] = {}
            for place, op, phase in zip(places, one.ops, one.phases, strict=True):
                for value in op.inputs:
                    position.setdefault((value, phase), place)
                for output in op.outputs:
                    if output is not None:
                        position.setdefault((output, phase), place)
            found += [(item, position[item.value, item.phase]) for item in one.conversions]
        return tuple(found)

    @property
    def is_sequence_parallel(self) -> bool:
        return isinstance(self.boundary, tuple)


@dataclass
class PieceSolver:
    """Solves a model's pieces, keeping rules and solutions."""

    model: CutModel
    _rules: dict[tuple[object, bool], tuple[Sized, ...]] = field(default_factory=dict)
    _solved: dict[object, Layout | InfeasibleError] = field(default_factory=dict)
    _extents: dict[str, list[int]] = field(default_factory=dict)  # by axis: what rules and parameters cut

    def layout(self, size: int, *, sequence: bool, axis: str = "tensor") -> Layout:
        """The placements on ``size`` workers; ``sequence``: boundary values are cut.

        Raises:
            InfeasibleError: no dim of the boundary can be cut, or nothing at all can.
        """
        if size == 1:
            return Layout(1, axis, R, (), {})
        key = (axis, sequence, self._permitted(size, axis))
        known = self._solved.get(key)
        if known is None:
            try:
                known = self._solve(size, sequence, axis)
            except InfeasibleError as error:
                known = error
            self._solved[key] = known
        if isinstance(known, InfeasibleError):
            raise known
        return Layout(size, axis, known.boundary, known.chosen, known.parameter_lays)

    def with_layout(self, layout: Layout, *, sequence: bool) -> PieceSolver:
        """The same solver, which gives `layout` for its size (and degrees alike) and axis."""
        other = copy.copy(self)
        other._solved = {**self._solved, (layout.axis, sequence, self._permitted(layout.size, layout.axis)): layout}
        return other

    def __post_init__(self) -> None:
        base, other = self.model.programs[:2]
        self._num_bytes: dict[Value, float] = {}
        self._flops: dict[Op, float] = {}
        for left, right in zip(base.ops, other.ops, strict=True):
            pairs = [*zip(left.inputs, right.inputs, strict=True), *zip(left.outputs, right.outputs, strict=True)]
            for one, two in pairs:
                if one is not None and two is not None:
                    self._num_bytes[one] = self._at_one_row(whole_bytes(one.spec), whole_bytes(two.spec))
            flops = [op.info.flops if op.info is not None else 0 for op in (left, right)]
            self._flops[left] = self._at_one_row(*flops)

    def _at_one_row(self, base: float, other: float) -> float:
        """What grows in proportion to the rows, for one of them."""
        few, many = self.model.rows[:2]
        return max(base - (other - base) * (few - 1) / (many - few), 0.0)

    def rules(self, place: int, axis: str) -> tuple[Sized, ...]:
        """Rules of the op at ``place``, for one row."""
        op, other = self.model.programs[0].ops[place], self.model.programs[1].ops[place]
        key = (op.call.key, axis == "context")
        if key not in self._rules:
            dims = row_dims(op, other)
            found = (
                inside_rows(rule, dims, self.model.rows[0]) for rule in sized_rules(op.call, context=axis == "context")
            )
            self._rules[key] = tuple(dict.fromkeys(rule for rule in found if rule is not None))
        return self._rules[key]

    def _permitted(self, size: int, axis: str) -> tuple[bool, ...]:
        """Which extents that rules (or parameters) cut are multiples of ``size``: degrees alike have the same ways."""
        if axis not in self._extents:
            program = self.model.programs[0]
            extents = {rule.extent for place in range(len(program.ops)) for rule in self.rules(place, axis)}
            extents |= {extent for name in self.model.parameters for extent in program.placeholders[name].spec.shape}
            self._extents[axis] = sorted(extent for extent in extents if extent)
        return tuple(extent % size == 0 for extent in self._extents[axis])

    def _solve(self, size: int, sequence: bool, axis: str) -> Layout:
        blocks = [index for index, piece in enumerate(self.model.pieces) if not piece.is_gap]
        times = Counter(index for index, _ in self.model.chain)
        blocks.sort(key=lambda index: -times[index] * len(self.model.pieces[index].ops))
        lays = self._boundary_lays(size) if sequence else [R]
        if not lays or (sequence and not blocks):
            raise InfeasibleError(f"no dim of the values between blocks can be cut into {size} equal shares")
        found: list[tuple[tuple[int, ...], Chosen]] = []
        fixed: dict[Value, Lay] = {}
        gaps = [index for index, piece in enumerate(self.model.pieces) if piece.is_gap]
        for group in [*([index] for index in blocks), gaps]:
            pieces = [self.model.pieces[index] for index in group]
            if not any(piece.ops for piece in pieces):
                continue
            problem = self.problem(pieces, size, lays, axis, fixed)
            chosen = solve(problem)
            lays = [chosen.boundary]
            fixed.update({value: chosen.lays[value] for value in problem.parameters})
            found.append((tuple(sorted(place for piece in pieces for place in piece.ops)), chosen))
        return Layout(size, axis, lays[0], tuple(found), {value.name: lay for value, lay in fixed.items()})

    def _boundary_lays(self, size: int) -> list[Lay]:
        """Dims along which all boundary values can be cut; the rows of the micro-batch are the data axis' business."""
        shapes = self.model.boundary_shapes
        rank = min((len(shape) for shape in shapes), default=0)
        varying = self._row_dims()
        return [
            (dim, PLAIN)
            for dim in range(rank)
            if dim not in varying and all(shape[dim] > 1 and shape[dim] % size == 0 for shape in shapes)
        ]

    def _row_dims(self) -> set[int]:
        """Dims of boundary values whose extent is the number of rows."""
        base, *others = self.model.programs
        dims: set[int] = set()
        for other in others[:1]:
            for left, right in zip(base.ops, other.ops, strict=True):
                for one, two in zip(left.outputs, right.outputs, strict=True):
                    if one is not None and two is not None and one.spec.shape in self.model.boundary_shapes:
                        pairs = enumerate(zip(one.spec.shape, two.spec.shape, strict=True))
                        dims |= {dim for dim, (a, b) in pairs if a != b}
        return dims

    def problem(
        self, pieces: Sequence[Piece], size: int, lays: Sequence[Lay], axis: str, fixed: Mapping[Value, Lay]
    ) -> Problem:
        """What is solved for `pieces` together: boundary values in one of `lays`, parameters of `fixed` as they are."""
        program = self.model.programs[0]
        places = sorted(place for piece in pieces for place in piece.ops)
        ops = [program.ops[place] for place in places]
        inside = set(ops)
        read = list(dict.fromkeys(value for op in ops for value in op.inputs))
        parameters: dict[Value, Value | None] = {}
        for value in read:
            if value.name in self.model.parameters and value.producer is None:
                gradient = self.model.gradients.get(value.name)
                parameters[value] = gradient if gradient is not None and gradient.producer in inside else None
        outside = [value for value in read if value.producer not in inside and value not in parameters]
        leaving = self._leaving(inside)
        gradients = {gradient for gradient in parameters.values() if gradient is not None}
        whole = {value: R for value in parameters} if axis == "context" else {}
        return Problem(
            size=size,
            ops=ops,
            phases=[self.model.phase(place) for place in places],
            rules=[self.rules(place, axis) for place in places],
            parameters=parameters,
            boundary=[value for value in outside if self.is_boundary(value)],
            boundary_out=[value for value in leaving if self.is_boundary(value)],
            free=[value for value in outside if not self.is_boundary(value)],
            sums=[value for value in leaving if not self.is_boundary(value) and value not in gradients],
            boundary_lays=lays,
            num_bytes=self._num_bytes,
            flops=self._flops,
            parameter_lays={**{value: lay for value, lay in fixed.items() if value in parameters}, **whole},
        )

    def is_boundary(self, value: Value) -> bool:
        """Whether a value that crosses pieces lies like the values between blocks."""
        return value.producer is not None and is_float(value.spec) and value.spec.shape in self.model.boundary_shapes

    def _leaving(self, inside: set[Op]) -> list[Value]:
        """Values made inside that are read outside, or are results of the step."""
        program = self.model.programs[0]
        results = {value for value in program.outputs if isinstance(value, Value)}
        readers: dict[Value, None] = {}
        for op in program.ops:
            if op not in inside:
                readers.update({value: None for value in op.inputs if value.producer in inside})
        for value in results:
            if value.producer in inside:
                readers[value] = None
        return list(readers)


__all__ = ["Layout", "Phase", "PieceSolver"]

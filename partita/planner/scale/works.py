"""Pieces with their placements become `LayerWork`s: what one device computes, exchanges and keeps for a micro-batch.

Every extent of the captured ops is an affine function of the micro-batch (fitted from two captures), so works of any
micro-batch need no other capture. With tensor degree t and context degree c, a tensor's local extent is the whole one
divided by t where its placement on the tensor axis cuts that dim, and by c likewise; the two axes compose.

Kernels: products (`mm`, `addmm`, `bmm`, `baddbmm`, convolutions as ``outputs x (channels x window)`` products), fused
attention (half the products if causal; 2.5 times as many backward, since scores are computed again: Dao et al. 2022,
appendix B), and passes over memory. Chains of element-wise ops are one pass: what lies between them is never stored.

Kept for the backward pass: every value made in the forward pass that a backward op of the piece reads (views count
as what they view; weights and values shared by all blocks do not count), but for results of element-wise ops that the
kernels which read them can make again from what is kept (so a norm keeps its input, not copies in four bytes). A sum
over an axis that is then scattered is kept scattered. With selective recomputation what only passes over
memory, and products of two activations, runs again: kept are inputs of those (Korthikanti et al. 2022, section 5).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from partita.cost.kernels import Exchange, Item, Kernel, LayerWork
from partita.errors import InfeasibleError
from partita.graph.graph import Phase
from partita.planner.scale.pieces import CutModel, Piece
from partita.planner.scale.placements import Conversion
from partita.planner.scale.solve_pieces import Layout, PieceSolver
from partita.planner.scale.ways import Lay, P, R, Way, conversion, is_attention, is_view
from partita.sharding.calls import Op, Program, Value
from partita.sharding.rules_pointwise import is_pointwise

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # base name -> position of the left factor
_FREE = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})


@dataclass(frozen=True)
class Shards:
    """The placements of one combination of degrees; the axes compose."""

    layouts: tuple[Layout, ...]  # tensor first, then context

    def lays(self, value: Value) -> list[tuple[Lay, int]]:
        return [(layout.lay_of(value), layout.size) for layout in self.layouts]


Local = tuple[list[tuple[float, ...]], list[tuple[float, ...]]]  # shapes of inputs and outputs
Affine = tuple[tuple[float, ...], tuple[float, ...]]  # extents at the base's rows, and how they grow for each row


def fitted(keys: Program, few: Program, many: Program, rows: Sequence[int]) -> dict[Value, Affine]:
    """Extents of ``keys``' values as affine functions of the rows, from two captures of the same ops."""
    found: dict[Value, Affine] = {}
    for key, left, right in zip(keys.ops, few.ops, many.ops, strict=True):
        triples = [*zip(key.inputs, left.inputs, right.inputs, strict=True)]
        triples += [
            (a, b, c)
            for a, b, c in zip(key.outputs, left.outputs, right.outputs, strict=True)
            if a is not None and b is not None and c is not None
        ]
        for value, one, two in triples:
            pairs = zip(one.spec.shape, two.spec.shape, strict=True)
            found[value] = one.spec.shape, tuple((b - a) / (rows[1] - rows[0]) for a, b in pairs)
    return found


def at_width(narrow: Mapping[Value, Affine], wide: Mapping[Value, Affine], share: float) -> dict[Value, Affine]:
    """Extents between (0) or beyond (1) two widths: affine in the width as well."""

    def between(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
        return tuple(a + share * (b - a) for a, b in zip(left, right, strict=True))

    return {
        value: (between(base, wide[value][0]), between(slopes, wide[value][1]))
        for value, (base, slopes) in narrow.items()
    }


@dataclass
class WorkMaker:
    """Makes the works of a model's pieces for any degrees and micro-batch, keeping what was made."""

    model: CutModel
    solver: PieceSolver
    shapes: Mapping[Value, Affine] | None = None  # of values of the base program, if not those of the model's captures
    _made: dict[object, tuple[LayerWork, ...] | str] = field(default_factory=dict)  # or why there are none
    _checked: dict[object, Shards] = field(default_factory=dict)
    _positions: dict[Value, int] = field(default_factory=dict)
    _scattered_of: dict[int, tuple[Layout, set[Value]]] = field(default_factory=dict)

    # Of each piece: what is saved, what selective recomputation keeps, and what it runs again.
    _kept_of: dict[Piece, tuple[list[Value], list[Value], list[tuple[int, Op]]]] = field(default_factory=dict)

    _local_of: dict[tuple[int, int, int], Local] = field(default_factory=dict)
    _passes_of: dict[tuple[int, ...], list[list[tuple[int, Op]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base, other = self.model.programs[:2]
        self._shapes = self.shapes or fitted(base, base, other, self.model.rows)
        self._roots: dict[Value, Value] = {}
        for op in base.ops:
            if is_view(op) and op.inputs:
                self._roots.update({v: self.root(op.inputs[0]) for v in op.outputs if v is not None})

    def root(self, value: Value) -> Value:
        """The value that ``value`` is a view of."""
        return self._roots.get(value, value)

    def works(self, *, tensor: int, context: int, sequence_parallel: bool, micro_batch: int) -> tuple[LayerWork, ...]:
        """One work for each piece of the model.

        Raises:
            InfeasibleError: these degrees permit no placements.
        """
        key = (tensor, context, sequence_parallel, micro_batch)
        if key not in self._made:
            try:
                self._made[key] = self._make(tensor, context, sequence_parallel, micro_batch)
            except InfeasibleError as error:
                self._made[key] = str(error)
        found = self._made[key]
        if isinstance(found, str):
            raise InfeasibleError(found)
        return found

    def _shards(self, tensor: int, context: int, sequence_parallel: bool) -> Shards:
        """Placements of these degrees, checked; the same for every micro-batch."""
        key = (tensor, context, sequence_parallel)
        if key not in self._checked:
            layouts = [self.solver.layout(tensor, sequence=sequence_parallel)]
            if context > 1:
                layouts.append(self.solver.layout(context, sequence=True, axis="context"))
                check_composes(self.model, layouts)
            if self.shapes is not None:
                self._check_shares(layouts)
            self._checked[key] = Shards(tuple(layouts))
        return self._checked[key]

    def _make(self, tensor: int, context: int, sequence_parallel: bool, micro_batch: int) -> tuple[LayerWork, ...]:
        shards = self._shards(tensor, context, sequence_parallel)
        return tuple(self._work(piece, shards, micro_batch) for piece in self.model.pieces)

    def _check_shares(self, layouts: Sequence[Layout]) -> None:
        """Placements of another width hold only where its extents divide as well."""
        for layout in layouts:
            for value in (*layout.lays, *(value for value in self._shapes if value.name in layout.parameter_lays)):
                lay = layout.lay_of(value)
                if isinstance(lay, tuple) and value in self._shapes:
                    extent = self.shape(value, (), 1)[lay[0]]
                    if extent * min(lay[1]) / sum(lay[1]) % layout.size > 1e-6:
                        raise InfeasibleError(
                            f"{value.name} has {extent:.0f} entries along dim {lay[0]}, which {layout.size} workers "
                            "cannot share equally"
                        )

    # -- local sizes -------------------------------------------------------------------------------------------------

    def shape(self, value: Value, lays: Iterable[tuple[Lay | None, int]], rows: int) -> tuple[float, ...]:
        """Local extents of ``value`` in ``rows`` samples."""
        base, slopes = self._shapes[value]
        more = rows - self.model.rows[0]
        extents = [extent + slope * more for extent, slope in zip(base, slopes, strict=True)]
        for lay, size in lays:
            if isinstance(lay, tuple):
                extents[lay[0]] /= size
        return tuple(extents)

    def num_bytes(self, value: Value, lays: Iterable[tuple[Lay | None, int]], rows: int) -> float:
        return math.prod(self.shape(value, lays, rows)) * value.spec.dtype.itemsize

    # -- one piece -----------------------------------------------------------------------------------------------------

    def _work(self, piece: Piece, shards: Shards, rows: int) -> LayerWork:
        ops = self.model.programs[0].ops
        of_phase = {
            Phase.FORWARD: [(place, ops[place]) for place in piece.forward],
            Phase.BACKWARD: [(place, ops[place]) for place in piece.backward],
        }
        made = {v for _, op in of_phase[Phase.FORWARD] for v in op.outputs if v is not None}

        def whole(value: Value) -> float:
            return self.num_bytes(value, (), rows)

        if piece not in self._kept_of:  # whatever the degrees and rows
            found = self._saved(piece, made)
            self._kept_of[piece] = found, *self._selective(piece, found, made)
        saved, kept, again = self._kept_of[piece]
        if sum(map(whole, kept)) >= sum(map(whole, saved)):
            kept, again = saved, []
        items = {phase: tuple(self._items(own, shards, rows)) for phase, own in of_phase.items()}
        moved = {phase: tuple(self._exchanges(piece, phase, shards, rows)) for phase in of_phase}
        inputs = [value for value in self._entering(piece) if self.solver.is_boundary(value)]

        def elements(values: Iterable[Value]) -> float:
            return sum(math.prod(self.shape(value, shards.lays(value), rows)) for value in values)

        trained = elements(value for value in self.parameters(piece) if value.name in self.model.gradients)

        def stored(values: Iterable[Value]) -> float:
            return sum(self._stored_bytes(value, shards, rows) for value in values)

        return LayerWork(
            name="head" if piece.name == "output" else piece.name,
            forward=items[Phase.FORWARD] + moved[Phase.FORWARD],
            backward=items[Phase.BACKWARD] + moved[Phase.BACKWARD] + (_accumulation(trained),),
            parameter_elements=elements(self.parameters(piece)),
            saved_bytes=stored(saved),
            selective_bytes=stored(kept),
            boundary_bytes=stored(inputs),
            selective=tuple(self._items(again, shards, rows)),
            temporary_bytes=max(
                (self._op_bytes(place, op, shards, rows) for place, op in of_phase[Phase.BACKWARD]), default=0.0
            ),
        )

    def _stored_bytes(self, value: Value, shards: Shards, rows: int) -> float:
        """Of a kept value; of a sum that the forward pass reduces and scatters, the scattered share is what is kept."""
        num_bytes = self.num_bytes(value, shards.lays(value), rows)
        for layout in shards.layouts:
            if layout.lay_of(value) == P and value in self._scattered(layout):
                num_bytes /= layout.size
        return num_bytes

    def _scattered(self, layout: Layout) -> set[Value]:
        key = id(layout)
        if key not in self._scattered_of:
            turned = (one for one, _ in layout.conversions if one.phase is Phase.FORWARD and one.source == P)
            self._scattered_of[key] = layout, {self.root(one.value) for one in turned if isinstance(one.target, tuple)}
        return self._scattered_of[key][1]

    def parameters(self, piece: Piece) -> list[Value]:
        """Parameters that the piece reads."""
        ops = self.model.programs[0].ops
        read = dict.fromkeys(value for place in piece.ops for value in ops[place].inputs)
        return [value for value in read if value.producer is None and value.name in self.model.parameters]

    def _entering(self, piece: Piece) -> list[Value]:
        """Values that the piece's forward ops read and others made."""
        ops = self.model.programs[0].ops
        inside = {ops[place] for place in piece.ops}
        read = dict.fromkeys(value for place in piece.forward for value in ops[place].inputs)
        return [value for value in read if value.producer is not None and value.producer not in inside]

    def _saved(self, piece: Piece, made: set[Value]) -> list[Value]:
        ops = self.model.programs[0].ops
        entering = {self.root(value) for value in self._entering(piece) if self.solver.is_boundary(value)}
        found: dict[Value, None] = {}
        for place in piece.backward:
            for value in ops[place].inputs:
                root = self.root(value)
                if root in made or root in entering:
                    found[root] = None
        return self._without_remade(piece, list(found), made, entering)

    def _without_remade(
        self, piece: Piece, saved: Sequence[Value], made: set[Value], entering: set[Value]
    ) -> list[Value]:
        """``saved`` without what the backward kernels make again as they read: results of element-wise ops that only
        fused passes read, if the inputs they lead back to take no more bytes (as partitioners of joint graphs do: Chen
        et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 3, at no cost)."""
        ops = self.model.programs[0].ops
        fixed = {
            self.root(value)
            for place in piece.backward
            for value in ops[place].inputs
            if not is_view(ops[place]) and not self._is_fused(ops[place])
        }
        kept = dict.fromkeys(saved)
        for value in sorted(saved, key=self._position, reverse=True):
            leaves = None if value in fixed else self._leaves(value, kept, made, entering)
            if leaves is None:
                continue
            more = [leaf for leaf in leaves if leaf not in kept]
            if sum(self._whole_bytes(leaf) for leaf in more) <= self._whole_bytes(value):
                del kept[value]
                kept.update(dict.fromkeys(more))
        return list(kept)

    def _leaves(
        self, value: Value, kept: Mapping[Value, None], made: set[Value], entering: set[Value]
    ) -> list[Value] | None:
        """Values other than ``value`` from which element-wise ops make it; None if something else made it."""
        found: dict[Value, None] = {}
        stack = [value]
        while stack:
            one = stack.pop()
            op = one.producer if one in made else None
            is_remade = op is not None and is_pointwise(op.call) and not op.call.is_random
            if one is value and not is_remade:
                return None
            if op is not None and is_remade and (one is value or one not in kept):
                stack += [self.root(read) for read in op.inputs]
            elif one in made or one in entering:  # weights and values shared by all blocks are there anyhow
                found[one] = None
        return list(found)

    def _is_fused(self, op: Op) -> bool:
        """Element-wise ops, and sums over them."""
        return is_pointwise(op.call) or op.call.base_name in ("sum", "mean")

    def _position(self, value: Value) -> int:
        if not self._positions:
            ops = self.model.programs[0].ops
            self._positions.update({v: place for place, op in enumerate(ops) for v in op.outputs if v is not None})
        return self._positions.get(value, -1)

    def _whole_bytes(self, value: Value) -> float:
        return self.num_bytes(value, (), self.model.rows[0])

    def _selective(
        self, piece: Piece, saved: Sequence[Value], made: set[Value]
    ) -> tuple[list[Value], list[tuple[int, Op]]]:
        """What selective recomputation keeps, and the ops that it runs again."""
        ops = self.model.programs[0].ops
        place_of = {ops[place]: place for place in piece.forward}
        kept: dict[Value, None] = {}
        again: dict[int, Op] = {}
        stack = list(saved)
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            op = value.producer
            if op is None or op not in place_of or not self._is_cheap(op):
                if value in made or (op is not None and self.solver.is_boundary(value)):
                    kept[value] = None
                continue
            again[place_of[op]] = op
            stack += [self.root(v) for v in op.inputs if v.producer is not None]
        return list(kept), sorted(again.items())

    def _is_cheap(self, op: Op) -> bool:
        """Whether running the op again costs little for what it saves: a pass over memory, a product of activations."""
        if is_attention(op.call) or "convolution" in op.call.base_name:
            return False
        if op.call.base_name in _PRODUCTS:
            return not any(self.root(v).producer is None for v in op.inputs)
        return not op.call.is_random

    # -- items ---------------------------------------------------------------------------------------------------------

    def _ways(self, place: int, op: Op, shards: Shards) -> list[tuple[Way, int]]:
        whole = Way((R,) * len(op.inputs), (R,) * len(op.outputs))
        return [(layout.ways.get(place, whole), layout.size) for layout in shards.layouts]

    def _local(self, place: int, op: Op, shards: Shards, rows: int) -> Local:
        """Local shapes of the op's inputs and outputs."""
        key = (place, id(shards), rows)  # shards live as long as their maker
        if key not in self._local_of:
            ways = self._ways(place, op, shards)
            self._local_of[key] = (
                [self.shape(v, [(way.inputs[i], size) for way, size in ways], rows) for i, v in enumerate(op.inputs)],
                [
                    self.shape(v, [(way.outputs[i], size) for way, size in ways], rows) if v is not None else ()
                    for i, v in enumerate(op.outputs)
                ],
            )
        return self._local_of[key]

    def _op_bytes(self, place: int, op: Op, shards: Shards, rows: int) -> float:
        """Bytes that exist while a backward op runs, weights apart."""
        if is_view(op):
            return 0.0
        inputs, outputs = self._local(place, op, shards, rows)
        pairs = [*zip(op.inputs, inputs, strict=True), *zip(op.outputs, outputs, strict=True)]
        return sum(
            math.prod(shape) * value.spec.dtype.itemsize
            for value, shape in pairs
            if value is not None and self.root(value).producer is not None
        )

    def _items(self, ops: Sequence[tuple[int, Op]], shards: Shards, rows: int) -> Iterator[Item]:
        passes: list[tuple[int, Op]] = []
        for place, op in ops:
            if is_view(op) or op.call.base_name in _FREE or not op.inputs:
                continue
            kernels = self._kernels(place, op, shards, rows)
            if kernels is None:
                passes.append((place, op))
            else:
                yield from kernels
        yield from self._passes(passes, shards, rows)

    def _kernels(self, place: int, op: Op, shards: Shards, rows: int) -> list[Kernel] | None:
        """Products and attention; None for what only passes over memory."""
        name = op.call.base_name
        inputs, outputs = self._local(place, op, shards, rows)
        dtype = str(op.inputs[0].spec.dtype).removeprefix("torch.")
        itemsize = op.inputs[0].spec.dtype.itemsize
        if name in _PRODUCTS:
            left, right = inputs[_PRODUCTS[name]], inputs[_PRODUCTS[name] + 1]
            batch = left[0] if len(left) == 3 else 1
            return [product(batch, left[-2], right[-1], left[-1], dtype, itemsize)]
        if name in ("convolution", "convolution_backward"):
            backward = name.endswith("backward")
            images, weight = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])
            result = inputs[0] if backward else outputs[0]
            m, n, k = math.prod(result) / max(result[1], 1), result[1], math.prod(weight[1:])
            del images
            one = product(1, m, n, k, dtype, itemsize)
            return [one, one] if backward else [one]
        if is_attention(op.call):
            return [self._attention(op, inputs, dtype, itemsize)]
        return None

    def _attention(self, op: Op, shapes: Sequence[tuple[float, ...]], dtype: str, itemsize: int) -> Kernel:
        backward = op.call.base_name.endswith("_backward")
        first = 1 if backward else 0
        query, key, value = shapes[first : first + 3]
        scores = query[0] * query[1] * query[2] * key[2]
        flops = 2.0 * scores * (query[3] + value[3]) * (0.5 if op.call.schema_argument("is_causal", False) else 1.0)
        num_bytes = itemsize * (2 * math.prod(query) + math.prod(key) + math.prod(value))
        return Kernel(
            kind="attention",
            flops=flops * (2.5 if backward else 1.0),
            num_bytes=num_bytes * (2 if backward else 1),
            dtype=dtype,
            num_launches=3 if backward else 1,
        )

    def _passes(self, ops: Sequence[tuple[int, Op]], shards: Shards, rows: int) -> Iterator[Kernel]:
        """Element-wise ops that read each other's results are one pass."""
        key = tuple(place for place, _ in ops)
        if key not in self._passes_of:
            self._passes_of[key] = self._grouped(ops)
        readers = self._readers()
        for inside in self._passes_of[key]:
            own = {op for _, op in inside}
            read: dict[Value, float] = {}
            written = 0.0
            for place, op in inside:
                inputs, outputs = self._local(place, op, shards, rows)
                for value, shape in zip(op.inputs, inputs, strict=True):
                    if self.root(value).producer not in own:
                        read[self.root(value)] = self._read_bytes(op, value, shape, outputs)
                for output, shape in zip(op.outputs, outputs, strict=True):
                    if output is not None and (not readers[output] or readers[output] - own):
                        written += math.prod(shape) * output.spec.dtype.itemsize
            yield Kernel(kind="memory", num_bytes=sum(read.values()) + written)

    def _grouped(self, ops: Sequence[tuple[int, Op]]) -> list[list[tuple[int, Op]]]:
        """The ops of each pass, whatever the degrees and rows."""
        group: dict[Op, int] = {}
        members: dict[int, list[tuple[int, Op]]] = defaultdict(list)
        for place, op in ops:
            makers = (self.root(value).producer for value in op.inputs)
            joined = next((group[m] for m in makers if m in group and is_pointwise(m.call)), None)
            group[op] = joined if joined is not None and is_pointwise(op.call) else len(members)
            members[group[op]].append((place, op))
        return list(members.values())

    def _read_bytes(self, op: Op, value: Value, shape: tuple[float, ...], outputs: list[tuple[float, ...]]) -> float:
        """What an op reads of a value: of a table in which it looks up rows, as much as it writes."""
        if op.call.base_name in ("embedding", "index_select", "gather", "index") and value is op.inputs[0]:
            return math.prod(outputs[0]) * value.spec.dtype.itemsize
        return math.prod(shape) * value.spec.dtype.itemsize

    def _readers(self) -> dict[Value, set[Op]]:
        """Ops that read a value or a view of it (views themselves apart)."""
        if not hasattr(self, "_readers_kept"):
            found: dict[Value, set[Op]] = defaultdict(set)
            for op in self.model.programs[0].ops:
                if not is_view(op):
                    for value in op.inputs:
                        found[self.root(value)].add(op)
                        found[value].add(op)
            self._readers_kept = found
        return self._readers_kept

    def _exchanges(self, piece: Piece, phase: Phase, shards: Shards, rows: int) -> Iterator[Exchange]:
        places = set(piece.ops)
        for layout in shards.layouts:
            others = [other for other in shards.layouts if other is not layout]
            for conversion_, place in layout.conversions:
                if place not in places or conversion_.phase is not phase:
                    continue
                kind = conversion(conversion_.source, conversion_.target)
                if kind:
                    lays = [(other.lay_of(conversion_.value), other.size) for other in others]
                    num_bytes = self.num_bytes(conversion_.value, lays, rows)
                    yield Exchange(kind=kind, num_bytes=num_bytes, axis=layout.axis)  # type: ignore[arg-type]


def product(batch: float, m: float, n: float, k: float, dtype: str, itemsize: int) -> Kernel:
    """The kernel of ``[batch] m x k @ k x n``."""
    return Kernel(
        kind="matmul",
        flops=2.0 * batch * m * n * k,
        num_bytes=itemsize * batch * (m * k + k * n + m * n),
        batch=max(1, round(batch)),
        m=max(1, round(m)),
        n=max(1, round(n)),
        k=max(1, round(k)),
        dtype=dtype,
    )


def _accumulation(num_elements: float) -> Kernel:
    """Adding a micro-batch's gradients to those kept in four bytes, done by the kernels that make them."""
    return Kernel(kind="memory", num_bytes=8.0 * num_elements, num_launches=0)


def check_composes(model: CutModel, layouts: Sequence[Layout]) -> None:
    """Dims that two axes cut must divide by both together.

    Raises:
        InfeasibleError: one does not.
    """
    for place, op in enumerate(model.programs[0].ops):
        ways = [(layout.ways[place], layout.size) for layout in layouts if place in layout.ways]
        for index, value in enumerate(op.inputs):
            for dim, extent in enumerate(value.spec.shape):
                cut = [s for way, s in ways if isinstance(lay := way.inputs[index], tuple) and lay[0] == dim]
                if len(cut) > 1 and extent % math.prod(cut):
                    raise InfeasibleError(
                        f"dim {dim} of {value.name} has {extent} entries, which {math.prod(cut)} workers cannot share"
                    )


def dtype_of(model: CutModel) -> torch.dtype:
    """Type of most parameter elements."""
    counts: dict[torch.dtype, int] = defaultdict(int)
    for item in model.parameters.values():
        counts[item.dtype] += math.prod(item.shape)
    return max(counts, key=lambda dtype: counts[dtype])


__all__ = ["Conversion", "Shards", "WorkMaker", "check_composes", "dtype_of", "product"]

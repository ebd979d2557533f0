"""A captured step cut into pieces: one for each kind of repeated block, and one for each stretch of ops around them.

The forward ops of a member of a list (see `partita.graph.shallow`) are those that its modules called, and those that
its surroundings run between it and the next member (a residual sum in the loop over the blocks). What lies before,
between and after the lists are *gaps*. Backward ops go to the piece whose modules they belong to, or, outside all
members, to the gap or member in whose turn they run.

The *chain* lists the pieces in model order, each with its multiplicity: what pipeline stages are cut from. Values that
pass from one member to the next are *boundary* values; other values of the same shape that cross pieces count as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from partita.errors import InputError
from partita.graph.graph import Graph, Input, InputKind, OutputKind, Phase
from partita.graph.shallow import Members, ShallowCapture, owning_member
from partita.planner.scale.decompose import taken_apart
from partita.sharding.calls import Op, Program, Value, read_graph


@dataclass(frozen=True, eq=False)
class Piece:
    """Ops of one kind of block, or of one gap.

    Attributes:
        name: path pattern of the block (``"model.layers.*"``), or of what the gap lies between.
        forward, backward: positions of its ops in `CutModel.programs`.
        is_gap: whether it runs once and is no block.
    """

    name: str
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    is_gap: bool

    @property
    def ops(self) -> tuple[int, ...]:
        return self.forward + self.backward


@dataclass(frozen=True, eq=False)
class CutModel:
    """The step as pieces.

    Attributes:
        programs: the step at several micro-batch sizes, op by op the same; ``programs[0]`` is the base.
        rows: micro-batch size of each program.
        pieces: every kind of block and every gap once.
        chain: ``(index of piece, name)`` in model order: a block once per member, gaps once.
        parameters: node name -> full name.
        gradients: node name of a parameter -> the value that is its gradient.
        boundary_shapes: shapes, at the base, of values that pass from member to member.
        path_of: member's captured path -> pattern, to name parameters.
        reason: why the whole model had to be captured, or "".
    """

    programs: tuple[Program, ...]
    rows: tuple[int, ...]
    pieces: tuple[Piece, ...]
    chain: tuple[tuple[int, str], ...]
    parameters: dict[str, Input]
    gradients: dict[str, Value]
    boundary_shapes: frozenset[tuple[int, ...]]
    path_of: dict[str, str]
    reason: str

    def phase(self, index: int) -> Phase:
        return _phase(self.programs[0].ops[index])

    def parameter_name(self, node: str) -> str:
        """Full name with the member's number replaced by ``*``."""
        name = self.parameters[node].name
        for path, pattern in self.path_of.items():
            if name.startswith(path + "."):
                return pattern + name[len(path) :]
        return name


def cut_model(captures: Sequence[ShallowCapture], rows: Sequence[int]) -> CutModel:
    """Pieces of the captures of one model at ``rows`` samples per micro-batch (the first is the base).

    Raises:
        InputError: the captures differ in more than extents.
    """
    programs = [taken_apart(read_graph(capture.graph.module), capture.graph.module) for capture in captures]
    base, first = captures[0], programs[0]
    for program, num_rows in zip(programs[1:], rows[1:], strict=True):
        if [op.call.name for op in program.ops] != [op.call.name for op in first.ops]:
            raise InputError(
                "a micro-batch of any size must run the same ops, but the step's ops differ between "
                f"{rows[0]} and {num_rows} samples; make the model independent of the number of samples"
            )
    owners = _owners(first, base)
    backward = [_phase(op) is Phase.BACKWARD for op in first.ops]
    pieces, chain, path_of = _pieces(base.lists, owners, backward)
    graph = base.graph
    return CutModel(
        programs=tuple(programs),
        rows=tuple(rows),
        pieces=tuple(pieces),
        chain=tuple(chain),
        parameters={item.node: item for item in graph.inputs_of(InputKind.PARAMETER)},
        gradients=_gradients(graph, first),
        boundary_shapes=_boundary_shapes(first, owners, base.lists),
        path_of=path_of,
        reason=base.reason,
    )


def _phase(op: Op) -> Phase:
    return op.info.phase if op.info is not None else Phase.FORWARD


def _gradients(graph: Graph, program: Program) -> dict[str, Value]:
    nodes = {item.name: item.node for item in graph.inputs_of(InputKind.PARAMETER)}
    found = {}
    for output, value in zip(graph.outputs, program.outputs, strict=True):
        if output.kind is OutputKind.GRADIENT and isinstance(value, Value):
            found[nodes[output.target]] = value
    return found


# -- who owns an op --------------------------------------------------------------------------------------------------

_Owner = str | int  # path of a captured member, or number of a gap: how many lists lie before it


def _owners(program: Program, capture: ShallowCapture) -> list[_Owner]:
    """The member or gap of every op."""
    list_of = {path: number for number, members in enumerate(capture.lists) for path in members.captured}
    inside = [owning_member(op.info, _same(list_of)) if op.info is not None else "" for op in program.ops]
    owners: list[_Owner] = [0] * len(inside)
    for phase, ahead in ((Phase.FORWARD, True), (Phase.BACKWARD, False)):
        places = [index for index, op in enumerate(program.ops) if _phase(op) is phase]
        for run, owner in _runs([(index, inside[index]) for index in places], list_of, ahead, program):
            for index in run:
                owners[index] = owner
    return owners


def _same(list_of: dict[str, int]) -> dict[str, str]:
    return {path: path for path in list_of}


def _runs(
    ops: list[tuple[int, str]], list_of: dict[str, int], ahead: bool, program: Program
) -> list[tuple[list[int], _Owner]]:
    """Ops of one phase with their owners. Between two members of one list (in either direction of travel), ops outside
    belong to the member that ran last; after the last member of a list, as many ops as that pattern had."""
    runs: list[tuple[list[int], str]] = []
    for index, path in ops:
        if runs and runs[-1][1] == path:
            runs[-1][0].append(index)
        else:
            runs.append(([index], path))
    glue: dict[int, list[str]] = {}
    found: list[tuple[list[int], _Owner]] = []
    num_lists = max(list_of.values(), default=-1) + 1
    gap, last = (0 if ahead else num_lists), ""
    for number, (indices, path) in enumerate(runs):
        if path:
            found.append((indices, path))
            gap, last = list_of[path] + (1 if ahead else 0), path
            continue
        following = next((p for _, p in runs[number + 1 :] if p), "")
        names = [program.ops[index].call.name for index in indices]
        if last and following and list_of[following] == list_of[last]:
            found.append((indices, last))
            if following != last:
                glue[list_of[last]] = names
            continue
        pattern = glue.get(list_of[last], []) if last else []
        length = len(pattern) if pattern and names[: len(pattern)] == pattern else 0
        if length:
            found.append((indices[:length], last))
        found.append((indices[length:], gap))
    return found


def _pieces(
    lists: Sequence[Members], owners: Sequence[_Owner], is_backward: Sequence[bool]
) -> tuple[list[Piece], list[tuple[int, str]], dict[str, str]]:
    places: dict[_Owner, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, owner in enumerate(owners):
        places[owner][int(is_backward[index])].append(index)
    pieces: list[Piece] = []
    chain: list[tuple[int, str]] = []
    path_of: dict[str, str] = {}

    def add(owner: _Owner, name: str, is_gap: bool) -> int:
        forward, backward = places[owner]
        pieces.append(Piece(name, tuple(forward), tuple(backward), is_gap))
        return len(pieces) - 1

    names = [members.container for members in lists]
    for gap in range(len(lists) + 1):
        if gap in places:
            name = _gap_name(gap, names)
            chain.append((add(gap, name, True), name))
        if gap == len(lists):
            break
        members = lists[gap]
        of_kind: dict[int, int] = {}
        several = len(set(members.kinds)) > 1
        for kind in sorted(set(members.kinds)):
            captured = members.captured_of(kind)
            pattern = (f"{members.container}." if members.container else "") + "*" + (f"[{kind}]" if several else "")
            of_kind[kind] = add(captured[min(1, len(captured) - 1)], pattern, False)
            path_of.update({path: pattern for path in captured})
        chain += [(of_kind[kind], path) for path, kind in zip(members.paths, members.kinds, strict=True)]
    return pieces, chain, path_of


def _gap_name(gap: int, containers: Sequence[str]) -> str:
    """``input`` before all lists, ``output`` after them, else what it lies between; ``model`` if there are no lists."""
    if not containers:
        return "model"
    if gap in (0, len(containers)):
        return "input" if gap == 0 else "output"
    return f"{containers[gap - 1]}..{containers[gap]}"


def _boundary_shapes(
    program: Program, owners: Sequence[_Owner], lists: Sequence[Members]
) -> frozenset[tuple[int, ...]]:
    """Shapes of forward values that one member of a list makes and another of the same list reads."""
    list_of = {path: number for number, members in enumerate(lists) for path in members.captured}
    shapes = set()
    place = {op: index for index, op in enumerate(program.ops)}
    for index, op in enumerate(program.ops):
        reader = owners[index]
        if _phase(op) is not Phase.FORWARD or not isinstance(reader, str):
            continue
        for value in op.inputs:
            maker = owners[place[value.producer]] if value.producer is not None else 0
            passes = isinstance(maker, str) and maker != reader and list_of[maker] == list_of[reader]
            if passes and value.spec.dtype.is_floating_point:
                shapes.add(value.spec.shape)
    return frozenset(shapes)

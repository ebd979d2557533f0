"""From a captured graph and a mesh to an `IntraProblem`, and back from its solution to `Decisions`.

Every op gets the ways that its sharding rules allow on every axis (`partita.planner.intra.ways`), every input the
ways of storing it (`partita.planner.intra.storage`), every value the conversions between all placements that
somebody gives or wants. Data, tensor, sequence, expert and fully sharded parallelism are not known here: they come out.

Example:
    >>> stage = stage_from_graph(graph, {"data": 2, "tensor": 2}, costs=costs)      # doctest: +SKIP
    >>> decisions = stage.decisions(solve_intra(stage.problem))                     # doctest: +SKIP
    >>> decisions.inputs["p_weight"], decisions.rules["mm"]                         # doctest: +SKIP
    ((Replicate(), Shard(1, (8, 8))), ("S0 R -> S0", "R S1 -> S1"))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.errors import InputError
from partita.graph.graph import Graph
from partita.planner.intra.build import Builder, StageCosts
from partita.planner.intra.problem import IntraProblem
from partita.planner.intra.reading import Item
from partita.planner.intra.solve import IntraSolution
from partita.planner.intra.storage import Storage
from partita.planner.intra.ways import (
    MeshPlacement,
    Way,
)


@dataclass(frozen=True)
class Decisions:
    """What lowering needs to know.

    Attributes:
        axes: names of the mesh axes, in order.
        rules: op name -> text of the rule per axis; each is a rule of the call that the axes before it leave.
        inputs: placeholder name -> placement per axis.
        updates: parameter's placeholder name -> placement per axis in which its optimizer state and update lie.
        taken_apart: ops that run decomposed; their inner ops are in ``rules``.
        recompute: paths of the modules whose forward runs again in the backward window.
        saved: value name -> placement per axis in which it waits for the backward window.
    """

    axes: tuple[str, ...]
    rules: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, MeshPlacement]
    updates: Mapping[str, MeshPlacement]
    taken_apart: tuple[str, ...]
    recompute: tuple[str, ...]
    saved: Mapping[str, MeshPlacement]


@dataclass(frozen=True)
class Stage:
    """An `IntraProblem` and what its indices stand for."""

    axes: tuple[str, ...]
    problem: IntraProblem
    items: tuple[Item | None, ...]  # by op; None for the sink of the loss
    ways: tuple[tuple[Way, ...], ...]  # by op and choice
    names: tuple[str, ...]  # placeholder by input
    stored: tuple[tuple[Storage, ...], ...]  # by input and choice
    blocks: tuple[str, ...]
    taken_apart: tuple[str, ...]

    def placement(self, value: int, index: int) -> MeshPlacement:
        """What a placement index of a value stands for."""
        found = self.problem.values[value].placements[index]
        assert isinstance(found, tuple)
        return found

    def decisions(self, solution: IntraSolution) -> Decisions:
        """The decisions of a solution, by names of the graph."""
        taken = solution.assignment
        rules = {
            item.op.name: ways[choice].rules
            for item, ways, choice in zip(self.items, self.ways, taken.ops, strict=True)
            if item is not None and not item.again
        }
        kept = [options[choice] for options, choice in zip(self.stored, taken.inputs, strict=True)]
        values = self.problem.values
        return Decisions(
            axes=self.axes,
            rules=rules,
            inputs={name: option.stored for name, option in zip(self.names, kept, strict=True)},
            updates={n: o.updated for n, o in zip(self.names, kept, strict=True) if o.returned is not None},
            taken_apart=self.taken_apart,
            recompute=tuple(path for path, again in zip(self.blocks, taken.recompute, strict=True) if again),
            saved={values[v].name: self.placement(v, place) for v, place in taken.saved.items()},
        )


def stage_from_graph(
    graph: Graph,
    mesh: Mapping[str, int],
    *,
    costs: StageCosts,
    memory_bytes: int | None = None,
    state_bytes_per_element: float = 8.0,
    num_microbatches: int = 1,
    num_in_flight: int = 1,
    hidden_share: float = 0.0,
    recompute: bool = True,
    rows: bool = True,
) -> Stage:
    """The planning problem of running `graph` on `mesh`.

    Args:
        mesh: axis name -> number of workers, outermost first.
        state_bytes_per_element: of the optimizer (Adam in float32: 8).
        recompute: whether repeated blocks may be recomputed.
        rows: whether the batch may come in with its rows cut (over no axis where others, outside of this mesh, do so).
        memory_bytes, num_microbatches, num_in_flight, hidden_share: as in `IntraProblem`. The graph is that of one
            microbatch.
    """
    if not mesh or any(size < 1 for size in mesh.values()):
        raise InputError(f"a mesh must have axes with at least one worker each, but got {dict(mesh)}")
    builder = Builder(graph, mesh, costs, recompute, num_microbatches, state_bytes_per_element, rows)
    problem = IntraProblem(
        values=tuple(builder.values),
        ops=tuple(builder.ops),
        inputs=tuple(builder.inputs),
        num_blocks=len(builder.blocks),
        memory_bytes=memory_bytes,
        hidden_share=hidden_share,
        num_microbatches=num_microbatches,
        num_in_flight=num_in_flight,
    )
    return Stage(
        axes=tuple(mesh),
        problem=problem,
        items=tuple(builder.items),
        ways=tuple(builder.ways_of_ops),
        names=tuple(builder.names),
        stored=tuple(builder.stored),
        blocks=tuple(builder.blocks),
        taken_apart=tuple(builder.listing.taken_apart),
    )

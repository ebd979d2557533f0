"""Other placements of a module's parameters for described GPUs, with their predicted step times.

For each parameter and each other placement (whole, or cut along another dim), the placements of its block are solved
again with that one fixed; the works that come of it are priced like all others on the plan's own degrees and stages.
"""

from __future__ import annotations

import dataclasses

from partita.cost.kernels import LayerWork
from partita.cost.networks import Fabric
from partita.errors import InfeasibleError, PlanError
from partita.plan import Plan
from partita.planner.scale.placements import solve
from partita.planner.scale.plan import ScalePlanner
from partita.planner.scale.solve_pieces import Layout as PieceLayout
from partita.planner.scale.solve_pieces import PieceSolver
from partita.planner.scale.step import Degrees, StepPrediction, predict_step
from partita.planner.scale.ways import PLAIN, Lay, R, lay_text
from partita.planner.scale.works import WorkMaker
from partita.planner.why import Other, Why, is_in, why_in_plan
from partita.sharding.calls import Value
from partita.units import format_bytes

MOST_PARAMETERS = 12


def why_at_scale(plan: Plan, planner: ScalePlanner, fabric: Fabric, name: str) -> Why:
    """`why_in_plan`, with the prices of other placements.

    Raises:
        PlanError: the plan is of another model.
        InputError: there is nothing called `name`.
    """
    if plan.graph_fingerprint != planner.fingerprint:
        raise PlanError(
            f"The plan must be of the given model and batch, but its fingerprint is {plan.graph_fingerprint}, theirs "
            f"is {planner.fingerprint}. Give the target that the plan was made from."
        )
    found = why_in_plan(plan, name)
    tensor = plan.axes.get("tensor", 1)
    if tensor == 1:
        note = "no tensor axis, so nothing is placed otherwise; the plan's alternatives have other degrees."
        return dataclasses.replace(found, notes=(*found.notes, note))
    pricer = _Pricer(plan, planner, fabric)
    now = pricer.price(planner.maker)
    base = planner.maker.solver.layout(tensor, sequence=plan.sequence_parallel)
    others: list[Other] = []
    wanted = [value for value in _parameters(planner) if is_in(planner.model.parameter_name(value.name), name)]
    notes = found.notes
    if len(wanted) > MOST_PARAMETERS:
        notes += (f"tried for the first {MOST_PARAMETERS} of {len(wanted)} parameters; name a smaller module",)
    for value in wanted[:MOST_PARAMETERS]:
        others += [pricer.other(value, lay, base, now) for lay in _lays(value, tensor, base)]
    others.sort(key=lambda other: (other.slower_s is None, other.slower_s or 0.0))
    return dataclasses.replace(found, others=tuple(others), notes=notes)


def _parameters(planner: ScalePlanner) -> list[Value]:
    found = [value for piece in planner.model.pieces for value in planner.maker.parameters(piece)]
    by_name = {planner.model.parameter_name(value.name): value for value in reversed(found)}
    return [value for value in dict.fromkeys(found) if by_name[planner.model.parameter_name(value.name)] is value]


def _lays(value: Value, size: int, base: PieceLayout) -> list[Lay]:
    now = base.parameter_lays.get(value.name, R)
    plain: list[Lay] = [(dim, PLAIN) for dim, extent in enumerate(value.spec.shape) if extent % size == 0]
    dim = now[0] if isinstance(now, tuple) else -1
    return [lay for lay in [R, *plain] if lay != now and not (isinstance(lay, tuple) and lay[0] == dim)]


class _Pricer:
    def __init__(self, plan: Plan, planner: ScalePlanner, fabric: Fabric) -> None:
        assert plan.layout is not None and plan.micro_batch is not None
        self.plan, self.planner, self.fabric = plan, planner, fabric
        names = [name for _, name in planner.model.chain]
        p, v = len(plan.layout.stages), plan.num_virtual_stages
        self.cuts = [names.index(plan.layout.stages[chunk % p][chunk // p][0]) for chunk in range(p * v)]
        axes = plan.axes
        self.degrees = Degrees(
            data=axes.get("data", 1), tensor=axes.get("tensor", 1), pipeline=p, virtual=v,
            context=axes.get("context", 1),
        )  # fmt: skip
        self.micro_batch = plan.micro_batch

    def price(self, maker: WorkMaker) -> StepPrediction:
        """The plan's step with `maker`'s works."""
        works = maker.works(
            tensor=self.degrees.tensor,
            context=self.degrees.context,
            sequence_parallel=self.plan.sequence_parallel,
            micro_batch=self.micro_batch,
        )
        chain = [piece for piece, _ in self.planner.model.chain]
        ends = [*self.cuts[1:], len(chain)]
        chunks = [_chunk(works, chain[begin:end]) for begin, end in zip(self.cuts, ends, strict=True)]
        return predict_step(
            chunks,
            self.degrees,
            self.fabric,
            num_microbatches=self.plan.num_microbatches,
            schedule="interleaved" if self.plan.num_virtual_stages > 1 else "1f1b",
            remat=self.plan.recompute,
            zero=self.plan.zero_stage,
            state=self.planner.state,
        )

    def other(self, value: Value, lay: Lay, base: PieceLayout, now: StepPrediction) -> Other:
        """`value` placed as `lay`, and its block's other placements chosen anew."""
        name = self.planner.model.parameter_name(value.name)
        instead = lay_text(base.parameter_lays.get(value.name, R))
        try:
            layout = forced(self.planner.maker.solver, base, value, lay)
            solver = self.planner.maker.solver.with_layout(layout, sequence=self.plan.sequence_parallel)
            made = WorkMaker(self.planner.model, solver, self.planner.maker.shapes)
            found = self.price(made)
        except InfeasibleError as error:
            return Other(name=name, instead_of=instead, text=lay_text(lay), time_s=None, slower_s=None, note=str(error))
        more = found.peak_memory_bytes - now.peak_memory_bytes
        note = f"{'+' if more > 0 else '-'}{format_bytes(abs(more))} a GPU" if abs(more) >= 1 else ""
        return Other(
            name=name, instead_of=instead, text=lay_text(lay), time_s=found.step_time_s,
            slower_s=found.step_time_s - now.step_time_s, note=note,
        )  # fmt: skip


def _chunk(works: tuple[LayerWork, ...], pieces: list[int]) -> list[tuple[LayerWork, int]]:
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][0] == piece:
            runs[-1] = (piece, runs[-1][1] + 1)
        else:
            runs.append((piece, 1))
    return [(works[piece], count) for piece, count in runs]


def forced(solver: PieceSolver, base: PieceLayout, value: Value, lay: Lay) -> PieceLayout:
    """`base` with parameter `value` placed as `lay`, and the ops that read it solved again.

    Raises:
        InfeasibleError: no placements are possible with it.
    """
    program = solver.model.programs[0]
    chosen, lays = [], dict(base.parameter_lays)
    read_in = [places for places, _ in base.chosen if any(value in program.ops[place].inputs for place in places)]
    for places, one in base.chosen:
        if places not in read_in:
            chosen.append((places, one))
            continue
        inside = set(places)
        pieces = [piece for piece in solver.model.pieces if piece.ops and set(piece.ops) <= inside]
        elsewhere = {
            item
            for other, _ in base.chosen
            if other != places
            for place in other
            for item in program.ops[place].inputs
            if item.name in lays
        }
        fixed = {item: lays[item.name] for item in elsewhere} | {value: lay}
        again = solve(solver.problem(pieces, base.size, [base.boundary], base.axis, fixed))
        chosen.append((places, again))
        lays.update({item.name: again.lays[item] for item in again.lays if item.name in lays})
    return PieceLayout(base.size, base.axis, base.boundary, tuple(chosen), lays)

"""The fastest placements of one stage's ops on one mesh, within the workers' memory: an integer programme."""

from partita.planner.intra.build import StageCosts
from partita.planner.intra.from_graph import Decisions, Stage, stage_from_graph
from partita.planner.intra.price import Paid, Priced, price
from partita.planner.intra.problem import (
    Assignment,
    Choice,
    Conversion,
    Input,
    InputChoice,
    IntraProblem,
    Op,
    Value,
    Window,
)
from partita.planner.intra.rates import Link, StageRates
from partita.planner.intra.solve import IntraSolution, memory_price_s_per_gib, smallest_peak, solve_intra
from partita.planner.intra.timetable import Timetable, make_timetable

__all__ = [
    "Assignment",
    "Choice",
    "Conversion",
    "Decisions",
    "Input",
    "InputChoice",
    "IntraProblem",
    "IntraSolution",
    "Link",
    "Op",
    "Paid",
    "Priced",
    "Stage",
    "StageCosts",
    "StageRates",
    "Timetable",
    "Value",
    "Window",
    "make_timetable",
    "memory_price_s_per_gib",
    "price",
    "smallest_peak",
    "solve_intra",
    "stage_from_graph",
]

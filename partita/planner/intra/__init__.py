"""The fastest placements of one stage's ops on one mesh, within the workers' memory: an integer programme."""

from partita.planner.intra.price import Priced, price
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
from partita.planner.intra.solve import IntraSolution, memory_price_s_per_gib, smallest_peak, solve_intra
from partita.planner.intra.timetable import Timetable, make_timetable

__all__ = [
    "Assignment",
    "Choice",
    "Conversion",
    "Input",
    "InputChoice",
    "IntraProblem",
    "IntraSolution",
    "Op",
    "Priced",
    "Timetable",
    "Value",
    "Window",
    "make_timetable",
    "memory_price_s_per_gib",
    "price",
    "smallest_peak",
    "solve_intra",
]

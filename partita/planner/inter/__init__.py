"""The inter-stage solver: stages, sub-meshes, microbatches and schedule, with a proof (see `problem` and `solve`)."""

from partita.planner.inter.costs import AdditiveCosts, OpTimes, OptionCosts, StageCosts, StageOption, StageTable
from partita.planner.inter.problem import InterDevice, InterProblem, Links, Value
from partita.planner.inter.solve import InterSolution, InterStage, solve_inter

__all__ = [
    "AdditiveCosts",
    "InterDevice",
    "InterProblem",
    "InterSolution",
    "InterStage",
    "Links",
    "OpTimes",
    "OptionCosts",
    "StageCosts",
    "StageOption",
    "StageTable",
    "Value",
    "solve_inter",
]

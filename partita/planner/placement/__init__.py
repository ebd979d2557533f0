"""Device placement of operator graphs (NeurIPS 2020) and multidimensional pipelines of layers (Piper, NeurIPS 2021)."""

from partita.planner.placement.price import PricedPlacement as PricedPlacement
from partita.planner.placement.price import price_placement as price_placement
from partita.planner.placement.problem import Operator as Operator
from partita.planner.placement.problem import PlacementProblem as PlacementProblem
from partita.planner.placement.problem import read_placement as read_placement
from partita.planner.placement.solve import PlacementSolution as PlacementSolution
from partita.planner.placement.solve import solve_placement as solve_placement

"""Device placement of operator graphs (NeurIPS 2020) and multidimensional pipelines of layers (Piper, NeurIPS 2021)."""

from partita.planner.placement.piper_price import PricedPipeline as PricedPipeline
from partita.planner.placement.piper_price import price_pipeline as price_pipeline
from partita.planner.placement.piper_problem import PiperProblem as PiperProblem
from partita.planner.placement.piper_problem import Stage as Stage
from partita.planner.placement.piper_problem import read_piper as read_piper
from partita.planner.placement.piper_solve import PiperSolution as PiperSolution
from partita.planner.placement.piper_solve import solve_piper as solve_piper
from partita.planner.placement.price import PricedPlacement as PricedPlacement
from partita.planner.placement.price import price_placement as price_placement
from partita.planner.placement.problem import Operator as Operator
from partita.planner.placement.problem import PlacementProblem as PlacementProblem
from partita.planner.placement.problem import read_placement as read_placement
from partita.planner.placement.solve import PlacementSolution as PlacementSolution
from partita.planner.placement.solve import solve_placement as solve_placement

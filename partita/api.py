"""The public functions, gathered: `parallelize` and `plan`."""

from partita.training.parallelize import FallbackWarning, parallelize, plan
from partita.training.step import Step, StepResult

__all__ = ["FallbackWarning", "Step", "StepResult", "parallelize", "plan"]

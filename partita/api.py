"""What users call, gathered: `parallelize` and `plan`, and what they take and give."""

from partita.training.checkpoint.memory import InMemory
from partita.training.checkpoint.saver import Saving
from partita.training.checkpoint.settings import Checkpoints
from partita.training.membership import Elastic
from partita.training.parallelize import FallbackWarning, parallelize, plan
from partita.training.setup import StepResult
from partita.training.step import Step

__all__ = [
    "Checkpoints",
    "Elastic",
    "FallbackWarning",
    "InMemory",
    "Saving",
    "Step",
    "StepResult",
    "parallelize",
    "plan",
]

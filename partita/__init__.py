"""Train any PyTorch model on whatever machines are there.

Example:
    >>> import partita
    >>> step = partita.parallelize(model, optimizer, loss_fn, batch)
    >>> for batch in loader:
    ...     result = step(batch)
"""

import os as _os
import sys as _sys

# Waiting OpenMP threads must sleep: spinning ones slow a step many times over when a neighbour takes part of a core.
# It only helps before torch starts its threads, so `import partita` comes before `import torch`.
if "torch" not in _sys.modules:
    _os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _os.environ.setdefault("GOMP_SPINCOUNT", "0")

from partita import checkpoint, connections, data, errors, events, sync
from partita.api import Checkpoints, Elastic, FallbackWarning, InMemory, Saving, Step, StepResult, parallelize, plan
from partita.cluster import Cluster
from partita.errors import (
    CaptureError,
    CheckpointError,
    ClusterError,
    InfeasibleError,
    InputError,
    NonFiniteLossError,
    PartitaError,
    PeerLostError,
    PlanError,
    ProgramError,
    SearchError,
    StepError,
    WaitTimeoutError,
    WorkerError,
)
from partita.plan import Constraints, Plan
from partita.program.timeline import Timeline
from partita.search.api import search  # without Optuna, which its first call imports
from partita.training.events import subscribe

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "Checkpoints",
    "Cluster",
    "ClusterError",
    "Constraints",
    "Elastic",
    "FallbackWarning",
    "InMemory",
    "InfeasibleError",
    "InputError",
    "NonFiniteLossError",
    "PartitaError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "ProgramError",
    "Saving",
    "SearchError",
    "Step",
    "StepError",
    "StepResult",
    "Timeline",
    "WaitTimeoutError",
    "WorkerError",
    "checkpoint",
    "connections",
    "data",
    "errors",
    "events",
    "parallelize",
    "plan",
    "search",
    "subscribe",
    "sync",
]

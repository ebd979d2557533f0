"""Every error that partita raises on purpose.

Each message says what must hold, what was given, and what to change.

    PartitaError
     +-- InputError            the user's model, loss, batch or optimizer cannot be used as given (also a ValueError)
     |    +-- NonFiniteLossError   the loss became NaN or infinite
     +-- CaptureError          the model cannot be captured as a graph (names the op and the source line)
     +-- ClusterError          a cluster description is wrong or names what is not there
     +-- PlanError             a plan file is corrupt, or belongs to another model or cluster
     |    +-- InfeasibleError      no plan satisfies the constraints or fits the memory (names the binding limit)
     |    +-- SolverError          a solver's answer is not what our own price says (a bug of ours or of the solver)
     +-- ProgramError          a set of programs would deadlock, leak or read a value it does not have
     +-- CheckpointError       a checkpoint is incomplete, corrupt or belongs to another model
     +-- SearchError           a search has nothing to deliver, or its folder is in use
     +-- StepError             a training step failed while it ran
          +-- WorkerError          a worker raised; `__cause__` is the original exception
          +-- PeerLostError        another process of the job is gone (names it)
          +-- WaitTimeoutError     a wait passed its limit (names who waited for whom)
"""

from __future__ import annotations


class PartitaError(Exception):
    """Base of every error that partita raises on purpose."""


class InputError(PartitaError, ValueError):
    """The user's model, loss, batch, optimizer or argument cannot be used as given."""


class NonFiniteLossError(InputError):
    """The loss became NaN or infinite; names the step and, if asked, the first op that produced it."""


class CaptureError(PartitaError):
    """The model cannot be captured as one graph.

    Attributes:
        op: the op or Python construct that stopped the capture, e.g. ``aten.nonzero.default``.
        source: ``file:line`` in the user's code, or ``"unknown"``.
    """

    def __init__(self, message: str, *, op: str = "unknown", source: str = "unknown") -> None:
        super().__init__(message)
        self.op = op
        self.source = source


class ClusterError(PartitaError):
    """A cluster description is wrong, or names what is not there."""


class PlanError(PartitaError):
    """A plan file is corrupt, or the plan belongs to another model or cluster."""


class InfeasibleError(PlanError):
    """No plan satisfies the constraints or fits the memory; names the limit and the smallest change that helps."""


class SolverError(PlanError):
    """A solver claims another objective than our own price of its answer; names both figures. Please report it."""


class ProgramError(PartitaError):
    """A set of programs would deadlock, leak, or read a value that it does not have."""


class CheckpointError(PartitaError):
    """A checkpoint is incomplete, corrupt, or belongs to another model."""


class SearchError(PartitaError):
    """A search of configurations has found nothing that it could deliver, or another one works in its folder."""


class StepError(PartitaError):
    """A training step failed while it ran."""


class WorkerError(StepError):
    """A worker raised; ``__cause__`` is the original exception with the user's own traceback."""


class PeerLostError(StepError):
    """Another process of the job is gone; the message names its rank, host and process id."""


class WaitTimeoutError(StepError):
    """A wait passed its time limit; the message names who waited for whom."""

"""What happens while training, for functions that `partita.subscribe` is given."""

from partita.training.events import (
    CandidateMeasured,
    Checkpointed,
    ConnectionsChanged,
    MembersChanged,
    PlanChosen,
    SharesChanged,
    StepFinished,
    SyncChosen,
    WarningRaised,
    subscribe,
)

__all__ = [
    "CandidateMeasured",
    "Checkpointed",
    "ConnectionsChanged",
    "MembersChanged",
    "PlanChosen",
    "SharesChanged",
    "StepFinished",
    "SyncChosen",
    "WarningRaised",
    "subscribe",
]

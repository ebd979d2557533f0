"""Synchronisation methods, for ``partita.parallelize(..., sync=...)``: how processes are brought together."""

from partita.training.sync import (
    DGC,
    DeMo,
    DiLoCo,
    Exact,
    Gossip,
    GradientMethod,
    LocalSGD,
    Masked,
    PowerSGD,
    ReplicaMethod,
    Rounded,
    Stale,
    StreamingDiLoCo,
    TopK,
)

__all__ = [
    "DGC",
    "DeMo",
    "DiLoCo",
    "Exact",
    "Gossip",
    "GradientMethod",
    "LocalSGD",
    "Masked",
    "PowerSGD",
    "ReplicaMethod",
    "Rounded",
    "Stale",
    "StreamingDiLoCo",
    "TopK",
]

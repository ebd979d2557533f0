"""Synchronisation methods: how what processes learn apart is brought together, exactly or for fewer bytes.

Two contracts: a `GradientMethod` adds the gradients of every step between processes, which otherwise train as one; a
`ReplicaMethod` lets every process train for itself and brings their weights together.
"""

from __future__ import annotations

from partita.errors import InputError
from partita.training.sync.demo import DeMo
from partita.training.sync.exact import Exact
from partita.training.sync.gossip import Gossip
from partita.training.sync.method import GradientMethod
from partita.training.sync.outer import DiLoCo, LocalSGD, StreamingDiLoCo
from partita.training.sync.powersgd import PowerSGD
from partita.training.sync.replica import ReplicaMethod
from partita.training.sync.rounded import Rounded
from partita.training.sync.sparse import Masked
from partita.training.sync.stale import Stale
from partita.training.sync.topk import DGC, TopK

Method = GradientMethod | ReplicaMethod

BY_NAME: dict[str, Method] = {
    "exact": Exact(),
    "bf16": Rounded(to="bf16"),
    "fp16": Rounded(to="fp16"),
    "int8": Rounded(to="int8"),
    "powersgd": PowerSGD(),
    "topk": TopK(),
    "dgc": DGC(),
    "demo": DeMo(),
    "local_sgd": LocalSGD(),
    "diloco": DiLoCo(),
    "streaming_diloco": StreamingDiLoCo(),
    "stale": Stale(),
    "gossip": Gossip(),
}

__all__ = [
    "BY_NAME",
    "DGC",
    "DeMo",
    "DiLoCo",
    "Exact",
    "Gossip",
    "GradientMethod",
    "LocalSGD",
    "Masked",
    "Method",
    "PowerSGD",
    "ReplicaMethod",
    "Rounded",
    "Stale",
    "StreamingDiLoCo",
    "TopK",
    "method_of",
]


def method_of(sync: object) -> Method:
    """A method by its name with its default settings, or the method itself.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(sync, (GradientMethod, ReplicaMethod)):
        return sync
    if isinstance(sync, str) and sync in BY_NAME:
        return BY_NAME[sync]
    raise InputError(f"sync must be a method of partita.sync or one of the names {sorted(BY_NAME)}, but got {sync!r}")

"""Who takes part, in which processes; and the pairs of family and scale that are raced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PARTITA = "partita"
Threads = Literal["one", "all"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One contestant.

    Attributes:
        module: of `benchmarks.peers`; its `prepare(name, workload)` returns a `Prepared`.
        num_threads: intra-op threads that its processes start with; "all" is one a core.
        distributed: one process a core (two at least) that form a job, instead of one process.
        single_core: it keeps to one core, so that its step time is a base of speed-ups.
        needs: the package without which it is absent; its interpreter can be named on the command line.
    """

    name: str
    module: str
    num_threads: Threads = "one"
    distributed: bool = False
    single_core: bool = False
    needs: str = "torch"


PEERS: tuple[Peer, ...] = (
    Peer(name="eager 1", module="plain", single_core=True),
    Peer(name="eager all", module="plain", num_threads="all"),
    Peer(name="compiled 1", module="plain", single_core=True),
    Peer(name="compiled all", module="plain", num_threads="all"),
    Peer(name="ddp", module="ddp", distributed=True),
    Peer(name="ddp compiled", module="ddp", distributed=True),
    Peer(name="fsdp2", module="fsdp", distributed=True),
    Peer(name="deepspeed zero-1", module="deepspeed_zero", distributed=True, needs="deepspeed"),
    Peer(name="jax 1", module="jax_data", single_core=True, needs="jax"),
    Peer(name="jax", module="jax_data", num_threads="all", needs="jax"),
    Peer(name=PARTITA, module="partita_auto", num_threads="all"),
)
BY_NAME: Mapping[str, Peer] = {peer.name: peer for peer in PEERS}
SINGLE_CORE = tuple(peer.name for peer in PEERS if peer.single_core)

# From steps of half a millisecond, which launching ops decides, to steps of about a second, which arithmetic decides.
PAIRS: tuple[tuple[str, str], ...] = (
    ("mixture_density", "tiny"), ("recommender", "tiny"), ("graph_molecules", "tiny"), ("masked_tokens", "tiny"),
    ("mlp_batchnorm", "small"), ("conv1d", "small"), ("lstm", "small"), ("gpt2", "small"), ("bert", "small"),
    ("t5", "small"), ("resnet", "small"), ("unet", "small"),
    ("llama", "large"), ("masked_tokens", "large"), ("vit", "large"), ("convnext", "large"), ("unet", "large"),
)  # fmt: skip


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs from "gpt2:small,vit:large"; a name alone is at the scale "small".

    >>> parse_pairs("gpt2, vit:large")
    (('gpt2', 'small'), ('vit', 'large'))
    """
    parts = [item.strip().partition(":") for item in text.split(",") if item.strip()]
    return tuple((family, scale or "small") for family, _, scale in parts)

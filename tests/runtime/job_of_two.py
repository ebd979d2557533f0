"""The environment of one process of a two-process job on this machine, as a launcher would set it."""

from __future__ import annotations

import os


def enter(rank: int, port: str) -> None:
    """Call it before torch is imported."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )

"""Floor 5: runs programs in virtual time."""

from partita.simulator.memory import memory_bytes, shared_bytes
from partita.simulator.simulate import activity, simulate

__all__ = ["activity", "memory_bytes", "shared_bytes", "simulate"]

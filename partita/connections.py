"""Methods that learn which connections a network has, for ``partita.parallelize(..., connections=...)``."""

from partita.search.connections import SET, Magnitude, RigL, Static

__all__ = ["SET", "Magnitude", "RigL", "Static"]

"""Learning the connections between adjacent layers: which elements, or blocks, of weights a network has."""

from partita.search.connections.methods import SET, Learnt, Magnitude, RigL, Static

__all__ = ["SET", "Learnt", "Magnitude", "RigL", "Static"]

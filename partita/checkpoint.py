"""Checkpoints without a training step: the weights in one, whole, whatever plan and number of processes wrote it."""

from partita.training.checkpoint.loader import weights_of

__all__ = ["weights_of"]

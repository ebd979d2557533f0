"""Data for a job: each process reads only the rows that its workers need."""

from partita.training.loading import sharded

__all__ = ["sharded"]

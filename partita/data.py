"""Data for a job: each process reads only the rows that its workers need, from where training stands."""

from partita.training.loading import sharded
from partita.training.positions import resumable

__all__ = ["resumable", "sharded"]

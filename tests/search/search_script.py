"""What `partita search` is given in tests."""

from search_task import build, data

__all__ = ["batch_size", "build", "data"]
batch_size = 50

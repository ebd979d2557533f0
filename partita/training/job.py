"""The processes of a job agree: rank 0 decides, the others receive; starting weights are equal everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from partita.errors import StepError


class Team:
    """All processes of the job, as seen by this one. Alone, everything is immediate.

    The exchanges here happen outside of steps (planning, collecting weights, checkpoints), on torch's default group.
    """

    def __init__(self, rank: int = 0, num_processes: int = 1) -> None:
        self.rank, self.num_processes = rank, num_processes

    @property
    def is_alone(self) -> bool:
        return self.num_processes == 1

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every process."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on every process."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.num_processes
        dist.all_gather_object(found, value)
        return found

    def require_equal(self, value: str, what: str) -> None:
        """Raises StepError on every process unless all have the same text."""
        values = self.gather(value)
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(values))
            raise StepError(f"every process must have the same {what}, but got {listed}")

    def spread(self, tensors: Iterable[torch.Tensor], *, source: int = 0) -> None:
        """Overwrites the tensors on all processes by those of `source`."""
        if self.is_alone:
            return
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach()
                whole = value.contiguous()
                dist.broadcast(whole, src=source)
                if whole.data_ptr() != value.data_ptr():
                    value.copy_(whole)

    def spread_random_state(self) -> None:
        """torch's default generator continues as that of rank 0 on every process."""
        if not self.is_alone:
            torch.set_rng_state(self.from_first(torch.get_rng_state()))

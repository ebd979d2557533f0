"""The processes of a job agree: rank 0 decides, the others receive; starting weights are equal everywhere."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from partita.errors import StepError
from partita.runtime.transport import Transport

_CPU = torch.device("cpu")


class Team:
    """All processes of the job, as seen by this one. Alone, everything is immediate.

    The exchanges here happen outside of steps (planning, collecting weights, checkpoints), on the transport's group.
    All but `spread` begin once all processes have come, however long these plan or compile before.
    Values are tensors, numbers, texts, and lists, tuples and mappings of such: nothing else is read from another
    process, since it could run code here.
    """

    def __init__(self, transport: Transport | None = None) -> None:
        self._transport = transport
        self.rank = 0 if transport is None else transport.rank
        self.num_processes = 1 if transport is None else transport.num_processes

    @property
    def is_alone(self) -> bool:
        return self.num_processes == 1

    @property
    def _group(self) -> Any:
        assert self._transport is not None
        return self._transport.group

    def _guard(self, call: Callable[[], None], what: str, *, patient: bool = True) -> None:
        assert self._transport is not None
        self._transport.guard(call, what, patient=patient)

    def working_alone(self) -> AbstractContextManager[None]:
        """Inside, the others wait for this process without a limit as long as it lives: it plans or compiles."""
        return contextlib.nullcontext() if self._transport is None else self._transport.working_alone()

    def meet(self, what: str) -> None:
        """Waits until all processes have come, however long each works alone before."""
        if not self.is_alone:
            self._guard(lambda: None, what)

    def from_first(self, value: Any, what: str = "sharing a decision of rank 0", *, source: int = 0) -> Any:
        """The value of rank 0 (or `source`), on every process."""
        if self.is_alone:
            return value
        found = torch.empty(0, dtype=torch.uint8)

        def call() -> None:
            nonlocal found
            found = _encoded(value) if self.rank == source else found
            size = torch.tensor([len(found)])
            _broadcast([size], source, self._group)
            if self.rank != source:
                found = torch.empty(int(size), dtype=torch.uint8)
            _broadcast([found], source, self._group)

        self._guard(call, what)
        return value if self.rank == source else _decoded(found)

    def gather(self, value: Any, what: str = "a gathering of values") -> list[Any]:
        """The values of all processes, by rank, on every process."""
        if self.is_alone:
            return [value]
        own = _encoded(value)
        told: list[torch.Tensor] = []

        def call() -> None:
            sizes = [int(size) for size in self._all_gather(torch.tensor([len(own)]))]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)  # all must bring as much
            padded[: len(own)] = own
            told.extend(text[:size] for text, size in zip(self._all_gather(padded), sizes, strict=True))

        self._guard(call, what)
        return [value if rank == self.rank else _decoded(text) for rank, text in enumerate(told)]

    def _all_gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        value = value.to(_device(self._group))
        found = [torch.empty_like(value) for _ in range(self.num_processes)]
        dist.all_gather(found, value, group=self._group)
        return [item.cpu() for item in found]

    def require_equal(self, value: str, what: str) -> None:
        """Raises StepError on every process unless all have the same text."""
        values = self.gather(value, f"the comparison of the {what}")
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(values))
            raise StepError(f"every process must have the same {what}, but got {listed}")

    def require_same_items(self, items: dict[str, str], what: str) -> None:
        """Raises StepError on every process, naming the first differences, unless all have the same items in order."""
        first, *others = self.gather(list(items.items()), f"the comparison of the {what}")
        for rank, other in enumerate(others, start=1):
            if other == first:
                continue
            mine, theirs = dict(first), dict(other)
            names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            listed = "; ".join(
                f"{name!r}: rank 0 has {mine.get(name, 'none')}, rank {rank} has {theirs.get(name, 'none')}"
                for name in names[:5]
            )
            raise StepError(
                f"every process must have the same {what}, but {listed or 'the order of names differs'}. "
                "Build it from the same configuration on all ranks."
            )

    def spread(self, tensors: Iterable[torch.Tensor], *, source: int = 0, patient: bool = False) -> None:
        """Overwrites the tensors on all processes by those of `source`; if `patient`, once all have come."""
        if self.is_alone:
            return
        what = f"the broadcast of tensors of rank {source}"
        self._guard(lambda: _broadcast(tensors, source, self._group), what, patient=patient)

    def tell(self, value: torch.Tensor, *, source: int = 0, patient: bool = False) -> None:
        """As `spread`, for a few numbers on the CPU that are told in every step: `source` hardly waits for the
        others."""
        if self.is_alone:
            return
        assert self._transport is not None
        transport = self._transport

        def call() -> None:
            mesh = transport.mesh()
            if mesh is None:
                _broadcast([value], source, self._group)
            else:
                mesh.tell(value, source)

        self._guard(call, f"what rank {source} tells of a step", patient=patient)

    def spread_random_state(self) -> None:
        """torch's default generator continues as that of rank 0 on every process."""
        if not self.is_alone:
            torch.set_rng_state(self.from_first(torch.get_rng_state()))


def _encoded(value: Any) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _decoded(text: torch.Tensor) -> Any:
    try:
        return torch.load(io.BytesIO(text.numpy().tobytes()), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StepError(
            "what processes tell each other must consist of tensors, numbers, texts, lists and mappings, since nothing "
            f"else is read without running its code, but: {error}. If it is the state of an optimizer of your own, "
            "keep it in such values"
        ) from error


def _device(group: Any) -> torch.device:
    """Where a group wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else _CPU


def _broadcast(tensors: Iterable[torch.Tensor], source: int, group: Any) -> None:
    device = _device(group)
    with torch.no_grad():
        for tensor in tensors:
            value = tensor.detach()
            whole = value.contiguous()
            moved = whole.to(device) if device.type != value.device.type and value.device == _CPU else whole
            dist.broadcast(moved, src=source, group=group)
            if moved.data_ptr() != value.data_ptr():
                value.copy_(moved)

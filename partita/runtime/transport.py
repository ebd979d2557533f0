"""Messages between processes: what collectives and `Send`/`Recv` need of a network, as two small contracts.

`partita.runtime.processes` implements them over `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from partita.errors import StepError
from partita.program.instructions import TensorSpec


class Line(Protocol):
    """A connection among some processes of the job. One thread of each process uses it, all in the same order."""

    @property
    def bytes_sent(self) -> int:
        """What this process has sent over the line so far."""
        ...

    def all_reduce(self, value: Tensor) -> None:
        """Replace the flat, contiguous `value` by its sum over the processes, bit-identical on all of them."""
        ...

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        """Give each other process (by rank) its tensors; return what each of them gave here, of the announced shapes."""
        ...


class Mail(Protocol):
    """Single values from process to process. A value may be sent before it is asked for; tags keep values apart."""

    @property
    def bytes_sent(self) -> int: ...

    def send(self, value: Tensor, process: int, tag: int) -> Callable[[], None]:
        """Start sending; the returned function waits until `value` may be changed again."""
        ...

    def receive(self, spec: TensorSpec, process: int, tag: int) -> Tensor:
        """Wait for the value with `tag` from `process`."""
        ...


class Transport(Protocol):
    """The processes of a job. Lines and mail must be opened by all processes in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    def line(self, processes: tuple[int, ...], number: int, timeout_s: float) -> Line:
        """The `number`-th line among these processes (opened once, then kept)."""
        ...

    def mail(self, timeout_s: float) -> Mail: ...

    def on_failure(self, listener: Callable[[StepError], None]) -> Callable[[], None]:
        """Call `listener` when a process is lost or reports a failure; the returned function ends that."""
        ...

    def report(self, error: BaseException) -> None:
        """Tell all other processes why this one ends."""
        ...

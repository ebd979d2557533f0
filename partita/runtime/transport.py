"""Messages between processes: what collectives and `Send`/`Recv` need of a network, as two small contracts.

`partita.runtime.processes` implements them over `torch.distributed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

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
        """Give each other process (by rank) its tensors; return what each of them gave here, of the announced
        shapes.
        """
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


class Session(Protocol):
    """The messages of one engine. Sessions, and lines within them, are opened by all processes in the same order.

    An engine that fails spoils its session only: the next one starts with lines of its own.
    """

    def line(self, processes: tuple[int, ...], timeout_s: float) -> Line:
        """A new line among these processes. All processes of the job call this, members or not."""
        ...

    def mail(self, timeout_s: float) -> Mail: ...

    @property
    def sent_to(self) -> Counter[int]:
        """Bytes that this process has sent so far, by the process that they went to first."""
        ...

    def on_failure(self, listener: Callable[[StepError], None]) -> None:
        """Call `listener` when a process is lost or reports a failure (at once if that has happened)."""
        ...

    def report(self, error: BaseException) -> None:
        """Tell all other processes why this one ends the session."""
        ...

    @property
    def turn_s(self) -> float:
        """How much longer than the last rank this process waits for its own workers at its end: ranks that wait for
        each other's messages must not give up together.
        """
        ...

    def close(self, *, at_rest: bool) -> None:
        """End the session; its lines too if no worker uses them any more. Calling it again is harmless."""
        ...


class Transport(Protocol):
    """The processes of a job."""

    @property
    def rank(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    def session(self) -> Session: ...

    @property
    def group(self) -> Any:
        """The process group for exchanges outside of steps; None means torch's default group."""
        ...

    def mesh(self) -> Any:
        """Connections of partita's own among all processes, for exchanges outside of steps, with a method
        `tell(value, source)`; None: there are none, `group` does everything. All processes call this."""
        ...

    def note(self, activity: str) -> None:
        """What this process is in; the others read it if they wait for it in vain."""
        ...

    def working_alone(self) -> AbstractContextManager[None]:
        """Inside, but for exchanges, the others wait for this process without a limit as long as it lives."""
        ...

    def guard(self, call: Callable[[], None], what: str, *, patient: bool = True) -> None:
        """Run an exchange outside of steps, if `patient` only once all processes have come, however long they work
        alone before; errors name the lost process, or what was waited for."""
        ...

"""Exchanges between all processes outside of a plan's programs: at once, or in the background."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from partita.program.instructions import TensorSpec
from partita.runtime.background import Courier, Errand
from partita.runtime.ending import Order, close_at_end
from partita.runtime.failure import Failure
from partita.runtime.transport import Line, Session, Transport

COURIER_TIME_S = 2.0  # that an exchange in the background gets to end


class Exchanges:
    """The lines between all processes, one of them with a thread of its own for exchanges in the background."""

    def __init__(self, transport: Transport, timeout_s: float, name: str) -> None:
        everyone = tuple(range(transport.num_processes))
        self._session: Session = transport.session()
        self._timeout_s = timeout_s
        self._failure = Failure()
        self.line: Line = self._session.line(everyone, timeout_s)
        self._courier = Courier(self._session.line(everyone, timeout_s), self._failure, name)
        self._session.on_failure(self._on_peer_failure)
        self._closed = False
        close_at_end(self, Order.WORKERS)

    @property
    def bytes_sent(self) -> int:
        return self.line.bytes_sent + self._courier.line.bytes_sent

    @property
    def sent_to(self) -> Counter[int]:
        """The same by the process that they went to first."""
        return self._session.sent_to

    def errand(self, key: str, call: Callable[[Line], list[torch.Tensor]]) -> Errand:
        """Has `call` exchange over the line of the background, after what was begun before."""
        return Errand(key, call, self._courier, self._failure, self._timeout_s)

    def _on_peer_failure(self, error: BaseException) -> None:
        self._failure.record(error)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._courier.close()
        self._courier.join(COURIER_TIME_S)
        self._session.close(at_rest=not self._courier.is_alive())

    def at_end(self) -> None:
        self.close()


def all_tell(line: Line, text: bytes, rank: int, num_processes: int) -> list[bytes]:
    """What every process tells, by rank."""
    others = [other for other in range(num_processes) if other != rank]
    size, number = torch.tensor([len(text)], dtype=torch.int64), TensorSpec((1,), torch.int64)
    sizes = line.exchange({other: [size] for other in others}, {other: [number] for other in others})
    content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    told = line.exchange(
        {other: [content] for other in others},
        {other: [TensorSpec((int(sizes[other][0]),), torch.uint8)] for other in others},
    )
    return [text if other == rank else told[other][0].numpy().tobytes() for other in range(num_processes)]

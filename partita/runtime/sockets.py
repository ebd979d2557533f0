"""Sums and exchanges of CPU tensors over TCP connections of partita's own: one between any two processes of a line.

torch's gloo backend hands every collective to threads of its own; for small values these hand-overs take many times as
long as the messages, and a worker that waits for one cannot be woken before its time limit. Here the worker itself
sends and receives, all directions at once, and `Mesh.interrupt` wakes it.

Legend: `p` processes, `i` the place of this one among them; a value of `n` elements is cut into `p` chunks.

* Small sums (`partita.program.wire.is_direct`): every process sends its whole value to all others, and adds all p in
  the order of processes.
* Other sums: a ring (Patarasuk and Yuan 2009, section 3). In round s process i sends chunk i-s to its successor and
  adds what it receives to chunk i-s-1; after p-1 rounds it holds the sum of chunk i+1, and p-1 more rounds hand
  the sums on.

In both, each element's sum is formed once or in one order, so all processes hold bit-identical results. Nothing but
the values travels: both ends know what comes next, because they execute programs that were checked together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import select
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from partita.program.wire import chunk_edges, is_direct
from partita.runtime.tokens import TOKEN_BYTES, token_of
from partita.units import MIB

_CHUNK_BYTES = MIB  # at most this much is sent before the other directions get their turn
_HELLO = struct.Struct(f">{TOKEN_BYTES}sIII")  # token of the job, session, line, rank
_CALL_TIME_S = 15.0  # until a call is answered by the other host's system
_ACCEPT_TIME_S = 0.2
_YES = "yes"
_HELLO_TIME_S = 5.0  # whoever has not said who he is by then is a stranger
_MOST_CALLERS = 512  # that have not said it yet; the others go, first come first
_POLL_TIME_S = 0.005  # between looks at the store while others open their connections
_MOST_AHEAD = 32  # values that whoever tells them may be ahead of the others
Views = deque[memoryview]


class BrokenLineError(RuntimeError):
    """A connection ended, or nothing moved for the time limit (then the text says "timed out")."""


class Mesh:
    """Connections to all other processes of a line.

    Args:
        peers: connected sockets by rank.
        rank: of this process.
        timeout_s: limit of one sum or exchange.
    """

    def __init__(self, peers: Mapping[int, socket.socket], rank: int, timeout_s: float) -> None:
        self.sent_to: Counter[int] = Counter()  # bytes, by rank
        self._peers = dict(peers)
        self._timeout_s = timeout_s
        self._ranks = sorted([*peers, rank])
        self._place = self._ranks.index(rank)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._num_told = 0
        for peer in self._peers.values():
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def bytes_sent(self) -> int:
        return self.sent_to.total()

    def all_reduce(self, value: Tensor) -> None:
        """Replace the flat, contiguous `value` by its sum over the processes.

        Raises:
            BrokenLineError: a process has gone or did not come in time.
        """
        if is_direct(value.numel(), value.element_size(), len(self._ranks)):
            self._sum_directly(value)
        else:
            self._sum_in_ring(value)

    def _sum_directly(self, value: Tensor) -> None:
        parts = {rank: value if rank not in self._peers else torch.empty_like(value) for rank in self._ranks}
        own = bytes_of(value)
        self.move({rank: [own] for rank in self._peers}, {rank: [bytes_of(parts[rank])] for rank in self._peers})
        first, second, *rest = (parts[rank] for rank in self._ranks)
        if value is first or value is second:  # in place as soon as nobody needs it
            torch.add(first, second, out=value)
            total = value
        else:
            total = first + second
        for part in rest:
            total = total.add_(part)
        if total is not value:
            value.copy_(total)

    def _sum_in_ring(self, value: Tensor) -> None:
        p, i = len(self._ranks), self._place
        following, previous = self._ranks[(i + 1) % p], self._ranks[i - 1]
        chunks = [value[low:high] for low, high in itertools.pairwise(chunk_edges(value.numel(), p))]
        scratch = self._scratch_like(max(chunks, key=len))
        for s in range(p - 1):
            target = chunks[(i - s - 1) % p]
            received = scratch[: len(target)]
            self.move({following: [bytes_of(chunks[(i - s) % p])]}, {previous: [bytes_of(received)]})
            target.add_(received)
        for s in range(p - 1):
            self.move({following: [bytes_of(chunks[(i + 1 - s) % p])]}, {previous: [bytes_of(chunks[(i - s) % p])]})

    def _scratch_like(self, chunk: Tensor) -> Tensor:
        """Memory for what is added, kept between sums."""
        num_bytes = chunk.numel() * chunk.element_size()
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch[:num_bytes].view(chunk.dtype)

    def move(self, outgoing: Mapping[int, Iterable[memoryview]], incoming: Mapping[int, Iterable[memoryview]]) -> None:
        """Send and receive all of these, by rank, at the same time; within a rank in order.

        Raises:
            BrokenLineError: as `all_reduce`.
        """
        deadline_s = time.monotonic() + self._timeout_s
        out = {rank: deque(view for view in views if view) for rank, views in outgoing.items()}
        into = {rank: deque(view for view in views if view) for rank, views in incoming.items()}
        for rank, views in out.items():
            self.sent_to[rank] += sum(map(len, views))
        try:
            while True:
                moved = [self._send(rank, views) for rank, views in out.items() if views]
                moved += [self._receive(rank, views) for rank, views in into.items() if views]
                if not moved:
                    return
                if not any(moved):
                    self._wait(out, into, deadline_s)
        except OSError as error:
            raise BrokenLineError(f"the connection broke: {error}") from error

    def tell(self, value: Tensor, source: int) -> None:
        """Overwrite a contiguous CPU tensor on all processes by that of `source`, which goes on once it is sent, but
        waits for all to have come along now and then.

        Raises:
            BrokenLineError: as `all_reduce`.
        """
        self._num_told += 1
        is_answered = self._num_told % _MOST_AHEAD == 0
        if self._ranks[self._place] == source:
            self.move({rank: [bytes_of(value)] for rank in self._peers}, {})
            if is_answered:
                self.move({}, {rank: [memoryview(bytearray(1))] for rank in self._peers})
        else:
            self.move({}, {source: [bytes_of(value)]})
            if is_answered:
                self.move({source: [memoryview(bytearray(1))]}, {})

    def _send(self, rank: int, views: Views) -> bool:
        """Send what can be sent at once; whether anything was."""
        try:
            count = self._peers[rank].send(views[0][:_CHUNK_BYTES])
        except BlockingIOError:
            return False
        _go_on(views, count)
        return True

    def _receive(self, rank: int, views: Views) -> bool:
        try:
            count = self._peers[rank].recv_into(views[0])
        except BlockingIOError:
            return False
        if count == 0:
            raise BrokenLineError(f"process rank {rank} has closed its connection")
        _go_on(views, count)
        return True

    def _wait(self, out: Mapping[int, Views], into: Mapping[int, Views], deadline_s: float) -> None:
        """Wait until something can be sent or received."""
        left_s = deadline_s - time.monotonic()
        poll = select.poll()
        for rank, peer in self._peers.items():
            events = (select.POLLOUT if out.get(rank) else 0) | (select.POLLIN if into.get(rank) else 0)
            if events:
                poll.register(peer, events)
        if left_s <= 0 or not poll.poll(left_s * 1e3):
            waiting = sorted({rank for side in (out, into) for rank, views in side.items() if views})
            raise BrokenLineError(f"timed out after {self._timeout_s:g} s; rank(s) {waiting} did not answer")

    def interrupt(self) -> None:
        """Wake whoever waits here, on this side and on the others, with a `BrokenLineError`. The mesh is then
        useless."""
        for peer in self._peers.values():
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is closed already
                continue

    def close(self) -> None:
        """End the connections; nobody may be in `move`."""
        for peer in self._peers.values():
            peer.close()


def bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat: Any = value.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _go_on(views: Views, count: int) -> None:
    """Leave out the first `count` bytes."""
    if count == len(views[0]):
        views.popleft()
    else:
        views[0] = views[0][count:]


# Opening -------------------------------------------------------------------------------------------------------------


class Gate:
    """Where a process takes connections, and how it finds those of the others.

    Args:
        store: a key-value store of the job, used by one thread.
        rank: of this process.
        host: the address under which the others reach this process; "": this process takes part in no mesh.
    """

    def __init__(self, store: Any, rank: int, host: str) -> None:
        self.rank = rank
        self._store = store
        self._arrived: dict[tuple[int, int, int], socket.socket] = {}  # (session, line, rank), not yet asked for
        self._callers: dict[socket.socket, tuple[bytearray, float]] = {}  # what they have said; when it must be all
        self._listener = socket.create_server((host, 0), backlog=1024) if host else None
        if self._listener is not None:
            self._listener.setblocking(False)
        if rank == 0:
            store.set("token", secrets.token_hex(16))
        here = [*self._listener.getsockname()[:2]] if self._listener is not None else []
        store.set(f"address/{rank}", json.dumps(here))

    def mesh(self, session: int, line: int, ranks: Sequence[int], timeout_s: float) -> Mesh | str:
        """Connect to all other `ranks`, which call this too; why that was not possible for one of them, if so.

        Either all get a mesh or all get a reason.
        """
        deadline_s = time.monotonic() + timeout_s
        opened = f"opened/{session}/{line}"
        peers: dict[int, socket.socket] = {}
        try:
            self._connect(peers, session, line, ranks, deadline_s)
            self._store.set(f"{opened}/{self.rank}", _YES)
            answers = [self._read(f"{opened}/{rank}", deadline_s) for rank in ranks]
            reason = next((answer for answer in answers if answer != _YES), "")
        except OSError as error:
            missing = sorted(set(ranks) - set(peers) - {self.rank})
            reason = f"process rank {self.rank} has no connection to process rank(s) {missing} ({error})"
            self._store.set(f"{opened}/{self.rank}", reason)
        if not reason:
            return Mesh(peers, self.rank, timeout_s)
        for peer in peers.values():
            peer.close()
        return reason

    def _connect(
        self, peers: dict[int, socket.socket], session: int, line: int, ranks: Sequence[int], deadline_s: float
    ) -> None:
        """Call processes of lower rank, take calls of those of higher rank."""
        addresses = {rank: json.loads(self._read(f"address/{rank}", deadline_s)) for rank in ranks}
        without = [rank for rank, address in addresses.items() if not address]
        if without:
            raise OSError(f"rank(s) {without} take no connections")
        token = token_of(self._read("token", deadline_s))
        for rank in (rank for rank in ranks if rank < self.rank):
            host, port = addresses[rank]
            peers[rank] = socket.create_connection((host, port), min(_left_s(deadline_s), _CALL_TIME_S))
            peers[rank].sendall(_HELLO.pack(token, session, line, self.rank))
        for rank in (rank for rank in ranks if rank > self.rank):
            while (session, line, rank) not in self._arrived:
                self._accept(token)
                opened = f"opened/{session}/{line}/{rank}"
                if self._store.check([opened]) and (answer := self._read(opened, deadline_s)) != _YES:
                    raise OSError(answer)
                if time.monotonic() > deadline_s:
                    raise TimeoutError("timed out")
            peers[rank] = self._arrived.pop((session, line, rank))

    def _accept(self, token: bytes) -> None:
        """Take calls, of whichever line, if there are some soon; strangers are sent away."""
        assert self._listener is not None
        if self._listener.fileno() < 0:
            raise OSError("nobody listens any more")
        poll = select.poll()
        for one in (self._listener, *self._callers):
            poll.register(one, select.POLLIN)
        ready = {number for number, _ in poll.poll(_ACCEPT_TIME_S * 1e3)}
        for caller in [one for one in self._callers if one.fileno() in ready]:
            self._hear(caller, token)
        if self._listener.fileno() in ready:
            with contextlib.suppress(OSError):  # who called has hung up
                caller, _ = self._listener.accept()
                caller.setblocking(False)
                self._callers[caller] = (bytearray(), time.monotonic() + _HELLO_TIME_S)
        late = [one for one, (_, due_s) in self._callers.items() if time.monotonic() > due_s]
        for caller in (*late, *list(self._callers)[:-_MOST_CALLERS]):
            self._send_away(caller)

    def _hear(self, caller: socket.socket, token: bytes) -> None:
        """Some more of who a caller says that he is."""
        hello = self._callers[caller][0]
        try:
            piece = caller.recv(_HELLO.size - len(hello))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        hello += piece
        if len(hello) == _HELLO.size and secrets.compare_digest(bytes(hello[:TOKEN_BYTES]), token):
            _, session, line, rank = _HELLO.unpack(hello)
            del self._callers[caller]
            self._arrived[session, line, rank] = caller
        elif not piece or len(hello) == _HELLO.size:
            self._send_away(caller)

    def _send_away(self, caller: socket.socket) -> None:
        if self._callers.pop(caller, None) is not None:
            caller.close()

    def _read(self, key: str, deadline_s: float) -> str:
        """A value of the store that another process writes."""
        while not self._store.check([key]):
            if _left_s(deadline_s) <= 0.001:
                raise TimeoutError(f"timed out: nobody has written {key!r}")
            time.sleep(_POLL_TIME_S)
        text: bytes = self._store.get(key)
        return text.decode()

    def close(self) -> None:
        for peer in (*self._arrived.values(), *self._callers):
            peer.close()
        self._arrived.clear()
        self._callers.clear()
        if self._listener is not None:
            self._listener.close()


def _left_s(deadline_s: float) -> float:
    return max(deadline_s - time.monotonic(), 0.001)


def own_address(master_address: str, environment: Mapping[str, str] = os.environ) -> str:
    """The address under which other processes of the job reach this host: that of the interface that
    `GLOO_SOCKET_IFNAME` names, as for torch; else that from which the job's master is reached.

    Raises:
        OSError: there is no such interface, or no way to the master.
    """
    interface = environment.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        found = psutil.net_if_addrs().get(interface, [])
        addresses = [one.address for one in found if one.family == socket.AF_INET]
        if not addresses:
            raise OSError(f"GLOO_SOCKET_IFNAME={interface!r} must be an interface with an IPv4 address, but is not")
        return addresses[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((socket.gethostbyname(master_address), 9))
        address: str = probe.getsockname()[0]
        return address

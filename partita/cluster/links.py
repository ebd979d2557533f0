"""Measuring connections: messages between two processes through gloo, as training between CPU processes sends them.

A message of n bytes is modelled as ``latency_s + n / bytes_per_s`` (`Link`). Latency is half the round trip of a
message of one number; the rate follows from large messages, each direction for itself, because exchanges go both ways
at once and wait for the slower one. How large depends on the link: messages grow until one takes `LARGE_TIME_S`, so
that a slow link is measured in seconds and a fast one well. Of many the lowest tenth counts: a busy neighbour adds
whole scheduler slices (milliseconds), which are no property of the link. Source of the method: the ping-pong test of
the Intel MPI benchmarks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from partita.cluster.model import Link
from partita.errors import ClusterError
from partita.units import MIB

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SMALL_BYTES = 8
LEAST_LARGE_BYTES = MIB // 8
LARGE_BYTES = 16 * MIB
LARGE_TIME_S = 0.1
NUM_SMALL = 300
SMALL_TIME_S = 0.5  # for all small ones
NUM_LARGE = 5  # each way; the first, which may find a token bucket full, does not count


class PingPong:
    """A gloo group of its own over `store`, apart from any process group of the user's. All `size` ranks must make it.

    Raises:
        ClusterError: the group cannot be formed within `timeout_s`.
    """

    def __init__(self, store: Store, rank: int, size: int, *, timeout_s: float) -> None:
        from torch.distributed import ProcessGroupGloo

        self.rank = rank
        try:
            self._group: Any = ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise ClusterError(
                f"the processes of the job must be able to exchange messages through gloo, but rank {rank} of {size} "
                f"cannot ({error}). Set GLOO_SOCKET_IFNAME to the interface that joins the machines."
            ) from error

    def link(self, peer: int, *, leads: bool) -> Link | None:
        """The link to `peer`, which must call this too; only the side that `leads` has the clock, the other gets None.

        Raises:
            ClusterError: the peer did not answer in time.
        """
        try:
            if not leads:
                self._follow(peer)
                return None
            small_s = self._small(peer)
            latency_s = undisturbed(small_s) / 2
            rates = [self._rate(peer, latency_s, back=back) for back in (False, True)]
            self._ask(peer, 0, 0)
        except RuntimeError as error:
            raise ClusterError(
                f"rank {self.rank} measures its connection to rank {peer}, which must answer, but it did not "
                f"({error}). See whether that process still runs."
            ) from error
        return Link(bytes_per_s=min(rates), latency_s=latency_s)

    # The leader names, in a message of two numbers, the bytes that go there and those that come back.

    def _small(self, peer: int) -> list[float]:
        """Round trips of next to nothing, the first (which opens the connection) left out."""
        self._ask(peer, 0, SMALL_BYTES)
        times_s: list[float] = []
        begin_s = time.perf_counter()
        while len(times_s) < NUM_SMALL and (len(times_s) < 3 or time.perf_counter() - begin_s < SMALL_TIME_S):
            times_s.append(self._ask(peer, 0, SMALL_BYTES))
        return times_s

    def _rate(self, peer: int, latency_s: float, *, back: bool) -> float:
        """Bytes per second of one direction."""

        def ask_s(num_bytes: int) -> float:
            return self._ask(peer, *((0, num_bytes) if back else (num_bytes, SMALL_BYTES)))

        num_bytes = LEAST_LARGE_BYTES
        while num_bytes < LARGE_BYTES and ask_s(num_bytes) < LARGE_TIME_S:
            num_bytes *= 2
        return rate_of(num_bytes, [ask_s(num_bytes) for _ in range(NUM_LARGE)][1:], latency_s)

    def _ask(self, peer: int, num_there: int, num_back: int) -> float:
        """Seconds until the answer of `num_back` bytes to `num_there` bytes is here; nothing of both ends the peer's
        part."""
        import torch

        told = torch.tensor([num_there, num_back], dtype=torch.int64)
        there, back = (torch.zeros(count, dtype=torch.uint8) for count in (num_there, num_back))
        start = time.perf_counter()
        self._group.send([told], peer, 0).wait()
        if num_there:
            self._group.send([there], peer, 0).wait()
        if num_back:
            self._group.recv([back], peer, 0).wait()
        return time.perf_counter() - start

    def _follow(self, peer: int) -> None:
        import torch

        while True:
            told = torch.zeros(2, dtype=torch.int64)
            self._group.recv([told], peer, 0).wait()
            there, back = (torch.zeros(int(count), dtype=torch.uint8) for count in told)
            if not len(there) and not len(back):
                return
            if len(there):
                self._group.recv([there], peer, 0).wait()
            if len(back):
                self._group.send([back], peer, 0).wait()


def rate_of(num_bytes: int, times_s: Sequence[float], latency_s: float) -> float:
    """Bytes per second that follow from the times of messages of `num_bytes` and their answers of next to nothing."""
    large_s = undisturbed(times_s)
    # On a noisy machine the latency may exceed the whole of a large message: then count it as nothing, not as negative.
    return num_bytes / max(large_s - 2 * latency_s, large_s / 2)


def undisturbed(times_s: Sequence[float]) -> float:
    """The time below which a tenth of `times_s` lies: what the thing itself takes, without what others add."""
    return sorted(times_s)[len(times_s) // 10]


def slowest(links: list[Link]) -> Link | None:
    """The lowest rate and the highest latency of `links`: what bounds an exchange over all of them."""
    if not links:
        return None
    return Link(bytes_per_s=min(link.bytes_per_s for link in links), latency_s=max(link.latency_s for link in links))


def measure_process_link(*, timeout_s: float = 60.0) -> Link:
    """The link between two processes of this machine: starts one Python process as the peer, and ends it.

    Takes about three seconds, most of them for the peer to load torch.

    Raises:
        ClusterError: the peer could not be started, or does not answer within `timeout_s`.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

    limit = timedelta(seconds=timeout_s)
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=limit, wait_for_workers=False)
    # The launcher's variables must not reach the peer: it belongs to no job.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", _PEER, str(store.port), str(timeout_s)]
    peer = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        return _with_peer(store, timeout_s)
    except (ClusterError, RuntimeError) as error:
        peer.kill()
        told = (peer.communicate()[1] or "").strip().splitlines()
        raise ClusterError(
            f"a second process of this machine must answer, but it did not within {timeout_s:g} s ({error}). "
            f"It says: {told[-1] if told else 'nothing'}."
        ) from error
    finally:
        try:
            peer.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            peer.kill()
            peer.communicate()


_PEER = """
import sys
sys.path[:0] = [path for path in [%r] if path not in sys.path]
from partita.cluster.links import answer
answer(int(sys.argv[1]), float(sys.argv[2]))
""" % os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: UP031  # braces in code


def _with_peer(store: Store, timeout_s: float) -> Link:
    store.wait(["ready"], timedelta(seconds=timeout_s))
    link = PingPong(store, 0, 2, timeout_s=timeout_s).link(1, leads=True)
    assert link is not None
    return link


def answer(port: int, timeout_s: float) -> None:
    """The peer's side of `measure_process_link`."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

    store = TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=timeout_s))
    store.set("ready", "1")
    PingPong(store, 1, 2, timeout_s=timeout_s).link(0, leads=False)


def encode(link: Link | None) -> str:
    """A link as JSON text, for the job's store; `decode` is the inverse."""
    return msgspec.json.encode(link).decode()


def decode(text: bytes | str) -> Link | None:
    return msgspec.json.decode(text, type=Link | None)

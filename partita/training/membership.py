"""Who takes part in a job whose processes come, go and crash: torchft's lighthouse, quorum and commit vote.

Every process has a `Members`, which talks to the *lighthouse*, one small server that the whole job knows. Before a step
all living processes form a *quorum*; its members add up values by a process group that is made anew for every quorum;
after it they vote whether the step counts. A process that is behind, a new one or one that was away, receives the state
from one that is not, in the same step.

The state goes by HTTP, on one address, to whoever has the job's secret (`partita.runtime.tokens`), and is read as
tensors and plain values only. (torchft's own transport listens everywhere and loads pickles.)
"""

from __future__ import annotations

import contextlib
import hmac
import io
import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from partita.arguments import check_count, check_number, told
from partita.errors import InputError, PeerLostError, StepError, WaitTimeoutError
from partita.runtime.sockets import own_address
from partita.runtime.tokens import token_of
from partita.training.quorum_line import QuorumLine, count_ring

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
FEW_PIECES = 12  # 1, 2, 3, 4 or 6 processes share them evenly
HEARTBEAT_S = 0.1
SILENT_S = 0.6  # without a heartbeat a process counts as gone
JOIN_S = 1.0
KEPT_STEPS = 10  # that a state is offered for
State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """A job whose processes may come, go and crash while it trains. Each is started by itself (`python train.py`), as
    often as you like.

    Args:
        lighthouse: address of the job's lighthouse, "http://host:port" (`partita lighthouse` starts one); "": what
            TORCHFT_LIGHTHOUSE says.
        min_replicas: below so many processes training waits.
        pieces: so many equal parts of every batch are dealt to the processes, which must divide its rows; None: the
            least such number from 12 on. More pieces divide better among unequal machines, and take longer to compute.
        timeout_s: a process that does not answer for so long is left out.
        wait_s: so long a process waits until `min_replicas` are there.

    Example:
        >>> Elastic(lighthouse="http://10.0.0.1:29510", min_replicas=2).timeout_s
        10.0
    """

    lighthouse: str = ""
    min_replicas: int = 1
    pieces: int | None = None
    timeout_s: float = 10.0
    wait_s: float = 3600.0

    def num_pieces(self, num_rows: int) -> int:
        """Of a batch of so many rows.

        >>> Elastic().num_pieces(64), Elastic().num_pieces(10), Elastic(pieces=4).num_pieces(64)
        (16, 10, 4)
        """
        if self.pieces is None:
            return next((pieces for pieces in range(FEW_PIECES, num_rows) if num_rows % pieces == 0), num_rows)
        if num_rows % self.pieces:
            raise InputError(
                f"every batch must have a multiple of pieces={self.pieces} rows, so that they can be dealt evenly, but "
                f"got {num_rows}; drop the last one (drop_last=True), or choose other pieces"
            )
        return self.pieces

    def __post_init__(self) -> None:
        for name, value in (("min_replicas", self.min_replicas), ("pieces", self.pieces)):
            if value is not None:
                check_count(value, name)
        for name, seconds in (("timeout_s", self.timeout_s), ("wait_s", self.wait_s)):
            check_number(seconds, f"{name} (seconds)", above=0)
        if not isinstance(self.lighthouse, str):
            raise InputError(f'lighthouse must be a text "http://host:port", but got {told(self.lighthouse)}')

    @property
    def address(self) -> str:
        """Of the lighthouse.

        Raises:
            InputError: there is none.
        """
        found = self.lighthouse or os.environ.get(LIGHTHOUSE, "")
        if not urlsplit(found).hostname:
            raise InputError(
                f"lighthouse must be an address like http://10.0.0.1:29510, but got {found!r}. Start one by `partita "
                f"lighthouse`, and pass what it prints or set {LIGHTHOUSE}"
            )
        return found


def lighthouse(host: str = "", port: int = 0, min_replicas: int = 1, join_s: float = JOIN_S) -> Any:
    """Starts the lighthouse of a job; it ends with `shutdown()`. `address()` is what processes are told. `join_s`: so
    long those that live and have not asked for a quorum yet are waited for.

    Raises:
        InputError: torchft is not installed.
    """
    server = _torchft("torchft.coordination").LighthouseServer
    return server(
        bind=f"{host or '[::]'}:{port}",
        min_replicas=min_replicas,
        join_timeout_ms=int(join_s * 1e3),
        quorum_tick_ms=50,
        heartbeat_timeout_ms=int(SILENT_S * 1e3),
    )


@dataclass(frozen=True)
class Round:
    """A quorum, as one member sees it: `num` members compute, this one as number `place` (None: it receives the state
    first). `number` tells quorums apart."""

    num: int
    place: int | None
    number: int


class Members:
    """This process' part in the job.

    Args:
        settings: of the job.
        state: what a process that is behind must receive; called while nothing changes.
        load: takes such a state in.

    Raises:
        InputError: torchft is not installed, or no lighthouse is known.
        StepError: the lighthouse does not answer.
    """

    def __init__(self, settings: Elastic, state: Callable[[], State], load: Callable[[State], None]) -> None:
        torchft = _torchft("torchft")
        address = settings.address
        host = own_address(urlsplit(address).hostname or "")
        limit = timedelta(seconds=settings.timeout_s)
        torch_stores: Any = dist
        self._store = torch_stores.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._settings = settings
        self._group = torchft.ProcessGroupGloo(timeout=limit)
        self._limit = limit
        self.sent_to: Counter[int] = Counter()  # bytes, by the place of the member in the quorum of that time
        for name in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            if logging.getLogger(name).level == logging.NOTSET:  # a lost process is no error here, and told by events
                logging.getLogger(name).setLevel(logging.CRITICAL)
        transport = _transport_class()(host, limit)
        try:
            self._manager = torchft.Manager(
                pg=self._group,
                load_state_dict=load,
                state_dict=state,
                min_replica_size=settings.min_replicas,
                use_async_quorum=True,
                timeout=limit,
                quorum_timeout=timedelta(seconds=settings.wait_s),
                connect_timeout=limit,
                rank=0,
                world_size=1,
                store_addr=host,
                store_port=self._store.port,
                lighthouse_addr=address,
                replica_id=f"{socket.gethostname()}-{os.getpid()}",
                hostname=host,
                heartbeat_interval=timedelta(seconds=HEARTBEAT_S),
                checkpoint_transport=transport,
            )
        except Exception as error:  # its server is written in Rust, whose errors have no class of their own
            transport.shutdown()
            raise StepError(
                f"the lighthouse at {address} must answer within {settings.timeout_s:g} s, but: {error}. Is it "
                "running, and may this host reach it?"
            ) from error

    @property
    def step(self) -> int:
        """Steps that the job has made. torchft counts one more: that in which all receive the state of one of them."""
        return max(int(self._manager.current_step()) - 1, 0)

    @step.setter
    def step(self, step: int) -> None:
        self._manager.load_state_dict({"step": step + 1, "batches_committed": 0})

    def gather(self) -> Round:
        """Forms the quorum of the next step, once enough processes are there.

        At the very beginning all receive the state of one of them, in a step in which nothing is computed.

        Raises:
            WaitTimeoutError: they did not come within the limit.
            StepError: the lighthouse is gone.
        """
        try:
            self._form_quorum()
            while self._manager.current_step() == 0:
                self._manager.should_commit()
                self._form_quorum()
        except TimeoutError as error:
            raise WaitTimeoutError(
                f"min_replicas={self._settings.min_replicas} processes must come within "
                f"wait_s={self._settings.wait_s:g}, but they did not ({error}). Start more, or lower min_replicas"
            ) from error
        except RuntimeError as error:
            raise StepError(
                f"the lighthouse at {self._settings.address} must form a quorum, but: {error}. Start it again; "
                "processes then go on from their last checkpoint"
            ) from error
        place = self._manager.participating_rank() if self._manager.is_participating() else None
        return Round(int(self._manager.num_participants()), place, int(self._manager._quorum_id))

    def _form_quorum(self) -> None:
        self._manager.start_quorum()
        self._manager.wait_quorum()

    def sum(self, value: Tensor) -> None:
        """Replaces a flat float tensor by its sum over the members, or spoils it, of which the vote will tell."""
        self._manager.allreduce(value, reduce_op=dist.ReduceOp.SUM).wait()
        if self.is_whole():
            count_ring(self.sent_to, value.nbytes, self.line().peers)

    def line(self) -> QuorumLine:
        """Among all that are in the quorum, those that receive the state first as well.

        Raises:
            PeerLostError: the members could not connect to each other.
        """
        if (error := self._manager.errored()) is not None:
            raise PeerLostError(f"the members of the quorum could not connect to each other: {error}")
        return QuorumLine(self._group.parent, self._limit, self.sent_to)

    def give_up(self, error: StepError) -> None:
        """The vote will fail, and those that wait for this process within the quorum hear of it now."""
        self._manager.report_error(error)
        self._group.abort()

    def is_whole(self) -> bool:
        """Whether nothing has gone wrong since the quorum was formed, as far as this process knows."""
        return self._manager.errored() is None

    def vote(self, agrees: bool = True) -> bool:
        """Whether the step counts: nobody of the quorum was lost, and this process agrees. Takes the state in first, if
        it was behind."""
        if not agrees:
            self._manager.report_error(StepError("this process does not agree"))
        return bool(self._manager.should_commit())

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._manager.shutdown(wait=False)


def _torchft(name: str) -> Any:
    import importlib

    os.environ.setdefault("RUST_LOG", "error")  # its servers print every vote otherwise
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"elastic training needs torchft, which cannot be imported ({error}). pip install 'partita[elastic]'"
        ) from error


# The state, from one that has it to one that has not ---------------------------------------------------------------


def _transport_class() -> Any:
    """The class of `StateTransport`, which exists where torchft does."""
    base = _torchft("torchft.checkpointing.transport").CheckpointTransport

    class StateTransport(base):  # type: ignore[misc, valid-type]
        """Serves the state at one address under a name that only the job's processes can say."""

        def __init__(self, host: str, limit: timedelta) -> None:
            self._limit_s = limit.total_seconds()
            self._num_steps = 0  # since something was offered
            self._server = _Server(host, self._limit_s)
            self._metadata = f"http://{host}:{self._server.server_port}"

        def metadata(self) -> str:
            return self._metadata

        def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
            buffer = io.BytesIO()
            torch.save(state_dict, buffer)
            self._server.offer({path_of(step): buffer.getvalue()})
            self._num_steps = 0

        def disallow_checkpoint(self) -> None:
            """Called after every step. What was offered is a copy, so it may be fetched while training goes on."""
            self._num_steps += 1
            if self._num_steps > KEPT_STEPS:
                self._server.offer({})

        def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
            try:
                with urllib.request.urlopen(metadata + path_of(step), timeout=self._limit_s) as reply:
                    content = reply.read()
            except (urllib.error.URLError, OSError) as error:
                raise PeerLostError(
                    f"the state of step {step} could not be fetched from {metadata}: {error}"
                ) from error
            return torch.load(io.BytesIO(content), weights_only=True)

        def shutdown(self, wait: bool = True) -> None:
            self._server.shutdown()
            self._server.server_close()

    return StateTransport


def path_of(step: int) -> str:
    """Under which the state of a step is served: whoever has not the job's secret cannot name it."""
    return f"/{token_of(f'state {step}').hex()}/{step}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, limit_s: float) -> None:
        self._offered: dict[str, bytes] = {}
        self._limit_s = limit_s
        self._changed = threading.Condition()
        super().__init__((host, 0), _Handler)
        threading.Thread(target=self.serve_forever, name="partita-state", daemon=True).start()

    def offer(self, offered: dict[str, bytes]) -> None:
        """From now on these are served, by path, and nothing else."""
        with self._changed:
            self._offered = offered
            self._changed.notify_all()

    def wait_for(self, path: str) -> bytes | None:
        """What is served under a path, once it is: whoever asks may have heard of the quorum first."""
        with self._changed:
            self._changed.wait_for(lambda: path in self._offered, self._limit_s)
            return self._offered.get(path)


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0
    server: _Server

    def do_GET(self) -> None:
        step = self.path.rpartition("/")[2]
        belongs = step.isdigit() and hmac.compare_digest(path_of(int(step)).encode(), self.path.encode())
        content = self.server.wait_for(self.path) if belongs else None
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""

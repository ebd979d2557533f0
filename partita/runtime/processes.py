"""Messages between processes: over `torch.distributed` (gloo for CPU tensors, NCCL for GPU tensors), and collectives of
CPU tensors over connections of partita's own (`partita.runtime.sockets`).

All values travel as bytes where no arithmetic is needed, so every dtype works. Sums of dtypes that gloo does not know
(bool, 16-bit floats and integers) are formed in a wider one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not declared so

from partita.cluster.detect import job_store
from partita.cluster.job import current_job
from partita.errors import PeerLostError, StepError, WaitTimeoutError
from partita.program.instructions import TensorSpec
from partita.program.wire import LARGEST_OWN_BYTES, WIDER, padded, ring_bytes
from partita.runtime.arrivals import Arrivals
from partita.runtime.ending import Order, close_at_end
from partita.runtime.liveness import Liveness
from partita.runtime.sockets import Gate, Mesh, bytes_of, own_address
from partita.runtime.tokens import prove
from partita.runtime.torch_adapter import default_store, is_registered_group

_TURN_TIME_S = 0.5  # between ranks that end while they wait for each other; more than a process takes to end
_MAX_TURN_TIME_S = 8.0
_OUTSIDE = 0  # the session of exchanges outside of steps; those of engines count from 1
_CONNECTED: list[ProcessTransport] = []


class TransportWarning(UserWarning):
    """Collectives of CPU tensors go through gloo, because processes could not connect to each other otherwise."""


class ProcessTransport:
    """The processes of the running job, one per rank. Made by `connect`.

    Messages go through process groups that are partita's own, so that they and their threads can be ended before
    the interpreter is. If the script has made torch's default group, that is only the parent of them.

    Args:
        arrivals: of the processes before exchanges outside of steps.
        gate: how connections of partita's own are made; None: there are none, gloo does everything.
        owns_default: whether partita has initialised `torch.distributed`, and so ends it.
        timeout_s: limit of one exchange outside of steps over connections of partita's own.
    """

    def __init__(
        self,
        rank: int,
        num_processes: int,
        liveness: Liveness,
        arrivals: Arrivals,
        *,
        gate: Gate | None,
        owns_default: bool,
        timeout_s: float = 120.0,
    ) -> None:
        self.rank = rank
        self.num_processes = num_processes
        self.liveness = liveness
        self.gate = gate
        self.group: Any = None
        self._arrivals = arrivals
        self._owns_default = owns_default
        self._sessions: list[ProcessSession] = []  # that may still have groups
        self._num_sessions = 0
        self._timeout_s = timeout_s
        self._mesh: Mesh | None = None
        self._has_mesh = gate is None  # or none can be had
        self._closed = False

    def mesh(self) -> Mesh | None:
        """Connections of partita's own among all processes, for exchanges outside of steps; None: there are none.
        The first call opens them, on all processes."""
        if not self._has_mesh:
            assert self.gate is not None
            everyone = tuple(range(self.num_processes))
            self._mesh, self._has_mesh = _opened(self.gate, _OUTSIDE, 1, everyone, self._timeout_s), True
        return self._mesh

    def session(self) -> ProcessSession:
        self._num_sessions += 1
        session = ProcessSession(self, self._num_sessions)
        self._sessions = [*(one for one in self._sessions if one.has_groups), session]
        return session

    def open_group(self, timeout_s: float) -> None:
        """Make the group for exchanges outside of steps, unless the default one is partita's."""
        if not self._owns_default:
            everyone = list(range(self.num_processes))
            limit = timedelta(seconds=timeout_s)

            def make() -> None:
                self.group = dist.new_group(everyone, timeout=limit)

            self.guard(make, "the opening of partita's process group")

    def note(self, activity: str) -> None:
        """What this process is in; the others read it if they wait for it in vain."""
        self.liveness.activity = activity

    @contextlib.contextmanager
    def working_alone(self) -> Iterator[None]:
        """Inside, but for exchanges, the others wait for this process without a limit as long as it lives."""
        before, self.liveness.works_alone = self.liveness.works_alone, True
        try:
            yield
        finally:
            self.liveness.works_alone = before

    def guard(self, call: Callable[[], None], what: str, *, patient: bool = True) -> None:
        """Run an exchange outside of steps, on `group`; say in one error what broke it.

        Args:
            patient: whether it begins only once all processes have come, however long they work alone before; that
                takes two messages to the job's store.

        Raises:
            WaitTimeoutError, PeerLostError: as `ProcessSession.wait`.
        """
        if self.liveness.lost is not None:
            raise PeerLostError(f"{self.liveness.lost}; process rank {self.rank} wanted to begin {what}")
        self.liveness.activity = what
        works_alone = self.liveness.works_alone
        self.liveness.listen(_OUTSIDE, self._wake)  # a process that ends now is missed
        try:
            if patient:
                self._arrivals.wait()
            self.liveness.works_alone = False
            call()
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            if "timed out" in text.lower() and self.liveness.lost is None:
                raise WaitTimeoutError(
                    f"all processes must take part in {what}, but process rank {self.rank} waited for the others up to "
                    f"the limit ({text}); {self.liveness.last_reports()}. All must make the same calls and steps with "
                    "batches of the same shape; raise timeout_s if one needs that long on purpose."
                ) from error
            self.liveness.explain(_OUTSIDE)
            reason = self.liveness.lost or f"a connection broke ({text}), and no process has said why"
            raise PeerLostError(f"{reason}; process rank {self.rank} was in {what}") from error
        finally:
            self.liveness.forget(_OUTSIDE)
        self.note(f"work of its own after {what}")
        self.liveness.works_alone = works_alone

    def _wake(self, _: StepError) -> None:
        """Nobody waits for a process that is lost."""
        if self._mesh is not None:
            self._mesh.interrupt()

    def close(self) -> None:
        """Say goodbye to the other processes, then end the process groups. Runs by itself at the interpreter's end."""
        if self._closed:
            return
        self._closed = True
        self.liveness.close()
        if self._mesh is not None:
            self._mesh.close()
        if self.gate is not None:
            self.gate.close()
        for session in self._sessions:
            session.close(at_rest=session.at_rest)
        if any(session.has_groups for session in self._sessions):
            return  # a group that is in use cannot end, and torch ends the default group only with all others
        group, self.group = self.group, None
        _end_group(group)
        if self._owns_default and dist.is_initialized():
            dist.destroy_process_group()

    def at_end(self) -> None:
        self.close()


class ProcessSession:
    """The messages of one engine: process groups of its own, so that a failed engine leaves nothing half done
    behind.
    """

    def __init__(self, transport: ProcessTransport, number: int) -> None:
        self.transport = transport
        self.number = number
        self.liveness = transport.liveness
        self.failed = False
        self.at_rest = True  # whether no worker is left in a message; said by `close`
        self.turn_s = min((transport.num_processes - 1 - transport.rank) * _TURN_TIME_S, _MAX_TURN_TIME_S)
        self._groups: list[_Group] = []
        self._meshes: list[Mesh] = []
        self._num_lines = 0
        self._sent_to: Counter[int] = Counter()  # over groups; meshes count for themselves
        self._counting = threading.Lock()

    @property
    def sent_to(self) -> Counter[int]:
        return sum((mesh.sent_to for mesh in self._meshes), self._sent_to + Counter())

    def count(self, sent: Mapping[int, int]) -> None:
        """So many bytes were sent to each process over a group."""
        with self._counting:  # several workers send
            self._sent_to.update(sent)

    @property
    def has_groups(self) -> bool:
        return bool(self._groups)

    def line(self, processes: tuple[int, ...], timeout_s: float) -> ProcessLine:
        self._num_lines += 1
        group = self._group(processes, timeout_s)
        mesh = self._mesh(processes, timeout_s) if self.transport.rank in processes else None
        return ProcessLine(self, group, mesh, processes, timeout_s)

    def _mesh(self, processes: tuple[int, ...], timeout_s: float) -> Mesh | None:
        gate = self.transport.gate
        if gate is None:
            return None
        made = _opened(gate, self.number, self._num_lines, processes, timeout_s)
        self._meshes += [] if made is None else [made]
        return made

    def mail(self, timeout_s: float) -> ProcessMail:
        return ProcessMail(self, self._group(tuple(range(self.transport.num_processes)), timeout_s), timeout_s)

    def _group(self, processes: tuple[int, ...], timeout_s: float) -> _Group:
        group = _Group(dist.new_group(list(processes), timeout=timedelta(seconds=timeout_s)))
        if self.transport.rank in processes:
            self._groups.append(group)
        return group

    def on_failure(self, listener: Callable[[StepError], None]) -> None:
        def noted(error: StepError) -> None:
            listener(error)  # first: what the interrupted workers raise is a consequence of it
            self._give_up()

        self.liveness.listen(self.number, noted)

    def _give_up(self) -> None:
        """Wake the workers that wait for other processes."""
        self.failed = True
        for mesh in self._meshes:
            mesh.interrupt()

    def report(self, error: BaseException) -> None:
        self._give_up()
        self.liveness.report(self.number, error)

    def close(self, *, at_rest: bool) -> None:
        self.liveness.forget(self.number)
        self.at_rest = at_rest
        if not at_rest:  # a group with unfinished messages blocks when it ends
            self._give_up()
            return
        meshes, self._meshes = self._meshes, []
        for mesh in meshes:
            mesh.close()
        if self.failed and any(group.uses_nccl for group in self._groups):
            return  # its kernels may wait for a lost process for ever, and so would whoever ends the group
        groups, self._groups = self._groups, []
        for group in groups:
            group.end()

    def wait(self, call: Callable[[], object], what: str, timeout_s: float) -> None:
        """Call what sends, receives, or waits for a message; say in one error what broke it.

        Raises:
            WaitTimeoutError, PeerLostError: the reason, as far as it is known here; a lost or failed process is
                reported through `on_failure` before, and then counts as the root cause.
            StepError: the session has failed before; that is the root cause.
        """
        try:
            call()
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            if not self.failed and "timed out" in text.lower() and self.liveness.lost is None:
                raise WaitTimeoutError(
                    f"process rank {self.transport.rank} must not wait longer than timeout_s={timeout_s:g} "
                    f"for {what}, but "
                    f"did ({text}). Raise timeout_s if the other side needs that long on purpose."
                ) from error
            if self.failed or (self.liveness.explain(self.number) and self.failed):
                raise StepError(f"{what} was given up ({text}), because the step has failed elsewhere") from error
            raise PeerLostError(
                f"process rank {self.transport.rank} lost its connection during {what} ({text}), and no "
                f"process has said why"
            ) from error


def _opened(gate: Gate, session: int, line: int, processes: tuple[int, ...], timeout_s: float) -> Mesh | None:
    """A mesh among these processes, all of which call this; None, with a warning, where they cannot connect."""
    made = gate.mesh(session, line, processes, timeout_s)
    if isinstance(made, Mesh):
        return made
    warnings.warn(
        f"sums between processes go through gloo, which is slower, because {made}. Name the network interface that "
        "all hosts reach each other by in GLOO_SOCKET_IFNAME, and let its TCP ports through the firewall.",
        TransportWarning,
        stacklevel=4,
    )
    return None


class _Group:
    """One of torch's process groups, held here alone: its threads end with the last reference to it."""

    def __init__(self, group: Any) -> None:
        self.torch_group = group

    @property
    def uses_nccl(self) -> bool:
        return is_registered_group(self.torch_group) and "nccl" in str(dist.get_backend(self.torch_group))

    def end(self) -> None:
        group, self.torch_group = self.torch_group, None
        _end_group(group)


def _end_group(group: Any) -> None:
    """Let torch forget the group, unless the script has destroyed all groups before."""
    if group is not None and is_registered_group(group):
        dist.destroy_process_group(group)


class ProcessLine:
    """Collectives among some processes: of CPU tensors over `mesh` if there is one, else over `group`."""

    def __init__(
        self, session: ProcessSession, group: _Group, mesh: Mesh | None, processes: tuple[int, ...], timeout_s: float
    ) -> None:
        self.bytes_sent = 0
        self._session = session
        self._group = group
        self._mesh = mesh
        self._processes = processes
        self._timeout_s = timeout_s
        self._names = f"processes {', '.join(map(str, processes))}"

    def all_reduce(self, value: Tensor) -> None:
        wide = value.to(WIDER[value.dtype]) if value.dtype in WIDER and value.device.type == "cpu" else value
        if wide.is_complex():
            wide = torch.view_as_real(wide)
        if self._mesh is not None and wide.numel() * wide.element_size() <= LARGEST_OWN_BYTES:
            self._over_mesh(self._mesh, lambda mesh: mesh.all_reduce(wide.view(-1)), f"a sum over {self._names}")
        else:
            self._over_group(wide)
        if wide.dtype != value.dtype and not value.is_complex():
            value.copy_(wide)

    def _over_mesh(self, mesh: Mesh, call: Callable[[Mesh], None], what: str) -> None:
        before = mesh.bytes_sent
        self._session.wait(lambda: call(mesh), what, self._timeout_s)
        self.bytes_sent += mesh.bytes_sent - before

    def _over_group(self, wide: Tensor) -> None:
        work: Any = dist.all_reduce(wide, group=self._group.torch_group, async_op=True)
        self._session.wait(work.wait, f"a sum over {self._names}", self._timeout_s)
        num_bytes = ring_bytes(wide.numel() * wide.element_size(), len(self._processes))
        place = self._processes.index(self._session.transport.rank)
        self._session.count({self._processes[(place + 1) % len(self._processes)]: num_bytes})
        self.bytes_sent += num_bytes

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        if self._mesh is not None:
            return self._exchange_over_mesh(self._mesh, outgoing, incoming)
        device = next((value.device for values in outgoing.values() for value in values), torch.device("cpu"))
        sent = [[as_bytes(value) for value in outgoing.get(process, ())] for process in self._processes]
        out_sizes = [sum(padded(part.numel()) for part in parts) for parts in sent]
        in_sizes = [sum(padded(spec.num_bytes) for spec in incoming.get(process, ())) for process in self._processes]
        message = torch.zeros(sum(out_sizes), dtype=torch.uint8, device=device)
        position = 0
        for part in (part for parts in sent for part in parts):
            message[position : position + part.numel()] = part
            position += padded(part.numel())
        answer = torch.empty(sum(in_sizes), dtype=torch.uint8, device=device)
        work: Any = dist.all_to_all_single(
            answer, message, in_sizes, out_sizes, group=self._group.torch_group, async_op=True
        )
        self._session.wait(work.wait, f"an exchange among {self._names}", self._timeout_s)
        self._session.count(dict(zip(self._processes, out_sizes, strict=True)))
        self.bytes_sent += message.numel()
        return self._unpacked(answer, incoming)

    def _exchange_over_mesh(
        self, mesh: Mesh, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        result = {
            process: [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
            for process, specs in incoming.items()
        }
        sent = {process: [bytes_of(value.contiguous()) for value in values] for process, values in outgoing.items()}
        received = {process: [bytes_of(value) for value in values] for process, values in result.items()}
        self._over_mesh(mesh, lambda one: one.move(sent, received), f"an exchange among {self._names}")
        return result

    def _unpacked(self, answer: Tensor, incoming: Mapping[int, Sequence[TensorSpec]]) -> dict[int, list[Tensor]]:
        result: dict[int, list[Tensor]] = {}
        position = 0
        for process in self._processes:
            for spec in incoming.get(process, ()):
                piece = answer[position : position + spec.num_bytes]
                result.setdefault(process, []).append(piece.view(spec.dtype).view(spec.shape))
                position += padded(spec.num_bytes)
            if process in incoming:
                result.setdefault(process, [])
        return result


class ProcessMail:
    """Single values between processes, matched by tag. GPU values travel through the host's memory."""

    def __init__(self, session: ProcessSession, group: _Group, timeout_s: float) -> None:
        self.bytes_sent = 0
        self._session = session
        self._group = group
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # several workers send

    def send(self, value: Tensor, process: int, tag: int) -> Callable[[], None]:
        message = as_bytes(value.cpu())
        if message.numel() == 0:
            return lambda: None
        with self._lock:
            self.bytes_sent += message.numel()
        self._session.count({process: message.numel()})
        work: Any = dist.isend(message, process, group=self._group.torch_group, tag=tag)

        def finish() -> None:
            # `message` must live until here, and only this closure keeps it.
            self._session.wait(work.wait, f"process {process} to take {message.numel()} bytes", self._timeout_s)

        return finish

    def receive(self, spec: TensorSpec, process: int, tag: int) -> Tensor:
        value = torch.empty(spec.shape, dtype=spec.dtype)
        if spec.num_bytes:
            work: Any = dist.irecv(as_bytes(value), process, group=self._group.torch_group, tag=tag)
            self._session.wait(work.wait, f"{spec.num_bytes} bytes from process {process}", self._timeout_s)
        return value


def as_bytes(value: Tensor) -> Tensor:
    """The tensor's memory as flat bytes (a copy only if it is not contiguous)."""
    return value.detach().contiguous().view(-1).view(torch.uint8)


# Joining -------------------------------------------------------------------------------------------------------------


def connect(*, timeout_s: float = 120.0) -> ProcessTransport:
    """Join the processes of the running job (torchrun, mpirun, srun); later calls return the same transport.

    Initialises `torch.distributed` if the script has not done so.

    Raises:
        PeerLostError: some ranks did not come within `timeout_s` (names them).
        StepError: this process belongs to no job of several processes, or has another secret than they have.
        ClusterError: the job's master is unknown or unreachable.
    """
    if _CONNECTED:
        return _CONNECTED[0]
    initialised = dist.is_initialized()
    if not initialised:
        _initialise(timeout_s)
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    store: Any = default_store()
    turn = int(store.add(f"partita/transport/{rank}", 1))  # counts the transports that this rank has opened
    store_rank = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0

    def part(name: str) -> PrefixStore:
        """A part of the store for one user, with a connection of its own where the store has such."""
        return PrefixStore(f"partita/{name}/{turn}", store.clone() if hasattr(store, "clone") else store)

    prove(part("tokens"), rank, num_processes, timeout_s)
    liveness = Liveness(part("transport"), rank, num_processes, store_rank=store_rank)
    gate = _gate(part("sockets"), rank)
    arrivals = Arrivals(part("arrivals"), liveness, num_processes, timeout_s)
    transport = ProcessTransport(
        rank, num_processes, liveness, arrivals, gate=gate, owns_default=not initialised, timeout_s=timeout_s
    )
    close_at_end(transport, Order.CONNECTIONS)
    transport.open_group(timeout_s)
    _CONNECTED.append(transport)
    return transport


def _initialise(timeout_s: float) -> None:
    job = current_job()
    if job is None:
        raise StepError(
            "connect must be called in a job of several processes, but no launcher has set RANK and "
            "WORLD_SIZE. Start the "
            "script with torchrun, mpirun or srun."
        )
    store: Any = job_store(job, timeout_s=timeout_s)
    turn = int(store.add(f"partita/hello/{job.rank}", 1))
    key = f"partita/hello/{turn}"
    store.set(f"{key}/{job.rank}", f"{socket.gethostname()} {os.getpid()}")
    missing: list[int] = []
    for rank in range(job.world_size):
        try:
            store.wait([f"{key}/{rank}"], timedelta(seconds=0.1 if missing else timeout_s))
        except RuntimeError:
            missing.append(rank)
    if missing:
        names = ", ".join(map(str, missing))
        raise PeerLostError(
            f"all {job.world_size} processes of the job must start, but rank(s) {names} did not come within "
            f"timeout_s={timeout_s:g}. See their output; `partita doctor` tests the connection."
        )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
        store=PrefixStore(f"partita/group/{turn}", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _gate(store: Any, rank: int) -> Gate | None:
    """Where this process takes connections: nowhere if its tensors may be on a GPU, or if the launcher has not said
    where the job's master is (then no process knows it)."""
    job = current_job()
    if job is None or job.master_address is None or torch.cuda.is_available():
        return None
    try:
        host = own_address(job.master_address)
    except OSError as error:
        warnings.warn(f"process rank {rank} takes no connections: {error}", TransportWarning, stacklevel=3)
        host = ""
    return Gate(store, rank, host)

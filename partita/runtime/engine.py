"""`Engine`: runs one process's share of a `ProgramSet`, step after step.

Per step: random draws (in the caller's thread, as plain PyTorch would draw them), feeds, then all local workers at
once, each its own instruction list; afterwards the new values of buffers are written back.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.errors import InputError, PlanError, ProgramError, StepError
from partita.graph.randomness import default_generator
from partita.plan import Plan
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Feed,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Start,
)
from partita.program.timeline import Timeline
from partita.runtime.background import BackgroundSum, Courier, SumFn
from partita.runtime.binding import Binder, FilterFn, Mode, Registers, UpdateFn
from partita.runtime.collectives import Seat
from partita.runtime.cores import Crew
from partita.runtime.ending import END_TIME_S, Order, close_at_end, tell_unended
from partita.runtime.failure import Failure, Stopped, Waiter
from partita.runtime.local import Channel, Meeting, Party
from partita.runtime.segments import Code, build, python_code
from partita.runtime.torch_adapter import copy_all, is_ordinary_thread
from partita.runtime.transport import Line, Mail, Session, Transport
from partita.runtime.worker import WorkerThread

_COLLECTIVES = (AllReduce, ReduceScatter, AllGather, AllToAll)
STOP_TIME_S = 2.0  # after a failure, workers get this long to come to rest before the error is raised


@dataclass(frozen=True, kw_only=True)
class State:
    """The tensors that live from step to step: one storage per process, shared by its workers.

    Names are those of the graph's inputs (for tied parameters the first name).
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def registers(self) -> Registers:
        groups = (("p:", self.parameters), ("b:", self.buffers), ("c:", self.constants))
        return {prefix + name: value.detach() for prefix, values in groups for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step gives: the loss (of the global batch), the timeline if recorded, bytes sent to other processes, and
    the norm of all gradients before they were clipped, where programs clip."""

    loss: Tensor
    timeline: Timeline | None
    bytes_sent: int
    norm: float | None = None
    sent_to: Mapping[int, int] = field(default_factory=dict)  # the same by receiving process


class Engine:
    """Runs the programs of one process's workers.

    Args:
        programs: the programs of all workers of the job.
        plan: gives every worker's cores, and the number of threads of each.
        process: rank of this process.
        state: parameters, buffers and constants; changed in place by updates.
        update: applies the optimizer to slices, called in the owning worker's thread.
        transport: connection to the other processes; needed where programs cross processes.
        timeout_s: limit of every single wait of a worker.
        compiled: whether segments are compiled (default: as the plan says).
        sum_gradients: makes what forms a sum of gradients over processes, for each such instruction of each local
            worker and the processes of its group; None: they are summed exactly.
        filter_gradients: changes the gradients of slices before they are clipped and applied, called in the owning
            worker's thread.

    Raises (from `step`):
        WorkerError: a worker raised; `__cause__` is the original exception.
        PeerLostError: another process is gone.
        WaitTimeoutError: a wait passed `timeout_s`.
        StepError: another process failed, or this engine failed in an earlier step.

    Example:
        >>> with Engine(programs, plan, process=0, state=state, update=update) as engine:
        ...     outcome = engine.step(pytree.tree_leaves(batch))
    """

    def __init__(
        self,
        programs: ProgramSet,
        plan: Plan,
        *,
        process: int,
        state: State,
        update: UpdateFn,
        transport: Transport | None = None,
        timeout_s: float = 120.0,
        compiled: bool | None = None,
        sum_gradients: Callable[[AllReduce, tuple[int, ...]], SumFn] | None = None,
        filter_gradients: FilterFn | None = None,
    ) -> None:
        self.programs = programs
        self.plan = plan
        self.process = process
        self.state = state
        self.update = update
        self.filter_gradients = filter_gradients
        self._sum_gradients = sum_gradients
        self.mode = Mode()
        self.timeout_s = timeout_s
        self.failure = Failure()
        self.local = tuple(program for program in programs.programs if program.process == process)
        self.device = self._device()
        self._persistent = state.registers()  # once: making hundreds of views takes as long as a small step
        self._check(transport)
        self._own = {program.worker: self._persistent | self._views(program) for program in self.local}
        self._session = transport.session() if transport is not None else None
        self._compiled = plan.compiled if compiled is None else compiled
        self._main = Waiter(self.failure)
        self._lock = threading.Lock()
        self._num_running = 0
        self._closed = False
        self._connections = Connections(programs, process, self._session, timeout_s, self.failure)
        self._codes = self._build_codes()
        self._draws = [(draw.name, python_code(draw.module.graph, draw.module)) for draw in programs.draws]
        self._crew = Crew([self.plan.workers[program.worker].cores for program in self.local])
        self.workers = [self._make_worker(program) for program in self.local]
        self._connections.meet({worker.party.worker: worker.party for worker in self.workers})
        close_at_end(self, Order.WORKERS)
        for worker in self.workers:
            binder = Binder(worker.program, self, worker.generator)
            worker.start(binder.bind(), binder.pending)
        self._buffers = [
            (worker, [state.buffers[name].detach() for name in buffers], list(buffers.values()))
            for worker in self.workers
            if (buffers := worker.program.buffers)
        ]
        self._random = [worker for worker in self.workers if self._draws_in(worker.program)]
        if self._session is not None:
            self._session.on_failure(self._on_peer_failure)

    # Construction ----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        gpus = [gpu for program in self.local if (gpu := self.plan.workers[program.worker].gpu) is not None]
        if not gpus:
            return torch.device("cpu")
        if len(self.local) != 1 or not torch.cuda.is_available():
            raise PlanError(
                f"a process with GPUs must have one worker and see its GPU, but process {self.process} has "
                f"{len(self.local)} workers on GPUs {gpus} and "
                f"{torch.cuda.device_count()} visible GPUs. Start one process per GPU."
            )
        return torch.device("cuda", gpus[0])

    def _check(self, transport: Transport | None) -> None:
        if not self.local:
            raise PlanError(
                f"every process must have a worker, but process {self.process} has none in a plan of "
                f"{len(self.plan.workers)} workers. Start as many processes as the plan has."
            )
        if len({program.process for program in self.programs.programs}) > 1 and transport is None:
            raise PlanError("a plan of several processes must be given a transport, but transport is None")
        if not any(program.loss for program in self.local):
            raise ProgramError(
                f"one worker of every process must have the loss, but none of process {self.process} has"
            )
        for program in self.local:
            for instruction in program.instructions:
                names = instruction.inputs if isinstance(instruction, Run) else ()
                missing = [name for name in names if name[:2] in ("p:", "b:", "c:") and name not in self._persistent]
                if missing:
                    raise PlanError(
                        f"the state must hold every tensor that the programs read, but {missing[0]!r} is missing "
                        f"(and {len(missing) - 1} more). Is the plan for another model?"
                    )

    def _views(self, program: Program) -> Registers:
        """A worker's own parts of parameters, as views of what the process stores."""
        return {f"p:{name}": box.of(self._persistent[f"p:{name}"]) for name, box in program.views.items()}

    def _build_codes(self) -> dict[str, Code]:
        """Code of every segment that runs here, made once per key, before the worker threads exist."""
        keys = dict.fromkeys(
            instruction.segment
            for program in self.local
            for instruction in program.instructions
            if isinstance(instruction, Run)
        )
        return {
            key: build(
                self.programs.segments[key],
                compiled=self._compiled,
                device=self.device,
                num_threads=self.plan.threads_per_worker,
            )
            for key in keys
        }

    def _make_worker(self, program: Program) -> WorkerThread:
        return WorkerThread(
            program,
            cores=self.plan.workers[program.worker].cores,
            crew=self._crew,
            num_threads=self.plan.threads_per_worker,
            device=self.device,
            failure=self.failure,
            timeout_s=self.timeout_s,
            finished=self._on_finished,
        )

    def _draws_in(self, program: Program) -> bool:
        runs = (instruction for instruction in program.instructions if isinstance(instruction, Run))
        return any(self.programs.segments[run.segment].random for run in runs)

    # What a binder asks for ------------------------------------------------------------------------------------------

    def code(self, segment: str) -> Code:
        return self._codes[segment]

    def seat(self, worker: int, group: tuple[int, ...], key: str) -> Seat:
        return self._connections.seat(worker, group, key)

    def channel(self, sender: int, receiver: int, key: str) -> Channel:
        return self._connections.channel(sender, receiver, key)

    def remote(self, sender: int, receiver: int, key: str) -> tuple[Mail, int] | None:
        return self._connections.remote(sender, receiver, key)

    def background(self, worker: int, collective: AllReduce) -> BackgroundSum:
        return self._connections.background(worker, collective, self.gradient_sum(worker, collective))

    def gradient_sum(self, worker: int, collective: AllReduce) -> SumFn | None:
        """What forms the sum, None if it is an ordinary one."""
        processes = tuple(sorted(self.process_of(member) for member in collective.group))
        if self._sum_gradients is None or not collective.gradients or len(processes) < 2:
            return None
        return self._sum_gradients(collective, processes)

    def process_of(self, worker: int) -> int:
        return self._connections.process_of[worker]

    @property
    def not_compiled(self) -> Mapping[str, str]:
        """Segments that were to be compiled and are not, with the reason."""
        return {key: code.reason for key, code in self._codes.items() if code.reason}

    # Steps -----------------------------------------------------------------------------------------------------------

    def step(
        self,
        leaves: Sequence[Tensor] | Mapping[int, Tensor],
        *,
        row_offsets: Mapping[int, int] | None = None,
        update: bool = True,
        commit_buffers: bool = True,
        record: bool = False,
        accumulate_only: bool = False,
        continues: bool = True,
        finite_only: bool = False,
        most_norm: float = math.inf,
        loss_scale: float = 1.0,
    ) -> StepOutcome:
        """Run one training step on a batch.

        Args:
            leaves: the batch's leaves by index (`pytree.tree_leaves` order); only those that the programs feed on are
                read.
            row_offsets: leaf index -> number of its first row in the global batch, for leaves that hold only some rows.
            update: False leaves parameters as they are (gradients are computed and dropped).
            commit_buffers: False leaves buffers as they are.
            record: measure every instruction into `StepOutcome.timeline`.
            accumulate_only: add the gradients to those of the next step instead of updating.
            continues: False drops what earlier steps have accumulated.
            finite_only: a step whose loss is NaN or infinite changes neither parameters nor buffers; one whose
                gradients have no finite norm (where programs clip) changes no parameters.
            most_norm: limit of the norm of all gradients, where programs clip.
            loss_scale: what the loss is multiplied by in the programs; where programs clip, gradients are divided by it
                before they are clipped. Loss and norm of the outcome are those without it.
        """
        self._refuse_if_unusable()
        start_s = time.perf_counter()
        sent = self._connections.bytes_sent
        before = None if self._session is None else self._session.sent_to
        feeds = self._registers(leaves, row_offsets or {})
        self.mode.update, self.mode.accumulate_only, self.mode.finite_only = update, accumulate_only, finite_only
        self.mode.most_norm, self.mode.loss_scale, self.mode.continues = most_norm, loss_scale, continues
        self._seed_workers()
        self._let_run(feeds, start_s, record)
        end_s = time.perf_counter()
        num_bytes = self._connections.bytes_sent - sent
        sent_to = {} if self._session is None or before is None else self._session.sent_to - before
        outcome = self._outcome(commit_buffers, record, end_s - start_s, num_bytes, sent_to)
        if self._random:
            default_generator(self.device).set_state(self._random[0].generator.get_state())
        return outcome

    def _refuse_if_unusable(self) -> None:
        if self.failure.error is not None:
            raise StepError(
                f"an engine that has failed cannot step again; build a new one. It failed with: {self.failure.error}"
            ) from self.failure.error
        if self._closed:
            raise StepError("an engine must not be closed to step, but close() was called; build a new one")

    def _registers(
        self, leaves: Sequence[Tensor] | Mapping[int, Tensor], row_offsets: Mapping[int, int]
    ) -> list[Registers]:
        """Every local worker's registers at the start of the step."""
        draws: dict[str, Tensor] = {}
        if self._draws:
            generator = default_generator(self.device)
            with torch.no_grad():
                for name, draw in self._draws:
                    drawn = draw(generator)
                    draws[name] = drawn if isinstance(drawn, Tensor) else drawn[0]
        result = []
        for program in self.local:
            registers = dict(self._own[program.worker])
            for feed in program.feeds:
                whole, offset = draws.get(feed.draw), 0
                if whole is None:
                    whole, offset = leaves[feed.leaf], row_offsets.get(feed.leaf, 0)
                registers[feed.register] = self._piece(feed, whole, offset)
            result.append(registers)
        return result

    def _piece(self, feed: Feed, whole: Tensor, offset: int) -> Tensor:
        piece = whole.detach()
        if feed.dim >= 0:
            start = feed.start - (offset if feed.dim == 0 else 0)
            if start < 0 or start + feed.length > whole.shape[feed.dim]:
                raise InputError(
                    f"leaf {feed.leaf} of the batch must hold entries {feed.start}:{feed.start + feed.length} of dim "
                    f"{feed.dim}, but its shape is {tuple(whole.shape)} and its first row is row {offset}. "
                    f"Pass a batch of "
                    f"the shape that was planned."
                )
            piece = piece.narrow(feed.dim, start, feed.length)
        for dim, start, length in feed.also:
            piece = piece.narrow(dim, start, length)
        return piece.to(self.device, non_blocking=True) if piece.device != self.device else piece

    def _seed_workers(self) -> None:
        """Workers with random ops start where the draws left torch's default generator."""
        if self._random:
            state = default_generator(self.device).get_state()
            for worker in self._random:
                worker.generator.set_state(state)

    def _on_finished(self) -> None:
        with self._lock:
            self._num_running -= 1
            last = self._num_running <= 0
        if last:
            self._main.wake()

    def _let_run(self, feeds: Sequence[Registers], start_s: float, record: bool) -> None:
        """Has the workers run a step on these registers. A worker that is alone on the CPU does so in the caller's
        thread, since waking a thread and being woken takes as long as a small step."""
        try:
            if len(self.workers) == 1 and self.device.type == "cpu" and is_ordinary_thread():
                self.workers[0].run(feeds[0], start_s, record=record)
            else:
                self._num_running = len(self.workers)
                for worker, registers in zip(self.workers, feeds, strict=True):
                    worker.begin(registers, start_s, record=record)
                meanwhile = self._crew.meanwhile()
                self._main.until(lambda: self._num_running <= 0, None, lambda: "", meanwhile)
        except Stopped:
            pass
        except BaseException as error:  # the caller's thread was interrupted
            self.failure.record(StepError(f"the step was interrupted: {error!r}"))
            self._end()
            raise
        if self.failure.error is not None:
            self._end()
            raise self.failure.error

    def _end(self) -> None:
        """After a failure: tell the other processes, give local workers a moment to come to rest."""
        error = self.failure.error
        if self._session is not None and error is not None:
            self._session.report(error)
        deadline_s = time.perf_counter() + STOP_TIME_S
        for worker in self.workers:
            worker.join(max(deadline_s - time.perf_counter(), 0.0))

    def _outcome(
        self, commit_buffers: bool, record: bool, step_time_s: float, bytes_sent: int, sent_to: Mapping[int, int]
    ) -> StepOutcome:
        loss = next(w.registers[w.program.loss] for w in self.workers if w.program.loss).clone()
        if commit_buffers and self._buffers and not (self.mode.finite_only and not math.isfinite(float(loss))):
            for worker, targets, names in self._buffers:
                copy_all(targets, [worker.registers[name] for name in names])
        squares = [w.registers[w.program.square] for w in self.workers if w.program.square]
        norm = math.sqrt(float(squares[0])) / self.mode.loss_scale if squares else None
        if self.mode.loss_scale != 1:
            loss = loss / self.mode.loss_scale
        timeline = None
        if record:
            events = tuple(event for worker in self.workers for event in worker.events)
            timeline = Timeline(events=events, step_time_s=step_time_s, bytes_sent=bytes_sent)
        for worker in self.workers:
            worker.registers = {}
        return StepOutcome(loss=loss, timeline=timeline, bytes_sent=bytes_sent, norm=norm, sent_to=sent_to)

    def _on_peer_failure(self, error: StepError) -> None:
        self.failure.record(error)

    # End -------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the worker threads. Calling it twice is harmless.

        A worker that is still in an op or a message after an interrupted step is waited for at the end of the process.
        """
        if self._closed:
            return
        self._closed = True
        self._rest(STOP_TIME_S)

    def at_end(self) -> None:
        """Close at the end of the process, where no worker may be left in an op."""
        self._closed = True
        limit_s = END_TIME_S if self._session is None else END_TIME_S + self._session.turn_s
        if not self._rest(limit_s):
            threads: list[WorkerThread | Courier] = [*self.workers, *self._connections.couriers]
            tell_unended("; ".join(one.doing() for one in threads if one.is_alive()), limit_s)

    def _rest(self, limit_s: float) -> bool:
        """Let the workers end, then the session; whether all did within the limit."""
        for worker in self.workers:
            worker.close()
        deadline_s = time.perf_counter() + limit_s
        for worker in self.workers:
            worker.join(max(deadline_s - time.perf_counter(), 0.0))
        for courier in self._connections.couriers:
            courier.close()
            courier.join(max(deadline_s - time.perf_counter(), 0.0))
        at_rest = not any(worker.is_alive() for worker in self.workers)
        at_rest &= not any(courier.is_alive() for courier in self._connections.couriers)
        if self._session is not None:
            self._session.close(at_rest=at_rest)
        return at_rest

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Connections:
    """Who meets whom: meetings, channels, and the lines and tags of messages between processes.

    Everything is derived from the programs alone, in one order, so that all processes open the same lines.
    """

    def __init__(
        self, programs: ProgramSet, process: int, session: Session | None, timeout_s: float, failure: Failure
    ) -> None:
        self.process = process
        self.process_of = {program.worker: program.process for program in programs.programs}
        self._parties: Mapping[int, Party] = {}
        self._meetings: dict[tuple[tuple[int, ...], str], Meeting] = {}
        self._channels: dict[tuple[int, int, str], Channel] = {}
        self._lines: dict[tuple[int, ...], Line] = {}
        self._couriers: dict[tuple[int, ...], Courier] = {}
        self._mail: Mail | None = None
        self._tags: dict[tuple[int, int, str], int] = {}
        if session is not None:
            self._open(programs, session, timeout_s, failure)

    def _open(self, programs: ProgramSet, session: Session, timeout_s: float, failure: Failure) -> None:
        instructions = [(program.worker, one) for program in programs.programs for one in program.instructions]
        for group in sorted({one.group for _, one in instructions if isinstance(one, _COLLECTIVES)}):
            processes = tuple(sorted({self.process_of[worker] for worker in group}))
            if len(processes) > 1:
                self._lines[group] = session.line(processes, timeout_s)
        # Sums in the background have lines of their own: each belongs to one thread.
        for group in sorted({one.collective.group for _, one in instructions if isinstance(one, Start)}):
            processes = tuple(sorted({self.process_of[worker] for worker in group}))
            line = session.line(processes, timeout_s)
            if self.process in processes:
                self._couriers[group] = Courier(line, failure, "-".join(map(str, group)))
        crossing = {
            (worker, one.peer, one.key) if isinstance(one, Send) else (one.peer, worker, one.key)
            for worker, one in instructions
            if isinstance(one, (Send, Recv)) and self.process_of[worker] != self.process_of[one.peer]
        }
        self._tags = {address: tag for tag, address in enumerate(sorted(crossing))}
        if crossing:
            self._mail = session.mail(timeout_s)

    @property
    def bytes_sent(self) -> int:
        if not self._lines and not self._couriers and self._mail is None:
            return 0
        lines = sum(line.bytes_sent for line in self._lines.values())
        lines += sum(courier.line.bytes_sent for courier in self._couriers.values())
        return lines + (self._mail.bytes_sent if self._mail is not None else 0)

    def meet(self, parties: Mapping[int, Party]) -> None:
        """Name the local workers."""
        self._parties = parties

    def seat(self, worker: int, group: tuple[int, ...], key: str) -> Seat:
        positions: dict[int, list[int]] = {}
        for position, member in enumerate(group):
            positions.setdefault(self.process_of[member], []).append(position)
        ordered = {process: tuple(positions[process]) for process in sorted(positions)}
        local = [group[position] for position in ordered[self.process]]
        meeting = self._meetings.get((group, key))
        if meeting is None:
            meeting = self._meetings[group, key] = Meeting([self._parties[member] for member in local])
        return Seat(
            meeting=meeting,
            member=local.index(worker),
            process=self.process,
            positions=ordered,
            line=self._lines.get(group),
        )

    def background(self, worker: int, collective: AllReduce, formed: SumFn | None) -> BackgroundSum:
        return BackgroundSum(collective, self._couriers[collective.group], self._parties[worker], formed)

    @property
    def couriers(self) -> tuple[Courier, ...]:
        return tuple(self._couriers.values())

    def channel(self, sender: int, receiver: int, key: str) -> Channel:
        address = (sender, receiver, key)
        if address not in self._channels:
            self._channels[address] = Channel(self._parties[sender], self._parties[receiver])
        return self._channels[address]

    def remote(self, sender: int, receiver: int, key: str) -> tuple[Mail, int] | None:
        if self.process_of[sender] == self.process_of[receiver]:
            return None
        assert self._mail is not None
        return self._mail, self._tags[sender, receiver, key]

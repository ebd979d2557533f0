"""`WorkerThread`: one persistent thread that owns one device and runs one worker's instructions, step after step."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable

import torch
from torch import Generator

from partita.errors import StepError, WorkerError
from partita.program.instructions import Program
from partita.program.timeline import Event
from partita.runtime.binding import Op, Registers, label
from partita.runtime.cores import Crew
from partita.runtime.failure import Failure, Stopped, Waiter
from partita.runtime.local import Party


class PinningWarning(UserWarning):
    """A worker could not be pinned to its cores; it runs wherever the system lets it."""


class WorkerThread:
    """Runs a bound program each time `begin` is called; `finished` is called, in this thread, after each step.

    A failure ends the thread: an engine that has failed is not used again.
    """

    def __init__(
        self,
        program: Program,
        *,
        cores: tuple[int, ...],
        crew: Crew,
        num_threads: int,
        device: torch.device,
        failure: Failure,
        timeout_s: float,
        finished: Callable[[], None],
    ) -> None:
        self.program = program
        self.device = device
        self.generator = Generator(device)
        self.party = Party(program.worker, Waiter(failure), timeout_s, crew)
        self._rest = Waiter(failure)  # of this thread between steps; the party's is of whoever runs the step
        self.party.labels = tuple(label(instruction) for instruction in program.instructions)
        self.registers: Registers = {}
        self.events: tuple[Event, ...] = ()
        self.ops: list[Op] = []
        self.pending: list[Callable[[], None]] = []
        self._cores, self._crew = cores, crew
        self._num_threads = num_threads
        self._failure = failure
        self._finished = finished
        self._kinds = tuple(type(instruction).__name__ for instruction in program.instructions)
        self._job: tuple[float, bool] | None = None  # start of the step, whether to record
        self._closing = False
        self.thread = threading.Thread(target=self._live, name=f"partita-worker-{program.worker}", daemon=True)

    def start(self, ops: list[Op], pending: list[Callable[[], None]]) -> None:
        self.ops, self.pending = ops, pending
        self.thread.start()

    def begin(self, registers: Registers, start_s: float, *, record: bool) -> None:
        """Let the worker run one step on these registers (called from the engine's thread)."""
        self.registers = registers
        self._job = (start_s, record)
        self._rest.wake()

    def run(self, registers: Registers, start_s: float, *, record: bool) -> None:
        """Run one step in the caller's thread, which saves waking this one and being woken by it. The caller's thread
        must be an ordinary one (`is_ordinary_thread`)."""
        self.registers = registers
        num_threads = torch.get_num_threads()
        try:
            if num_threads != self._num_threads:
                torch.set_num_threads(self._num_threads)
            with torch.no_grad():
                self._step(start_s, record)
        except Stopped:
            return
        except Exception as error:
            self._failure.record(self._explained(error))
        finally:
            self.party.position = -1
            if num_threads != self._num_threads:
                torch.set_num_threads(num_threads)

    def close(self) -> None:
        self._closing = True
        self._rest.wake()

    def join(self, limit_s: float) -> None:
        """Wait for the thread to end; one that was never started has."""
        if self.is_alive():
            self.thread.join(limit_s)

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def doing(self) -> str:
        """What the worker is in, for messages."""
        return f"worker {self.party.worker} in {self._where()}"

    def _live(self) -> None:
        self._settle()
        while True:
            try:
                self._rest.until(lambda: self._job is not None or self._closing, None, lambda: "")
                if self._job is None:
                    return
                start_s, record = self._job
                self._job = None
                self._step(start_s, record)
            except Stopped:
                return
            except BaseException as error:
                self._failure.record(self._explained(error))
                return
            finally:
                self.party.position = -1
                self._finished()

    def _settle(self) -> None:
        """Pin this thread (the threads that its ops start inherit that) and set how many threads its ops use."""
        if self._cores and hasattr(os, "sched_setaffinity"):
            try:
                os.sched_setaffinity(0, self._cores)
            except OSError as error:
                with contextlib.suppress(Warning):  # where warnings are errors, this thread must still live
                    warnings.warn(
                        f"worker {self.party.worker} must be able to run on the cores {self._cores} of its plan, but "
                        f"pinning failed ({error}); it runs on any core, which makes step times vary. Give the process "
                        f"those cores (taskset, container limits), or plan for the cores that it has: "
                        f"{tuple(sorted(os.sched_getaffinity(0)))}.",
                        PinningWarning,
                        stacklevel=1,
                    )
            else:
                self._crew.join(self.party.worker, self._cores)
        torch.set_num_threads(self._num_threads)
        torch.set_grad_enabled(False)  # of this thread only
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _step(self, start_s: float, record: bool) -> None:
        registers, party = self.registers, self.party
        if record:
            self._recorded(start_s)
        else:
            for index, op in enumerate(self.ops):
                party.position = index
                op(registers)
        party.position = len(self.ops)
        while self.pending:
            self.pending.pop()()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _recorded(self, start_s: float) -> None:
        clock, registers, party = time.perf_counter, self.registers, self.party
        on_gpu = self.device.type == "cuda"
        times = []
        for index, op in enumerate(self.ops):
            party.position = index
            begin_s = clock()
            op(registers)
            if on_gpu:
                torch.cuda.synchronize(self.device)
            times.append((begin_s, clock()))
        self.events = tuple(
            Event(party.worker, index, self._kinds[index], party.labels[index], begin_s - start_s, end_s - start_s)
            for index, (begin_s, end_s) in enumerate(times)
        )

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, StepError):
            return error
        party = self.party
        explained = WorkerError(
            f"worker {party.worker} (process {self.program.process}, stage {self.program.stage}) raised "
            f"{type(error).__name__} in instruction {party.position} ({self._where()}): {error}"
        )
        explained.__cause__ = error
        return explained

    def _where(self) -> str:
        party = self.party
        return party.labels[party.position] if 0 <= party.position < len(party.labels) else "the end of the step"

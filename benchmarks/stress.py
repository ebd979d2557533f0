"""Many steps of random small programs with random delays in their workers: none may hang, none may be wrong.

    python -m benchmarks.stress --steps 10000 --json stress.json

Program sets come from `benchmarks.random_programs`: 1 to 4 workers, in one process or in two. They are run by the real
engine while each worker sleeps before some of its instructions, holds the interpreter's lock before others, and the
interpreter switches threads far more often than usual. Every loss, every register that is left at the end and every
parameter is compared, bit by bit, with what a plain sequential interpreter (`benchmarks.plain_programs`) says.

Then faults: a worker that raises, a worker that is later than the time limit, a process that is killed, each at a
random instruction of a random step. Within `FAULT_LIMIT_S` every process must have raised one error, of the right kind,
and have no running worker left.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report, Row, describe_machine, first_line, option_parser, show
from benchmarks.plain_programs import PlainMachine
from benchmarks.processes import Child, ChildError, Group, Message, serve
from benchmarks.random_programs import Case, make_case, next_parameter, plan_of
from benchmarks.random_segments import MODULUS
from partita.errors import PeerLostError, StepError, WaitTimeoutError, WorkerError
from partita.program import uses
from partita.program.check import check
from partita.program.instructions import Slice
from partita.runtime.binding import Op, Registers
from partita.runtime.engine import Engine, State
from partita.runtime.processes import connect
from partita.runtime.worker import WorkerThread

LARGE_BYTES = uses.LARGE_BYTES
STEPS_PER_CASE = 20
CASES_PER_ASK = 10
SHARE_OF_TWO = 0.15  # of the steps run in two processes
NUM_FAULTS = {"raise": 40, "late": 6, "kill": 4}  # for 10,000 steps; fewer for fewer
TIMEOUT_S = 30.0
FAULT_TIMEOUT_S = 2.0  # time limit of a wait where a fault is to come
# That, plus the time in which a lost process is noticed and a failed engine lets its workers come to rest.
FAULT_LIMIT_S = FAULT_TIMEOUT_S + 8.0
SWITCH_INTERVAL_S = 2e-5  # the interpreter's own is 5 ms: races would hide in it
MAX_DELAY_S = 1e-3
COLUMNS = ("part", "processes", "cases", "steps", "instructions", "wrong", "hangs", "error", "max_s")


class Injected(Exception):
    """What a worker that is to fail raises."""


# In the measured processes -------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What one worker does before instruction `index` of step `step`: nothing if `kind` is empty."""

    kind: str = ""
    worker: int = -1
    step: int = -1
    index: int = -1

    @classmethod
    def draw(cls, kind: str, case: Case, rng: random.Random) -> Fault:
        if not kind:
            return cls()
        program = rng.choice(case.programs.programs)
        return cls(kind, program.worker, rng.randrange(STEPS_PER_CASE), rng.randrange(len(program.instructions)))

    def strike(self) -> None:
        if self.kind == "raise":
            raise Injected(f"worker {self.worker}")
        if self.kind == "late":
            time.sleep(FAULT_TIMEOUT_S + 1.5)
        elif self.kind == "kill":
            os.kill(os.getpid(), 9)


@dataclass
class Trial:
    """One case in this process: the engine against the plain interpreter.

    The delays of every worker come from a generator of its own, so that they do not depend on the order of workers.
    """

    seed: int
    rank: int
    num_processes: int
    transport: Any
    fault_kind: str = ""
    step: int = 0
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.case = make_case(self.seed, num_processes=self.num_processes)
        check(self.case.programs)
        rng = random.Random(self.seed + 1)
        self.fault = Fault.draw(self.fault_kind, self.case, rng)
        parameters = self.case.parameters[self.rank]
        self.state = State(
            parameters={name: value.clone() for name, value in parameters.items()},
            buffers=self.case.buffers[self.rank],
        )
        self.plain = PlainMachine(self.case.programs, self.case.parameters, next_parameter)

    def run(self) -> Message:
        # These gradients are small: of every second case their sums are to take their place as if they were large.
        uses.LARGE_BYTES = 1 if self.seed % 2 else LARGE_BYTES
        engine = Engine(
            self.case.programs,
            plan_of(self.case.programs.programs),
            process=self.rank,
            state=self.state,
            update=self._update,
            transport=self.transport,
            timeout_s=FAULT_TIMEOUT_S if self.fault.kind else TIMEOUT_S,
            compiled=False,
        )
        for worker in engine.workers:
            rng = random.Random(f"{self.seed} {worker.program.worker}")
            worker.ops[:] = [self._disturbed(op, index, worker, rng) for index, op in enumerate(worker.ops)]
        begin_s = time.perf_counter()
        result: Message = {"error": "", "num_steps": STEPS_PER_CASE, "num_instructions": self.case.num_instructions}
        try:
            for self.step in range(STEPS_PER_CASE):
                begin_s = time.perf_counter()
                self._one_step(engine)
        except StepError as error:
            result |= {"fault_error": type(error).__name__, "message": str(error), "cause": repr(error.__cause__)}
            result["fault_s"] = time.perf_counter() - begin_s
        engine.close()
        for worker in engine.workers:  # one that is in a message to another process may be there until its time limit
            worker.join(max(begin_s + FAULT_LIMIT_S - time.perf_counter(), 0.0))
        result["alive"] = [worker.doing() for worker in engine.workers if worker.is_alive()]
        return result | {"wrong": self.wrong, "fault": vars(self.fault)}

    def _one_step(self, engine: Engine) -> None:
        leaves = [torch.remainder(leaf + self.step, MODULUS) for leaf in self.case.leaves]
        record = self.step % 4 == 3
        outcome = engine.step(leaves, record=record)
        self.plain.step(leaves)
        self._compare("loss", outcome.loss, next(iter(self.plain.losses.values())))
        for name, value in self.state.buffers.items():
            self._compare(f"register {name}", value, self.plain.buffers[name])
        for name, value in self.state.parameters.items():
            self._compare(f"parameter {name}", value, self.plain.parameters[self.rank][name])
        if record and outcome.timeline is not None:
            expected = sum(len(worker.ops) for worker in engine.workers)
            if len(outcome.timeline.events) != expected:
                self.wrong.append(f"seed {self.seed}: {len(outcome.timeline.events)} events, not {expected}")

    def _compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        if not torch.equal(found, expected):
            values = f"{found.reshape(-1)[:4]}, not {expected.reshape(-1)[:4]}"
            self.wrong.append(f"seed {self.seed}, step {self.step}, {what}: {values}")

    def _update(self, worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
        for part, gradient in zip(slices, gradients, strict=True):
            own = self.state.parameters[part.parameter].view(-1)[part.start : part.end]
            own.copy_(next_parameter(own, gradient.view(-1)))

    def _disturbed(self, op: Op, index: int, worker: WorkerThread, rng: random.Random) -> Op:
        """The op after a delay, and after the fault if this is the place for it."""
        fault = self.fault
        here = fault.kind and (fault.worker, fault.index) == (worker.program.worker, index)

        def run_later(registers: Registers) -> None:
            delay(rng)
            if here and self.step == fault.step:
                fault.strike()
            op(registers)

        return run_later


def delay(rng: random.Random) -> None:
    """Mostly nothing; else sleep, or keep the interpreter busy."""
    chance = rng.random()
    if chance < 0.15:
        time.sleep(rng.random() * MAX_DELAY_S)
    elif chance < 0.25:
        until_s = time.perf_counter() + rng.random() * MAX_DELAY_S / 4
        while time.perf_counter() < until_s:
            pass


def answer(message: Message) -> Message:
    """Run some cases; with a fault, one."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    torch.set_num_threads(1)
    num_processes = message["num_processes"]
    transport, rank = None, 0
    if num_processes > 1:
        transport = connect(timeout_s=60.0)
        rank = transport.rank
    return {
        "trials": [
            Trial(seed, rank, num_processes, transport, message.get("fault", "")).run() for seed in message["seeds"]
        ]
    }


# In the parent -------------------------------------------------------------------------------------------------------


@dataclass
class Jobs:
    """The measured processes, one or two; a job that has hung, or lost a process, is replaced by a new one."""

    num_processes: int
    job: Any = None
    last: list[Message] = field(default_factory=list)

    def ask(self, message: Message, timeout_s: float) -> list[Message]:
        """Replies of the processes that answer; the rest is `ChildError`s, whose text becomes ``error``."""
        if self.job is None:
            self.job = Group("benchmarks.stress", "run", num_processes=self.num_processes)
        children: Sequence[Child] = self.job.children
        replies: list[Message] = []
        for child in children:
            child.send({**message, "num_processes": self.num_processes})
        deadline_s = time.monotonic() + timeout_s
        for child in children:
            try:
                replies.append(child.receive(max(1.0, deadline_s - time.monotonic())))
            except ChildError as error:
                replies.append({"error": first_line(error), "lost": True})
        if any(reply.get("error") for reply in replies):
            self.close()
        return replies

    def close(self) -> None:
        if self.job is not None:
            for child in self.job.children:
                child.close(grace_s=0.5)
            self.job = None


def run_steps(num_steps: int, seeds: Iterator[int], num_processes: int) -> Row:
    """Random programs without faults."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    errors: list[str] = []
    jobs = Jobs(num_processes)
    while found["steps"] < num_steps:
        num_cases = min(CASES_PER_ASK, -(-(num_steps - found["steps"]) // STEPS_PER_CASE))
        chosen = list(itertools.islice(seeds, num_cases))
        replies = jobs.ask({"seeds": chosen}, 60.0 + 4 * TIMEOUT_S)
        for reply in replies:
            if reply.get("error"):
                found["hangs"] += "did not answer" in reply["error"]
                errors.append(f"seeds {chosen}: {first_line(reply['error'])}")
            for trial in reply.get("trials", ()):
                wrong += trial["wrong"]
                if "fault_error" in trial or trial["alive"]:
                    errors.append(f"{trial.get('message')}; alive: {trial['alive']}")
        found["cases"] += num_cases
        found["steps"] += num_cases * STEPS_PER_CASE
        trials = replies[0].get("trials", ())
        found["instructions"] += sum(trial["num_steps"] * trial["num_instructions"] for trial in trials)
        print(f"{num_processes} process(es): {found['steps']} steps, {len(wrong)} wrong", file=sys.stderr)
    jobs.close()
    return {
        "part": "steps", "processes": num_processes, "cases": found["cases"], "steps": found["steps"],
        "instructions": found["instructions"], "wrong": len(wrong), "hangs": found["hangs"],
        "error": "; ".join(errors)[:500], "details": wrong[:20],
    }  # fmt: skip


def run_faults(kind: str, num_faults: int, seeds: Iterator[int], num_processes: int) -> Row:
    """Random programs of which each is broken once."""
    jobs = Jobs(num_processes)
    wrong: list[str] = []
    num_struck, hangs, longest_s = 0, 0, 0.0
    for seed in itertools.islice(seeds, num_faults):
        replies = jobs.ask({"seeds": [seed], "fault": kind}, 60.0 + TIMEOUT_S)
        hangs += any("did not answer" in str(reply.get("error")) for reply in replies)
        wrong += judge(kind, seed, replies)
        times = [trial["fault_s"] for reply in replies for trial in reply.get("trials", ()) if "fault_s" in trial]
        num_struck += bool(times)
        longest_s = max([longest_s, *times])
    jobs.close()
    return {
        "part": f"fault: {kind}", "processes": num_processes, "cases": num_faults, "steps": num_struck,
        "wrong": len(wrong), "hangs": hangs, "error": "; ".join(wrong)[:500], "max_s": longest_s,
    }  # fmt: skip


def judge(kind: str, seed: int, replies: Sequence[Message]) -> list[str]:
    """What is wrong about the end of a case that was broken: one sentence each.

    Every process that lives must have raised one error, within the limit, with no worker left; in the process of the
    broken worker it tells of that worker, in the other one of that process.
    """
    found = []
    lost = [reply for reply in replies if reply.get("lost")]
    if len(lost) != (kind == "kill"):
        found.append(f"{len(lost)} processes did not answer: {[reply['error'] for reply in lost]}")
    allowed = {
        "raise": {WorkerError.__name__, StepError.__name__},
        "late": {WaitTimeoutError.__name__, StepError.__name__},
        "kill": {PeerLostError.__name__},
    }[kind]
    first_hand = 0
    for reply in replies:
        for trial in reply.get("trials", ()):
            name = trial.get("fault_error", "no error")
            found += [f"{name}, not one of {sorted(allowed)}: {trial.get('message')}"] if name not in allowed else []
            found += [f"still alive: {trial['alive']}"] if trial["alive"] else []
            found += list(trial["wrong"])
            if trial.get("fault_s", 0.0) > FAULT_LIMIT_S:
                found.append(f"took {trial['fault_s']:.1f} s")
            first_hand += name in ("WorkerError", "WaitTimeoutError")
            if name == "WorkerError" and "Injected" not in trial["cause"]:
                found.append(f"the cause is {trial['cause']}")
        if reply.get("error") and not reply.get("lost"):
            found.append(first_line(reply["error"]))
    if kind == "raise" and first_hand != 1:
        found.append(f"{first_hand} processes raised the worker's error, not 1")
    if kind == "late" and first_hand < 1:
        found.append("no process raised a time-out")
    return [f"{kind}, seed {seed}: {text}" for text in found]


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=10_000, help="steps in all (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = parser.parse_args()
    if options.child:
        serve(answer)
        return 0
    settings = {"steps": options.steps, "seed": options.seed, "fault_limit_s": FAULT_LIMIT_S}
    report = Report("stress", settings, path=options.json, machine=describe_machine())
    seeds = itertools.count(options.seed)
    in_two = int(options.steps * SHARE_OF_TWO)
    report.add(run_steps(options.steps - in_two, seeds, 1))
    report.add(run_steps(in_two, seeds, 2))
    for kind, number in NUM_FAULTS.items():
        number = max(1, number * options.steps // 10_000)
        for num_processes in (1, 2) if kind != "kill" else (2,):
            report.add(run_faults(kind, number, several(seeds, kind, num_processes), num_processes))
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


def several(seeds: Iterator[int], kind: str, num_processes: int) -> Iterator[int]:
    """Seeds whose case has somebody who waits for the worker that is late."""
    for seed in seeds:
        if kind != "late" or len(make_case(seed, num_processes=num_processes).programs.programs) > 1:
            yield seed


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """Totals, and a sentence for every row with something wrong."""
    total: Callable[[str], int] = lambda name: sum(row.get(name, 0) for row in rows)  # noqa: E731
    misses = [
        f"{row['part']}, {row['processes']} process(es): {row['wrong']} wrong, {row['hangs']} hangs: {row['error']}"
        for row in rows
        if row["wrong"] or row["hangs"] or row["error"]
    ]
    faults = [row for row in rows if row["part"] != "steps"]
    misses += [
        f"{row['part']}, {row['processes']} process(es): {row['cases'] - row['steps']} faults did not end a step"
        for row in faults
        if row["steps"] != row["cases"]
    ]
    steps = sum(row["steps"] for row in rows if row["part"] == "steps")
    num_faults = sum(row["cases"] for row in faults)
    return {"steps": steps, "wrong": total("wrong"), "hangs": total("hangs"), "faults": num_faults}, misses


if __name__ == "__main__":
    sys.exit(main())

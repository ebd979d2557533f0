"""Faults: processes that are killed, stand still, lose the network, come late or are slow; damaged checkpoints.

    python -m benchmarks.faults --json benchmarks/results/faults.json --check

Three processes train (`benchmarks.fault_job`) with `partita.Elastic`; every step that any of them reports is compared
with the same step of plain PyTorch, undisturbed. `others_s`: from the fault until the others' next step is over;
`rejoined_s`: from the start of the process, or the end of the fault, until it takes part; `lost_steps`: numbers of
steps that nobody reports. The soak makes so many random faults one after the other. The network is cut by taking an
interface down, and needs root (`benchmarks.slow_machines`).

Checkpoints are damaged file by file, written to a full disk (a tmpfs, needs root), and killed at random moments.

`--check` fails where a loss differs by more than 1e-4, a step is lost, something hangs or committed state is lost, or
where the others need more than a second after a kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, option_parser, show
from benchmarks.fault_job import batch_of, build, loss_fn, plain_losses
from benchmarks.slow_machines import INTERFACE, Machines, why_not

NAMES = ("a", "b", "c")
TOLERANCE = 1e-4
MOST_OTHERS_S = 1.0
STOP_TIME_S = 20.0
CUT_TIME_S = 10.0
RATE = 125e6  # bytes a second of emulated links
DISK_BYTES = 550_000  # two checkpoints fit, and no third beside them
LIMIT_S = 120.0  # of any wait here
COLUMNS = ("fault", "steps", "deviation", "lost_steps", "others_s", "longest_s", "rejoined_s", "errors")


class Hung(Exception):
    """Something did not happen within the limit."""


class Job:
    """A lighthouse and processes, on this machine or on emulated ones."""

    def __init__(self, machines: Machines | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="partita-faults-"))
        self._machines = machines
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        command = [sys.executable, "-m", "partita", "lighthouse", "--port", "0", "--json"]
        host = machines.address(0) if machines else "127.0.0.1"
        self._lighthouse = subprocess.Popen([*self._prefix(0), *command, "--host", host], stdout=subprocess.PIPE)
        assert self._lighthouse.stdout is not None
        told = b""
        while b"}" not in told:
            told += self._lighthouse.stdout.readline()
        self._address = f"http://{host}:{urlsplit(json.loads(told[told.index(b'{') :])['address']).port}"

    def _prefix(self, machine: int) -> list[str]:
        return self._machines.prefix(machine) if self._machines else []

    def start(self, name: str, slowness: float = 0.0) -> None:
        command = [sys.executable, "-m", "benchmarks.fault_job", str(self.folder), name, self._address, str(slowness)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self._machines:
            environment["GLOO_SOCKET_IFNAME"] = INTERFACE
        with (self.folder / f"{name}.txt").open("a") as output:
            self.processes[name] = subprocess.Popen(
                [*self._prefix(NAMES.index(name)), *command], stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, name: str, number: int) -> None:
        os.killpg(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )

    def last(self, name: str) -> dict[str, Any]:
        found = self.lines(name)
        return found[-1] if found else {"step": 0, "num": 0, "end_s": 0.0}

    def until(self, ready: Callable[[], bool], what: str) -> float:
        """Waits; the time at which it was so."""
        deadline_s = time.monotonic() + LIMIT_S
        while not ready():
            for name, process in self.processes.items():
                if process.poll() not in (None, 0, -signal.SIGKILL):
                    raise Hung(f"{name} failed: {(self.folder / f'{name}.txt').read_text()[-400:]}")
            if time.monotonic() > deadline_s:
                raise Hung(f"{what} took more than {LIMIT_S:g} s")
            time.sleep(0.01)
        return time.time()

    def all_take_part(self, names: Sequence[str] = NAMES) -> None:
        self.until(lambda: all(self.last(name)["num"] == len(names) for name in names), f"a step by {names}")

    def stepped_after(self, name: str, moment_s: float) -> float:
        """When the first step of a process after that moment was over."""
        self.until(lambda: self.last(name)["end_s"] > moment_s, f"a step of {name} after a fault")
        return float(next(line["end_s"] for line in self.lines(name) if line["end_s"] > moment_s))

    def finish(self, more_steps: int = 20) -> Row:
        """Ends the job some steps later; what its steps have come to."""
        names = [name for name, process in self.processes.items() if process.poll() is None]
        end = max(self.last(name)["step"] for name in self.processes) + more_steps
        (self.folder / "end").write_text(str(end))
        for name in names:
            try:
                self.processes[name].wait(LIMIT_S)
            except subprocess.TimeoutExpired as error:
                raise Hung(f"{name} did not end at step {end}") from error
        lines = [line for name in self.processes for line in self.lines(name)]
        wanted = plain_losses(max(line["step"] for line in lines))
        seen = {line["step"] for line in lines}
        return {
            "steps": len(wanted),
            "deviation": max(abs(line["loss"] - wanted[line["step"] - 1]) for line in lines),
            "lost_steps": sum(number not in seen for number in range(1, len(wanted) + 1)),
            "longest_s": max(line["time_s"] for line in lines),
        }

    def close(self) -> None:
        for process in (*self.processes.values(), self._lighthouse):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if process is not self._lighthouse else process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running(names: Sequence[str] = NAMES, machines: Machines | None = None) -> Iterator[Job]:
    """A job whose processes all take part."""
    job = Job(machines)
    try:
        for name in names:
            job.start(name)
        job.all_take_part(names)
        yield job
    finally:
        job.close()


# One fault each ------------------------------------------------------------------------------------------------------


def killed() -> Row:
    with running() as job:
        moment_s = time.time()
        job.signal("b", signal.SIGKILL)
        others_s = max(job.stepped_after(name, moment_s) for name in ("a", "c")) - moment_s
        again_s = time.time()
        job.start("b")
        rejoined_s = job.stepped_after("b", again_s) - again_s
        job.all_take_part()
        return {"others_s": others_s, "rejoined_s": rejoined_s, **job.finish()}


def stopped() -> Row:
    with running() as job:
        moment_s = time.time()
        job.signal("b", signal.SIGSTOP)
        others_s = max(job.stepped_after(name, moment_s + 0.1) for name in ("a", "c")) - moment_s
        time.sleep(max(STOP_TIME_S - (time.time() - moment_s), 0.0))
        going_s = time.time()
        job.signal("b", signal.SIGCONT)
        rejoined_s = job.stepped_after("b", going_s) - going_s
        job.all_take_part()
        return {"others_s": others_s, "rejoined_s": rejoined_s, **job.finish()}


def cut() -> Row:
    with Machines((RATE,) * len(NAMES)) as machines, running(machines=machines) as job:
        moment_s = time.time()
        link = ["ip", "-n", machines.name(2), "link", "set", INTERFACE]
        subprocess.run([*link, "down"], check=True)
        others_s = max(job.stepped_after(name, moment_s + 0.1) for name in ("a", "b")) - moment_s
        time.sleep(max(CUT_TIME_S - (time.time() - moment_s), 0.0))
        back_s = time.time()
        subprocess.run([*link, "up"], check=True)
        rejoined_s = job.stepped_after("c", back_s) - back_s
        job.all_take_part()
        return {"others_s": others_s, "rejoined_s": rejoined_s, **job.finish()}


def late() -> Row:
    with running(("a", "b")) as job:
        started_s = time.time()
        job.start("c")
        rejoined_s = job.stepped_after("c", started_s) - started_s
        job.all_take_part()
        return {"rejoined_s": rejoined_s, **job.finish()}


def slow() -> Row:
    with running(("a", "b")) as job:
        plain_s = job.last("a")["time_s"]
        job.start("c", slowness=10 * plain_s / 4)  # of a piece, of which it would have four
        job.all_take_part()
        time.sleep(10)
        return {**job.finish(), "plain_step_s": plain_s, "step_s": job.last("a")["time_s"]}


def soak(num_faults: int, seed: int = 3) -> Row:
    chance = random.Random(seed)
    with running() as job:
        for _ in range(num_faults):
            name = chance.choice(NAMES)
            if chance.random() < 0.5:
                job.signal(name, signal.SIGKILL)
                if chance.random() < 0.5:
                    time.sleep(chance.uniform(0.0, 1.0))
                job.start(name)
            else:
                job.signal(name, signal.SIGSTOP)
                time.sleep(chance.uniform(0.0, 1.0))
                job.signal(name, signal.SIGCONT)
            if chance.random() < 0.7:
                moment_s = time.time()
                job.until(lambda moment_s=moment_s: any(job.last(one)["end_s"] > moment_s for one in NAMES), "a step")
        job.all_take_part()
        return {"faults": num_faults, **job.finish()}


# Checkpoints ---------------------------------------------------------------------------------------------------------


def _saved(folder: Path, step: int) -> None:
    from partita.training.checkpoint.contents import Ownership
    from partita.training.checkpoint.saver import Saver, Source
    from partita.training.job import Team

    model, optimizer = build()
    loss_fn(model, batch_of(step)).backward()
    optimizer.step()  # it has a state now
    _fill(model, step)
    saver = Saver(Team(), None, 30.0)
    source = Source(step=step, model=model, optimizer=optimizer, ownership=Ownership, collect=lambda: None)
    saver.save(folder, source, in_background=False).wait()
    saver.close()


def _fill(model: Any, step: int) -> None:
    import torch

    with torch.no_grad():
        for value in model.parameters():
            value.fill_(float(step))


def _loaded(folder: Path) -> int:
    """The step of the checkpoint that is read, whose weights must be its number."""
    from partita.training.checkpoint.loader import load

    model, optimizer = build()
    step = load(folder, model, optimizer).step
    assert all(bool((value == float(step)).all()) for value in model.parameters()), step
    return step


def damaged(flips: bool, seed: int = 5) -> Row:
    chance, num, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        _saved(folder, 1)
        _saved(folder, 2)
        latest = folder / "step-00000002"
        for path in sorted(path for path in latest.rglob("*") if path.is_file()):
            content = path.read_bytes()
            for _ in range(10):
                broken = bytearray(content)
                place = chance.randrange(len(content))
                if flips:
                    broken[place] ^= 1 << chance.randrange(8)
                path.write_bytes(broken if flips else broken[:place])
                wrong += _loaded(folder) != 1
                num += 1
            path.write_bytes(content)
        wrong += _loaded(folder) != 2
    return {"faults": num, "lost_steps": wrong, "deviation": 0.0}


def full_disk() -> Row:
    with tempfile.TemporaryDirectory() as text:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", text], check=True)
        try:
            folder = Path(text) / "checkpoints"
            _saved(folder, 1)
            refused = 0
            for step in range(2, 30):
                try:
                    _saved(folder, step)
                except partita.CheckpointError:
                    refused += 1
            read, left = _loaded(folder), [path.name for path in folder.iterdir() if path.name.startswith(".")]
        finally:
            subprocess.run(["umount", text], check=True)
    return {"faults": refused, "lost_steps": int(read < 1 or not refused or bool(left)), "deviation": 0.0}


def killed_while_saving(num: int = 20, seed: int = 9) -> Row:
    import torch

    chance, last, lost = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for _ in range(num):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # a fork has none of the threads of its parent's pool, and would wait for them
                step = last
                while True:
                    step += 1
                    _saved(folder, step)
            deadline_s = time.monotonic() + LIMIT_S
            while not list(folder.glob("step-*")):
                if time.monotonic() > deadline_s:
                    os.kill(child, signal.SIGKILL)
                    raise Hung(f"the first save took more than {LIMIT_S:g} s")
                time.sleep(0.01)
            time.sleep(chance.uniform(0.01, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = _loaded(folder)
            lost += found < last
            last = found
    return {"faults": num, "steps": last, "lost_steps": lost, "deviation": 0.0}


# All of them ---------------------------------------------------------------------------------------------------------


def faults(num_soak: int) -> dict[str, Callable[[], Row]]:
    found: dict[str, Callable[[], Row]] = {
        "kill -9": killed,
        f"stopped for {STOP_TIME_S:g} s": stopped,
        f"network cut for {CUT_TIME_S:g} s": cut,
        "joins late": late,
        "a tenth of the speed": slow,
        "checkpoint truncated": lambda: damaged(False),
        "checkpoint bit flipped": lambda: damaged(True),
        "disk full": full_disk,
        "killed while saving": killed_while_saving,
        f"soak of {num_soak}": lambda: soak(num_soak),
    }
    return found


def misses_of(row: Row) -> list[str]:
    name = row["fault"]
    if row.get("errors"):
        return [f"{name}: {row['errors']}"]
    found = []
    if row.get("deviation", 0.0) > TOLERANCE:
        found.append(
            f"{name}: losses must be those of plain PyTorch to {TOLERANCE:g}, but differ by {row['deviation']:.2g}"
        )
    if row.get("lost_steps"):
        found.append(f"{name}: nothing must be lost, but {row['lost_steps']} are")
    if name.startswith("kill -9") and row["others_s"] > MOST_OTHERS_S:
        found.append(f"{name}: the others must go on within {MOST_OTHERS_S:g} s, but took {row['others_s']:.2f} s")
    return found


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults with this text")
    parser.add_argument("--soak", type=int, default=100, help="random faults")
    options = parser.parse_args()
    report = Report("faults", {"processes": len(NAMES), "soak": options.soak}, path=options.json)
    for name, call in faults(options.soak).items():
        if options.only not in name:
            continue
        row: Row = {"fault": name}
        reason = why_not() if call in (cut, full_disk) else None
        try:
            row |= {"errors": f"not run: {reason}"} if reason else call()
        except (Hung, OSError, subprocess.SubprocessError, AssertionError, RuntimeError) as error:
            row["errors"] = f"{type(error).__name__}: {error}"
        report.add(row)
        print(f"{name}: {row}", file=sys.stderr, flush=True)
    report.finish({"num_faults": len(report.rows)}, [text for row in report.rows for text in misses_of(row)])
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

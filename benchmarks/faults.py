"""Faults: processes that are killed, stand still, lose the network, come late or are slow; damaged checkpoints.

    python -m benchmarks.faults --json benchmarks/results/faults.json --check

Three processes train (`benchmarks.fault_job`) with `partita.Elastic`; every step that any of them reports is compared
with the same step of plain PyTorch, undisturbed. `others_s`: from the fault until the others' next step is over;
`rejoined_s`: from the start of the process, or the end of the fault, until it takes part; `lost_steps`: numbers of
steps that nobody reports. The soak makes so many random faults one after the other. The network is cut by taking an
interface down, and needs root (`benchmarks.slow_machines`).

DiLoCo's replicas agree every `fault_job.EVERY` steps: `loss_ratio` is what they have agreed on at the end beside what
undisturbed replicas have after as many steps, `windows_missed` counts agreements that a process has missed, and all
must end with the same weights.

Checkpoints are damaged file by file, written to a full disk (a tmpfs, needs root), and killed at random moments.

`--check` fails where a loss differs by more than 1e-4, a step is lost, something hangs or committed state is lost, or
where the others need more than a second after a kill.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, option_parser, show
from benchmarks.elastic_jobs import LIMIT_S, NAMES, Hung, Job, running
from benchmarks.fault_job import batch_of, build, loss_fn
from benchmarks.process_faults import STOP_TIME_S, killed, late, stopped
from benchmarks.replica_faults import LARGEST_RATIO, REPLICA_FAULTS
from benchmarks.slow_machines import INTERFACE, Machines, why_not

TOLERANCE = 1e-4
MOST_OTHERS_S = 1.0
CUT_TIME_S = 10.0
RATE = 125e6  # bytes a second of emulated links
DISK_BYTES = 550_000  # two checkpoints fit, and no third beside them
COLUMNS = (
    "fault", "steps", "deviation", "loss_ratio", "lost_steps", "windows_missed", "others_s", "longest_s", "rejoined_s",
    "errors",
)  # fmt: skip


# One fault each ------------------------------------------------------------------------------------------------------


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
        "kill -9": lambda: killed("exact", Job.finish),
        f"stopped for {STOP_TIME_S:g} s": lambda: stopped("exact", Job.finish),
        f"network cut for {CUT_TIME_S:g} s": cut,
        "joins late": lambda: late("exact", Job.finish),
        "a tenth of the speed": slow,
        "checkpoint truncated": lambda: damaged(False),
        "checkpoint bit flipped": lambda: damaged(True),
        "disk full": full_disk,
        "killed while saving": killed_while_saving,
        f"soak of {num_soak}": lambda: soak(num_soak),
    }
    return found | REPLICA_FAULTS


def misses_of(row: Row) -> list[str]:
    name = row["fault"]
    if row.get("errors"):
        return [f"{name}: {row['errors']}"]
    found = []
    if row.get("deviation", 0.0) > TOLERANCE:
        found.append(
            f"{name}: losses must be those of plain PyTorch to {TOLERANCE:g}, but differ by {row['deviation']:.2g}"
        )
    if row.get("loss_ratio", 0.0) > LARGEST_RATIO:
        found.append(
            f"{name}: the loss must be at most {LARGEST_RATIO:g} times that of undisturbed replicas, but is "
            f"{row['loss_ratio']:.3f} times as large"
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

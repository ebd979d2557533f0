"""`partita run script.py`: an ordinary script that calls the API, watched, with another plan, or for one step only."""

from __future__ import annotations

import contextlib
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated

import psutil
import tyro

from partita.cli.output import is_first, print_json, table
from partita.errors import InputError
from partita.plan import Plan
from partita.training.events import Event, PlanChosen, StepFinished, subscribe
from partita.units import format_bytes, format_time


def run(
    script: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")],
    /,
    *,
    plan: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    dry_run: bool = False,
    runs: str = "runs",
    interval_s: float = 10.0,
    quiet: bool = False,
    json: bool = False,
) -> Callable[[Sequence[str]], int]:
    """Run a training script that calls partita, with progress and metrics. Other arguments go to the script; all after
    `--` do so whatever they are. Also under a launcher: `torchrun --no-python partita run train.py`.

    Args:
        script: the Python file.
        plan: use this plan instead of the script's choice.
        dry_run: plan, make one step, show memory and time beside the estimate, and stop.
        runs: folder for metrics (one JSONL file a run).
        interval_s: seconds between two lines where there is no terminal.
        quiet: no progress; metrics are written all the same.
        json: print a summary of the run as JSON; what the script itself prints goes to standard error.
    """

    def call(arguments: Sequence[str]) -> int:
        path = Path(script)
        if not path.is_file():
            raise InputError(f"SCRIPT must be a Python file, but there is no file {script!r} in {str(Path.cwd())!r}.")
        if interval_s <= 0:
            raise InputError(f"--interval-s must be positive, but got {interval_s}.")
        wished = Plan.load(plan) if plan is not None else None
        first = is_first()
        summary = Summary(stops=dry_run)
        with contextlib.ExitStack() as stack:
            if first:
                summary.metrics = str(stack.enter_context(_watch(path.stem, runs, interval_s, quiet or json)))
            stack.callback(subscribe(summary))
            if json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            code = _run_script(path, list(arguments), wished, dry_run)
        if dry_run and not summary.num_steps and code == 0:
            raise InputError(f"{script} made no step of partita.parallelize, so there is nothing to show of it.")
        if first and (json or (dry_run and code == 0)):
            print_json(summary.as_dict(code)) if json else print(summary.text())
        return code

    return call


def _watch(name: str, runs: str, interval_s: float, quiet: bool) -> contextlib.AbstractContextManager[Path]:
    from partita.cli.watch import watching

    return watching(name, Path(runs), interval_s=interval_s, quiet=quiet)


class DryRunEnd(SystemExit):
    """Ends the script after its first step. A `SystemExit`, because scripts and libraries let that pass."""


@dataclass
class Summary:
    """What happened in a run, gathered from events; with `stops`, the first finished step ends the script."""

    stops: bool
    metrics: str = ""
    plan: Plan | None = None
    planning_s: float = 0.0
    num_steps: int = 0
    loss: float | None = None
    step_time_s: float | None = None
    process: int = 0
    memory_bytes: int | None = None  # what the script's process grew by until the end of the first step
    before_bytes: int = field(default_factory=lambda: _resident_bytes())

    def __call__(self, event: Event) -> None:
        if isinstance(event, PlanChosen):
            self.plan, self.planning_s = event.plan, event.time_s
            _forget_peak()
        elif isinstance(event, StepFinished):
            if not self.num_steps:
                self.memory_bytes = max(0, _peak_bytes() - self.before_bytes)
            self.num_steps += 1
            self.loss, self.step_time_s, self.process = event.loss, event.step_time_s, event.process
            if self.stops:
                raise DryRunEnd(0)

    @property
    def predicted_memory_bytes(self) -> int | None:
        prediction = self.plan.prediction if self.plan is not None else None
        return prediction.memory_bytes.get(str(self.process)) if prediction is not None else None

    def as_dict(self, code: int) -> dict[str, object]:
        prediction = self.plan.prediction if self.plan is not None else None
        return {
            "exit_code": code,
            "num_steps": self.num_steps,
            "loss": self.loss,
            "step_time_s": self.step_time_s,
            "predicted_step_time_s": prediction.step_time_s if prediction is not None else None,
            "memory_bytes": self.memory_bytes,
            "predicted_memory_bytes": self.predicted_memory_bytes,
            "planning_s": self.planning_s,
            "plan": self.plan,
            "metrics": self.metrics,
        }

    def text(self) -> str:
        """The plan, and its estimates beside what one step took. The first step also warms up, so it takes longer."""
        prediction = self.plan.prediction if self.plan is not None else None
        predicted, estimated = self.predicted_memory_bytes, "unknown"
        if prediction is not None:
            estimated = f"{format_time(prediction.step_time_s)} +-{prediction.uncertainty:.0%}"
        rows = [
            ("", "estimate", "first step"),
            ("step time", estimated, format_time(self.step_time_s or 0.0)),
            (
                f"memory of process {self.process}",
                "unknown" if predicted is None else format_bytes(predicted),
                "unknown" if self.memory_bytes is None else format_bytes(self.memory_bytes),
            ),
        ]
        told = "The estimate counts tensors; the process also grew by code, captured graphs and allocator slack."
        return f"{self.plan}\n\n{table(rows)}\n{told}\nloss {self.loss:.6g}; metrics in {self.metrics}"


def _run_script(path: Path, arguments: list[str], plan: Plan | None, dry_run: bool) -> int:
    """Run the script as `python script.py` would, and return its exit code; show its exceptions as Python does."""
    from partita.training.overrides import override

    with _as_main(path, arguments), override(plan=plan, dry_run=dry_run):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BaseException as error:
            traceback.print_exception(type(error), error, _from_script(error.__traceback__, path))
            return 1
    return 0


@contextlib.contextmanager
def _as_main(path: Path, arguments: list[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as the script expects them, and as they were afterwards."""
    before_argv, before_path = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before_argv, before_path


def _from_script(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """The traceback from the script's own first frame on: what lies before is how it was started."""
    here = trace
    while here is not None and here.tb_frame.f_code.co_filename != str(path):
        here = here.tb_next
    return here or trace


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    """The most memory that this process held since the plan was chosen, where the system tells (Linux); else now's."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _resident_bytes()


def _forget_peak() -> None:
    """Start the peak anew: what measuring candidates held does not belong to the plan. Source: proc(5), clear_refs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

"""`make demo`: trains three models, each with an automatic plan, beside plain PyTorch.

For every task it prints the plan with its reasons, the predicted beside the measured step time, the final loss of both
runs (they must agree) and the speed beside plain PyTorch with all threads, measured in turns in the same process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import partita  # before torch: it makes waiting threads sleep instead of spin

import torch  # isort: skip
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.tasks import TASKS, Batch, Task

StepFn = Callable[[Batch], float]


@dataclass(frozen=True)
class Outcome:
    """Medians in seconds over the rounds; losses after the last step."""

    plain_time_s: float
    partita_time_s: float
    plain_loss: float
    partita_loss: float


def plain_step(task: Task) -> StepFn:
    """The ordinary training loop's body, on a copy of the task's model and optimizer."""
    model, optimizer = copy.deepcopy((task.model, task.optimizer))

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def settle(task: Task, step: partita.Step, plain: StepFn) -> None:
    """Trains both until a plan is adopted: candidates make the first steps in turns."""
    while not step.is_settled:
        batch = next(task.batches)
        step(batch)
        plain(batch)


def train(task: Task, step: partita.Step, plain: StepFn, num_steps: int, progress: Progress) -> Outcome:
    """Trains both on the same batches in turns of 20 steps, so that a drift of the machine hits both."""
    bar = progress.add_task(f"{task.name}", total=num_steps)
    times: dict[str, list[float]] = {"plain": [], "partita": []}
    losses = {"plain": float("nan"), "partita": float("nan")}
    runs: Sequence[tuple[str, StepFn]] = (("partita", lambda batch: step(batch).loss), ("plain", plain))
    for begin in range(0, num_steps, 20):
        batches = [next(task.batches) for _ in range(min(20, num_steps - begin))]
        for name, run in runs if begin % 40 else reversed(runs):
            for batch in batches:
                start = time.perf_counter()
                losses[name] = run(batch)
                times[name].append(time.perf_counter() - start)
        progress.update(bar, advance=len(batches), description=f"{task.name}  loss {losses['partita']:.3f}")
    median = {name: statistics.median(values) for name, values in times.items()}
    return Outcome(median["plain"], median["partita"], losses["plain"], losses["partita"])


def show(console: Console, task: Task, plan: partita.Plan, outcome: Outcome) -> None:
    predicted = plan.prediction.step_time_s if plan.prediction else None
    if predicted is not None:
        error = outcome.partita_time_s / predicted - 1
        console.print(
            f"  step time: predicted {predicted * 1e3:.1f} ms, "
            f"measured {outcome.partita_time_s * 1e3:.1f} ms ({error:+.0%})"
        )
    console.print(
        f"  final loss: {outcome.partita_loss:.4f} (plain PyTorch on the same batches: {outcome.plain_loss:.4f})"
    )
    ratio = outcome.plain_time_s / outcome.partita_time_s
    console.print(
        f"  speed: [bold]{ratio:.2f}x[/bold] plain PyTorch with {torch.get_num_threads()} threads "
        f"({outcome.plain_time_s * 1e3:.1f} ms a step)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps of each task")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="tasks to run")
    arguments = parser.parse_args()
    console = Console()
    for name in arguments.tasks:
        console.rule(f"[bold]{name}")
        task = TASKS[name]()
        plain = plain_step(task)
        with console.status("capturing, planning and measuring ..."):
            step = partita.parallelize(task.model, task.optimizer, task.loss_fn, next(task.batches))
        with step:
            with console.status("training with the best few plans in turns ..."):
                settle(task, step, plain)
            console.print(str(step.plan))
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console) as progress:
                outcome = train(task, step, plain, arguments.steps, progress)
            show(console, task, step.plan, outcome)


if __name__ == "__main__":
    main()

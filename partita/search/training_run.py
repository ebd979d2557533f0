"""One candidate's training, in the process of its trial: batches, judging, checkpoints, the rate's decay.

The rate is constant while exploring, so that a candidate can be trained on for any time. In the last `DECAY_SHARE` of
the final training it goes to zero as 1 - sqrt(progress), so that it ends with the deadline whatever the number of
steps.

Source: constant rates with a short decay, in place of a schedule for a length known beforehand, Hägele et al. 2024,
"Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", sections 3 and 4.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partita.cluster import Cluster
from partita.errors import InputError, NonFiniteLossError
from partita.plan import Plan
from partita.planner.describe import title
from partita.search.curves import Point
from partita.search.effort import Effort, effort_for, is_priced, is_split
from partita.search.messages import Judged, Order
from partita.search.parts import endless, first_batch, judged_batches, num_rows
from partita.search.pricing import Price, infeasible, num_parameters, priced, roughly_priced, too_large, too_slow
from partita.search.task import Task, default_score
from partita.search.trials import SearchTrial
from partita.search.weights import kept_score, write_weights
from partita.training.arguments import Found
from partita.training.block_runner import on_threads
from partita.training.parallelize import parallelize
from partita.training.planning import block_plan
from partita.training.runner import LossFn
from partita.training.step import Step
from partita.units import fingerprint

DECAY_SHARE = 0.5
# The next point of the curve is at so many times the training time of the last one: three in each rung.
BETWEEN_JUDGED, FIRST_JUDGED = 1.5, 1 / 3  # the first one after so much of the first rung
FINAL_BETWEEN = 1 / 20  # of the final training at most, since its best weights are what is delivered
JUDGING_COST, FINAL_COST = 3.0, 10.0  # judging takes at most one in so many seconds
LEAST_BETWEEN_S = 0.1
SAVED_EVERY_S, SAVING_COST = 5.0, 20.0
LOOKS_EVERY_S = 0.02  # for a message
MOST_MARKS = 10_000
THREAD_TURNS = 3
LONG_STEP_S = 0.3
LEAST_GAIN = 1.2  # of all threads over one, to be worth the cores
NUM_WARM = 3  # steps after which the speed says something
PLAINLY = "trained by plain PyTorch until planning pays"


class RejectedError(Exception):
    """The candidate is not trained (on)."""

    def __init__(self, reason: str, price: Price | None = None) -> None:
        super().__init__(reason)
        self.reason, self.price = reason, price


class _Progress:
    """What of a candidate's training is kept in its checkpoints besides the step's own state."""

    def __init__(self) -> None:
        self.samples, self.train_s = 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "train_s": self.train_s}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.samples, self.train_s = float(state["samples"]), float(state["train_s"])


class TrainingRun:
    """A candidate: built, priced, and trained on request."""

    def __init__(self, task: Task, trial: SearchTrial, order: Order) -> None:
        """Builds the candidate.

        Raises:
            RejectedError: it has too many parameters.
            InputError: what the user's functions return cannot be used.
        """
        self._task, self._order, self._maximize = task, order, task.direction == "maximize"
        torch.manual_seed(_seed(order))
        self.model = task.build(trial)
        if not isinstance(self.model, nn.Module):
            raise InputError(f"build(trial) must return an nn.Module, but it returned {type(self.model).__name__}")
        size = num_parameters(self.model)
        reason = too_large(size, order.limits)
        if reason:
            raise RejectedError(reason, Price(num_parameters=size))
        self._training, self._judged = task.parts()
        rows = num_rows(self._training)
        self.batch_size = 0 if rows is None else task.batch_size_of(trial, rows)
        self._optimizer = task.optimizer(trial, self.model)
        if not isinstance(self._optimizer, torch.optim.Optimizer):
            raise InputError(
                f"optimizer(trial, model) must return a torch.optim.Optimizer, but it returned "
                f"{type(self._optimizer).__name__}"
            )
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._connections = None if task.connections is None else task.connections(trial)
        self._device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        self._batch = self._moved(first_batch(self._training, self.batch_size))
        self._here = Cluster.detect()
        self._progress = _Progress()
        self._trained = self.model, self._optimizer, task.loss_fn, self._batch
        self._price = Price(num_parameters=size)
        self._step: Step | None = None
        self._batches: Iterator[Any] = iter(())
        self._effort = Effort.PLAIN
        self._next_judged_s, self._judged_samples, self._judging_s = 0.0, 0.0, 0.0
        self._saved_at_s, self._saving_s = time.monotonic(), 0.0
        self._marks: list[tuple[float, float, int]] = []  # train_s, samples and steps since `begin`, for speeds
        self._best_score = kept_score(Path(order.folder))
        self._has_left_cores = False

    def price(self) -> Price:
        """What is predicted of the candidate before it trains: what is known already, or roughly where that will do.

        Raises:
            RejectedError: it does not keep to the limits.
        """
        if self._order.price is not None:
            self._price = self._order.price
            return self._price
        if self._order.target is None and self._device.type == "cpu":
            order = self._order
            rough = roughly_priced(*self._trained, own=self._here, everywhere=order.everywhere, final_s=order.final_s)
            if rough is not None:
                return self._kept(rough)
        return self._priced_by_plans()

    def price_for(self, granted_s: float) -> Price | None:
        """The same by plans, before it is trained for so long; None: it is known, or would take too much of that, or no
        plan is to be used in the end."""
        outline_s = self._price.outline_s
        pays = is_priced(granted_s, outline_s) and is_split(self._order.final_s, outline_s)
        return self._priced_by_plans() if self._price.is_rough and pays else None

    def _priced_by_plans(self) -> Price:
        order, outline_s = self._order, self._price.outline_s
        everywhere = order.everywhere if is_split(order.final_s, outline_s) else None
        price = priced(*self._trained, own=self._here, everywhere=everywhere, target=order.target)
        return self._kept(dataclasses.replace(price, outline_s=outline_s))

    def _kept(self, price: Price) -> Price:
        reason = infeasible(price, self._order.limits, time.time())
        if reason:
            raise RejectedError(reason, price)
        self._price = price
        return price

    @property
    def train_s(self) -> float:
        return self._progress.train_s

    def begin(self, granted_s: float, *, resumed: bool) -> None:
        """Makes the training step, under a plan that is found for the trial's cores if it is trained for long enough;
        `resumed`: it goes on from the candidate's checkpoint."""
        self.close()
        self._effort = effort_for(granted_s, self._price.outline_s)
        self._step = self._made()
        if resumed:
            self._step.load(self._order.folder, also={"progress": self._progress})
        self._batches = endless(self._training, self.batch_size, self._step, seed=self._order.seed)
        self._next_judged_s = self.train_s + LEAST_BETWEEN_S
        self._judged_samples = self._progress.samples
        self._marks = [(self.train_s, self._progress.samples, self._step.num_steps)]

    def continue_for(self, granted_s: float) -> None:
        """Called after `save`: from here on a plan may pay."""
        if effort_for(granted_s, self._price.outline_s) > self._effort:
            self.begin(granted_s, resumed=True)

    def _plan(self) -> Plan | Found:
        """Plain PyTorch, or how a plan is to be found."""
        if self._effort > Effort.PLAIN:
            return "quick" if self._effort == Effort.QUICK else "auto"
        threads = None
        if self._device.type == "cpu":
            threads = fastest_threads(self.model, self._task.loss_fn, self._batch, self._here.num_cores)
        return block_plan(self._here, graph=None, reasons=(PLAINLY,), num_threads=threads)

    def _made(self) -> Step:
        return parallelize(
            self.model,
            self._optimizer,
            self._task.loss_fn,
            self._batch,
            plan=self._plan(),
            compile="auto" if self._effort == Effort.COMPILED else False,
            cluster=self._here,
            connections=self._connections,
        )

    @property
    def _running(self) -> Step:
        assert self._step is not None, "begin() comes first"
        return self._step

    def train(self, until_s: float, is_over: Callable[[], bool], tell: Callable[[Judged], None]) -> None:
        """Trains until the candidate has been trained for `until_s` in all or `is_over()`, and judges it now and then,
        at the end as well.

        Raises:
            RejectedError: its loss is not finite, or its steps take too long.
        """
        looked_s = time.monotonic()
        if self.train_s == 0 and math.isfinite(until_s):
            self._next_judged_s = FIRST_JUDGED * until_s
        while self.train_s < until_s:
            now_s = time.monotonic()
            if now_s - looked_s > LOOKS_EVERY_S:
                looked_s = now_s
                if is_over():
                    break
            if self.train_s >= self._next_judged_s and len(self._marks) > 1:
                tell(self.judge())
            self._save_if_due()
            self._train_one()
        if self._progress.samples > self._judged_samples:
            tell(self.judge())

    def _train_one(self) -> None:
        start_s = time.monotonic()
        self._set_rates()
        batch = self._moved(next(self._batches))
        try:
            result = self._running(batch)
        except NonFiniteLossError as error:
            raise RejectedError(f"it diverged: {error}") from error
        self._progress.train_s += time.monotonic() - start_s
        self._progress.samples += result.num_samples
        self._marks.append((self.train_s, self._progress.samples, self._running.num_steps))
        if len(self._marks) == NUM_WARM + 1 and self._order.final is None:
            reason = too_slow(self._step_time_s() / self._price.wide_gain, self._order.limits, time.time(), "measured")
            if reason:
                raise RejectedError(reason)
        if len(self._marks) > MOST_MARKS:
            del self._marks[: MOST_MARKS // 2]

    def _set_rates(self) -> None:
        if self._order.final is not None:
            factor = decay(time.time(), *self._order.final)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor

    def _moved(self, batch: Any) -> Any:
        if self._device.type == "cpu":
            return batch
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), batch)

    def _recent(self) -> tuple[float, float, int]:
        """Seconds, samples and steps of the later half of what was trained since `begin`."""
        first, last = self._marks[len(self._marks) // 2 if len(self._marks) > 2 * NUM_WARM else 0], self._marks[-1]
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]

    def _step_time_s(self) -> float:
        seconds, _, steps = self._recent()
        return seconds / max(1, steps)

    def judge(self) -> Judged:
        """The score of the candidate as it is; the weights that scored best are kept, to be delivered."""
        start_s = time.monotonic()
        with _evaluating(self.model):
            if self._task.score is not None:
                score = float(self._task.score(self.model, self._judged))
            else:
                batches = map(self._moved, judged_batches(self._judged))
                score = default_score(self.model, batches, self._task.loss_fn)
        if not math.isfinite(score):
            raise RejectedError(f"its score is {score}")
        if self._best_score is None or better(score, self._best_score, maximize=self._maximize):
            self._best_score = score
            write_weights(self.model, Path(self._order.folder), score)
        self._judged_samples, self._judging_s = self._progress.samples, time.monotonic() - start_s
        between_s, cost = (BETWEEN_JUDGED - 1) * self.train_s, JUDGING_COST
        if self._order.final is not None:
            between_s, cost = min(between_s, FINAL_BETWEEN * (self._order.final[1] - self._order.final[0])), FINAL_COST
        self._next_judged_s = self.train_s + max(LEAST_BETWEEN_S, cost * self._judging_s, between_s)
        seconds, samples, _ = self._recent()
        return Judged(
            point=Point(self._progress.samples, self.train_s, score),
            samples_per_s=samples / seconds if seconds > 0 else 0.0,
            step_time_s=self._step_time_s(),
            plan=title(self._running.plan),
            num_cores=len(self._order.cores),
            best_score=self._best_score,
            idle_cores=self._idle_cores(),
        )

    def _idle_cores(self) -> tuple[int, ...]:
        """Those of the trial's cores that its plan does not use: none before it is adopted, or while exploring, where
        a candidate's cores are its own. From then on this process keeps off them."""
        plan, cores = self._running.plan, self._order.cores
        if (
            self._order.final is None
            or not self._running.is_settled
            or any(one.gpu is not None for one in plan.workers)
        ):
            return ()
        used = {core for one in plan.workers for core in one.cores[: plan.threads_per_worker]}
        idle = tuple(core for core in cores if core not in used)
        if idle and not self._has_left_cores:
            self._has_left_cores = True
            take_cores([core for core in cores if core in used])
        return idle

    @property
    def ending_s(self) -> float:
        """What one more step, judging and saving takes, with some to spare."""
        return self._step_time_s() + 1.5 * (self._judging_s + self._saving_s) + 0.05

    def save(self) -> None:
        """Writes a checkpoint."""
        start_s = time.monotonic()
        self._running.save(self._order.folder, also={"progress": self._progress})
        self._saved_at_s = time.monotonic()
        self._saving_s = self._saved_at_s - start_s

    def _save_if_due(self) -> None:
        if time.monotonic() - self._saved_at_s > max(SAVED_EVERY_S, SAVING_COST * self._saving_s):
            self.save()

    def close(self) -> None:
        """Ends the workers."""
        if self._step is not None:
            self._step.close()


def fastest_threads(model: nn.Module, loss_fn: LossFn, batch: Any, num_cores: int) -> int:
    """One thread or as many as there are cores: small steps are faster with one, or hardly slower, which leaves cores
    to another candidate. Measured in steps of a copy, unless one takes so long that it is no small one."""
    if num_cores == 1:
        return 1
    twin, times_s = copy.deepcopy(model), {1: math.inf, num_cores: math.inf}
    with torch.random.fork_rng(devices=[]):
        for count in (1, *THREAD_TURNS * (1, num_cores)):  # the first one warms up, but for steps that are long
            with on_threads(count):
                start_s = time.perf_counter()
                loss_fn(twin, batch).backward()
                twin.zero_grad()
                times_s[count] = min(times_s[count], time.perf_counter() - start_s)
            if times_s[count] > LONG_STEP_S:
                return num_cores
    return num_cores if times_s[1] > LEAST_GAIN * times_s[num_cores] else 1


def take_cores(cores: Sequence[int]) -> None:
    """All threads of this process, and torch in it, compute on these cores alone."""
    if hasattr(os, "sched_setaffinity"):
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, cores)
    torch.set_num_threads(len(cores))


def better(score: float, than: float, *, maximize: bool) -> bool:
    """Whether a score is as good or better."""
    return score >= than if maximize else score <= than


def decay(now_s: float, begin_s: float, end_s: float) -> float:
    """The factor of learning rates at an instant of the final training.

    >>> decay(0.0, 0.0, 8.0), decay(5.0, 0.0, 8.0), decay(8.0, 0.0, 8.0)
    (1.0, 0.5, 0.0)
    """
    progress = (now_s - begin_s) / max(1e-9, end_s - begin_s)
    return 1.0 - math.sqrt(min(1.0, max(0.0, (progress - (1 - DECAY_SHARE)) / DECAY_SHARE)))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, without gradients; afterwards each in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(state)
        for module, mode in modes:
            module.training = mode


def _seed(order: Order) -> int:
    """One that two candidates do not share, however many seeds are tried."""
    return int(fingerprint([order.seed, order.number]), 16) % 2**31

"""Adoption: the best few plans and plain PyTorch run in turns for real, on copies of the state; the fastest is
taken.

In a job all processes run the same steps: rank 0 measures and decides how many, and whether a candidate is worth
running at all, because the others' clocks differ, and a step that only one process makes waits for ever. A candidate
that failed anywhere is dropped everywhere.

Plain PyTorch comes first. A plan is not run if it is predicted to take more than `HOPELESS` times the fastest step so
far, and runs one step only if that took as much: on a slow network a step of a hopeless plan may take minutes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from partita.errors import PartitaError
from partita.plan import Alternative, Plan
from partita.training.events import CandidateMeasured, emit
from partita.training.inputs import BatchLeaves
from partita.training.job import Team
from partita.training.runners import Runner
from partita.units import format_bytes

# A plan must be faster than a simpler one by this share to be preferred to it: less is noise.
TIE_SHARE = 0.02
ROUNDS = 5
ROUND_TIME_S = 0.15  # every candidate runs at least this long in every round
MAX_STEPS_PER_ROUND = 50
HOPELESS = 4.0  # predictions of a plan and the uncertainty of its parts have never been off by as much

MakeRunner = Callable[[Plan, nn.Module, torch.optim.Optimizer], Runner]


@dataclass
class _Candidate:
    plan: Plan
    runner: Runner
    times_s: list[float] = field(default_factory=list)
    num_steps: int = 1  # in every round; 0: it has run enough

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)


def describe(plan: Plan) -> str:
    """A plan in a few words.

    Example:
        "2 data x 1 pipeline, 1 thread each, compiled"
    """
    kind = ", compiled" if plan.compiled else ""
    if plan.mode == "block":
        return f"plain PyTorch, {plan.threads_per_worker} thread(s){kind}"
    data, pipeline = plan.axes.get("data", 1), plan.axes.get("pipeline", 1)
    micro = f", {plan.num_microbatches} microbatches ({plan.schedule})" if plan.num_microbatches > 1 else ""
    buckets = f", exchange in background by {format_bytes(plan.bucket_bytes)}" if plan.bucket_bytes else ""
    return f"{data} data x {pipeline} pipeline, {plan.threads_per_worker} thread(s) each{micro}{buckets}{kind}"


def choose(
    plans: Sequence[Plan],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    make_runner: MakeRunner,
    batch: Any,
    leaves: BatchLeaves,
    team: Team | None = None,
) -> Plan:
    """Runs every plan on copies of model and optimizer, in turns, and returns the fastest with its report; in a job
    (`team`) every process must call it with the same plans.

    A plan that fails to run is dropped with its reason. The random state is left as it was.
    """
    trial = _Trial(model, optimizer, make_runner, batch, leaves, team or Team())
    random_state = torch.get_rng_state()
    try:
        for plan in sorted(plans, key=lambda plan: plan.mode != "block"):
            trial.start(plan)
        for _ in range(ROUNDS):
            for candidate in trial.candidates:
                trial.run_round(candidate)
    finally:
        for candidate in trial.candidates:
            candidate.runner.close()
        torch.set_rng_state(random_state)
    if not trial.candidates:
        reasons = "; ".join(f"{item.description}: {item.reason}" for item in trial.dropped)
        raise PartitaError(f"no candidate plan could run: {reasons}")
    return _report(trial.candidates, trial.dropped)


@dataclass
class _Trial:
    """The candidates of one adoption."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    make_runner: MakeRunner
    batch: Any
    leaves: BatchLeaves
    team: Team
    candidates: list[_Candidate] = field(default_factory=list)
    dropped: list[Alternative] = field(default_factory=list)

    @property
    def fastest_s(self) -> float:
        """Of the steps measured so far, by rank 0's clock; infinite before the first."""
        return min((candidate.median_s for candidate in self.candidates), default=math.inf)

    def start(self, plan: Plan) -> None:
        """Sets a candidate up on a copy of the state and runs it, unmeasured and once measured, if it may be worth
        it."""
        predicted_s = _predicted_s(plan)
        if self._from_first(plan.mode != "block" and predicted_s > HOPELESS * self.fastest_s):
            self._drop(
                plan,
                f"not run: predicted at {predicted_s / self.fastest_s:.0f} times the step time of another plan",
                failed=False,
            )
            return
        runner, error = self._prepared(plan)
        errors = [text for text in self.team.gather(error, "the start of a candidate plan") if text]
        if errors or runner is None:
            if runner is not None:
                with contextlib.suppress(Exception):
                    runner.close()
            self._drop(plan, errors[0], failed=True)
            return
        candidate = _Candidate(plan, runner)
        self._step(candidate)
        fastest_s, took_s = self.fastest_s, candidate.times_s[0]
        self.candidates.append(candidate)
        worth = took_s <= HOPELESS * fastest_s
        count = min(max(round(ROUND_TIME_S / max(took_s, 1e-9)), 1), MAX_STEPS_PER_ROUND) if worth else 0
        candidate.num_steps = self._from_first(count)

    def run_round(self, candidate: _Candidate) -> None:
        for _ in range(candidate.num_steps):
            self._step(candidate)

    def _step(self, candidate: _Candidate) -> None:
        start = time.perf_counter()
        candidate.runner.step(self.batch, self.leaves)
        candidate.times_s.append(time.perf_counter() - start)

    def _prepared(self, plan: Plan) -> tuple[Runner | None, str]:
        """A runner that has made one step, or why there is none."""
        runner: Runner | None = None
        try:
            memo: dict[int, Any] = {}
            own_model = copy.deepcopy(self.model, memo)
            own_optimizer = copy.deepcopy(self.optimizer, memo)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runner = self.make_runner(plan, own_model, own_optimizer)
                runner.step(self.batch, self.leaves)
        except Exception as error:  # a candidate that cannot run is no candidate; the others go on
            if runner is not None:
                with contextlib.suppress(Exception):
                    runner.close()
            return None, f"{type(error).__name__}: {error}"
        return runner, ""

    def _drop(self, plan: Plan, reason: str, *, failed: bool) -> None:
        predicted_s = _predicted_s(plan)
        self.dropped.append(
            Alternative(
                description=describe(plan),
                predicted_step_time_s=predicted_s,
                measured_step_time_s=None,
                reason=(f"could not run: {reason}" if failed else reason)[:400],
            )
        )
        emit(
            CandidateMeasured(
                description=describe(plan),
                plan=plan,
                predicted_step_time_s=predicted_s,
                step_time_s=None,
                failed=reason,
            )
        )

    def _from_first(self, value: Any) -> Any:
        return self.team.from_first(value, "the measurement of candidate plans")


def _predicted_s(plan: Plan) -> float:
    return plan.prediction.step_time_s if plan.prediction else 0.0


def _rank(candidate: _Candidate) -> tuple[int, int]:
    """Simplicity: plain PyTorch first, then fewer workers."""
    return (candidate.plan.mode != "block", candidate.plan.num_workers)


def _report(candidates: list[_Candidate], dropped: list[Alternative]) -> Plan:
    fastest_s = min(candidate.median_s for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.median_s <= fastest_s * (1 + TIE_SHARE)]
    best = min(near, key=lambda candidate: (_rank(candidate), candidate.median_s))
    alternatives = []
    for candidate in sorted(candidates, key=lambda item: item.median_s):
        predicted_s = _predicted_s(candidate.plan)
        emit(
            CandidateMeasured(
                description=describe(candidate.plan),
                plan=candidate.plan,
                predicted_step_time_s=predicted_s,
                step_time_s=candidate.median_s,
            )
        )
        if candidate is not best:
            ratio = candidate.median_s / best.median_s
            tie = " (a tie; the simpler plan is taken)" if ratio < 1 else ""
            alternatives.append(
                Alternative(
                    description=describe(candidate.plan),
                    predicted_step_time_s=predicted_s,
                    measured_step_time_s=candidate.median_s,
                    reason=f"measured {ratio:.2f} times the step time of the adopted plan{tie}",
                )
            )
    reasons = (
        *best.plan.reasons,
        f"measured fastest of {len(candidates)} candidates, plain PyTorch among them"
        if any(candidate.plan.mode == "block" for candidate in candidates)
        else f"measured fastest of {len(candidates)} candidates",
    )
    return msgspec.structs.replace(
        best.plan,
        measured_step_time_s=best.median_s,
        alternatives=(*alternatives, *dropped),
        reasons=reasons,
    )

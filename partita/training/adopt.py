"""Adoption: the best few plans and plain PyTorch run in turns for real, on a copy of the state; the fastest is taken.

All candidates train one copy of model and optimizer, which they hand to each other, so that a job needs room for its
weights once more while it measures, however many candidates there are.
"""

from __future__ import annotations

import contextlib
import copy
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
from partita.runtime.allocator import give_back_freed_memory
from partita.training.events import CandidateMeasured, emit
from partita.training.inputs import BatchLeaves
from partita.training.runners import GraphRunner, Runner

# A plan must be faster than a simpler one by this share to be preferred to it: less is noise.
TIE_SHARE = 0.02
ROUNDS = 5
ROUND_TIME_S = 0.15  # every candidate runs at least this long in every round
MAX_STEPS_PER_ROUND = 50

MakeRunner = Callable[[Plan, nn.Module, torch.optim.Optimizer], Runner]


@dataclass
class _Candidate:
    plan: Plan
    runner: Runner
    times_s: list[float] = field(default_factory=list)

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
    return f"{data} data x {pipeline} pipeline, {plan.threads_per_worker} thread(s) each{micro}{kind}"


def choose(
    plans: Sequence[Plan],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    make_runner: MakeRunner,
    batch: Any,
    leaves: BatchLeaves,
) -> Plan:
    """Runs every plan on a copy of model and optimizer, in turns, and returns the fastest with its report.

    A plan that fails to run is dropped with its reason. The random state is left as it was.
    """
    random_state = torch.get_rng_state()
    candidates: list[_Candidate] = []
    dropped: list[Alternative] = []
    try:
        copies = _copies(model, optimizer)
        for plan in plans:
            candidate = _start(plan, copies, make_runner, batch, leaves, dropped)
            if candidate is not None:
                candidates.append(candidate)
            give_back_freed_memory()  # no thread finds what another one freed
        for _ in range(ROUNDS):
            for candidate in candidates:
                _run_round(candidate, batch, leaves)
                _hand_on(candidate.runner, copies[1])
    finally:
        for candidate in candidates:
            candidate.runner.close()
        torch.set_rng_state(random_state)
    if not candidates:
        reasons = "; ".join(f"{item.description}: {item.reason}" for item in dropped)
        raise PartitaError(f"no candidate plan could run: {reasons}")
    return _report(candidates, dropped)


def _copies(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer once more, without gradients: nobody reads those of the user's own here."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            memo[id(parameter.grad)] = None
    return copy.deepcopy(model, memo), copy.deepcopy(optimizer, memo)


def _hand_on(runner: Runner, optimizer: torch.optim.Optimizer) -> None:
    """Leaves the state where the next candidate finds it, so that there is one of all of them.

    Parts of tensors that a runner stores of its own are not brought together: that would make whole ones beside them.
    """
    if not (isinstance(runner, GraphRunner) and runner.held):
        runner.collect()
    optimizer.zero_grad(set_to_none=True)


def _start(
    plan: Plan,
    copies: tuple[nn.Module, torch.optim.Optimizer],
    make_runner: MakeRunner,
    batch: Any,
    leaves: BatchLeaves,
    dropped: list[Alternative],
) -> _Candidate | None:
    """Sets a candidate up and runs it twice, unmeasured."""
    predicted_s = plan.prediction.step_time_s if plan.prediction else 0.0
    runner: Runner | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runner = make_runner(plan, *copies)
            runner.step(batch, leaves)
            runner.step(batch, leaves)
        _hand_on(runner, copies[1])
    except Exception as error:  # a candidate that cannot run is no candidate; the others go on
        if runner is not None:
            with contextlib.suppress(Exception):
                runner.close()
        reason = f"{type(error).__name__}: {error}"
        dropped.append(
            Alternative(
                description=describe(plan),
                predicted_step_time_s=predicted_s,
                measured_step_time_s=None,
                reason=f"could not run: {reason}"[:400],
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
        return None
    return _Candidate(plan, runner)


def _run_round(candidate: _Candidate, batch: Any, leaves: BatchLeaves) -> None:
    if not (isinstance(candidate.runner, GraphRunner) and candidate.runner.held):
        candidate.runner.load_state()
    begin = time.perf_counter()
    for _ in range(MAX_STEPS_PER_ROUND):
        start = time.perf_counter()
        candidate.runner.step(batch, leaves)
        end = time.perf_counter()
        candidate.times_s.append(end - start)
        if end - begin > ROUND_TIME_S:
            break


def _rank(candidate: _Candidate) -> tuple[int, int]:
    """Simplicity: plain PyTorch first, then fewer workers."""
    return (candidate.plan.mode != "block", candidate.plan.num_workers)


def _report(candidates: list[_Candidate], dropped: list[Alternative]) -> Plan:
    fastest_s = min(candidate.median_s for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.median_s <= fastest_s * (1 + TIE_SHARE)]
    best = min(near, key=lambda candidate: (_rank(candidate), candidate.median_s))
    alternatives = []
    for candidate in sorted(candidates, key=lambda item: item.median_s):
        predicted_s = candidate.plan.prediction.step_time_s if candidate.plan.prediction else 0.0
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

"""What is predicted of a candidate before it trains: memory, step time, and what more cores would gain.

A candidate that is to train for some seconds at first is priced by the outline of its step: memory as plain PyTorch
takes it, a roofline of its ops, and a gain of all cores that is the same for all. Once it may train for longer, one
plan is priced, not searched: the step as it runs on the trial's own cores, and the same over all cores as data
parallelism. That takes a second or some, most of it for the capture; finding the best plan pays once a candidate is
trained for long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partita.cluster import Cluster
from partita.cost.memory import state_bytes
from partita.cost.roofline import rates_of, roofline_s
from partita.cost.table import DISPATCH_S, UNCERTAINTY_ROOFLINE, CostTable
from partita.errors import InfeasibleError, InputError, PartitaError, PlanError
from partita.graph import Graph, capture
from partita.graph.outline import outline
from partita.plan import Constraints, Plan, Prediction
from partita.planner.describe import title
from partita.search.effort import is_split
from partita.training.optimizers import OptimizerFacts
from partita.training.planning import block_plan, ranked_plans
from partita.training.runner import LossFn
from partita.units import format_bytes, format_time

ROUGH_EFFICIENCY = 0.75  # of each further core, where no plan was priced
LEAST_STEPS = 20  # until the deadline; a candidate that makes fewer learns nothing useful


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What candidates must keep to: elements of parameters, bytes of a step at its peak, and the instant (seconds since
    1970) by which all training ends."""

    max_params: int | None
    max_memory_bytes: int
    last_s: float


@dataclass(frozen=True, kw_only=True)
class Price:
    """What is predicted of a candidate. `memory_bytes` and `step_time_s` are None where the step cannot be captured;
    `uncertainty` is the relative error of `step_time_s`; `wide_gain` is how many times as fast all cores are, or what
    the network is searched for. `outline_s`: what the outline of the step took, 0 where it has none; `is_rough`: all
    this follows from it."""

    num_parameters: int
    memory_bytes: int | None = None
    step_time_s: float | None = None
    uncertainty: float = 0.0
    wide_gain: float = 1.0
    note: str = ""
    refused: str = ""  # why there is no plan for what the network is searched for
    outline_s: float = 0.0
    is_rough: bool = False


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def priced(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batch: Any,
    *,
    own: Cluster,
    everywhere: Cluster | None,
    target: Cluster | None,
) -> Price:
    """The price of a candidate on the cores of `own`, and its gain `everywhere` (None: there is none to be had), or by
    the best plan of a `target`."""
    size = num_parameters(model)
    try:
        with torch.random.fork_rng(devices=[]):
            graph = capture(model, loss_fn, batch)
        here = one_plan(graph, own, optimizer, num_threads=own.num_cores)
    except InputError:
        raise
    except PartitaError as error:
        return Price(num_parameters=size, note=f"memory and step time are not predicted: {error}")
    gain, note, refused = 1.0, "", ""
    if target is not None:
        try:
            plan = best_plan(graph, target, optimizer)
            assert plan.prediction is not None
            gain, note = here.step_time_s / plan.prediction.step_time_s, f"its plan there: {title(plan)}"
        except InfeasibleError as error:
            refused = str(error)
    elif everywhere is not None and everywhere.num_cores > own.num_cores and graph.batch_size >= everywhere.num_cores:
        gain = _wide_gain(graph, optimizer, here.step_time_s, everywhere)
    return Price(
        num_parameters=size,
        memory_bytes=max(here.memory_bytes.values()),
        step_time_s=here.step_time_s,
        uncertainty=here.uncertainty,
        wide_gain=gain,
        note=note,
        refused=refused,
    )


def roughly_priced(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batch: Any,
    *,
    own: Cluster,
    everywhere: Cluster,
    final_s: float,
) -> Price | None:
    """The price of a candidate on the CPU cores of `own` by the outline of its step; None: it has none.

    Args:
        everywhere: where it would be trained in the end, for `final_s`.
    """
    start_s = time.monotonic()
    try:
        with torch.random.fork_rng(devices=[]):
            step = outline(model, loss_fn, batch)
    except InputError:
        raise
    except PartitaError:
        return None
    outline_s = time.monotonic() - start_s
    place = block_plan(own, graph=None, reasons=()).workers[0]
    facts = OptimizerFacts.of(optimizer)
    rates = rates_of(own.machines[place.machine], place, launch_s=DISPATCH_S)
    update_s = CostTable(own, read_cache=False).update_time_s(step.trained, facts.name, place)
    is_wide = step.batch_size >= everywhere.num_cores > own.num_cores and is_split(final_s, outline_s)
    num_cores = everywhere.num_cores if is_wide else own.num_cores
    return Price(
        num_parameters=num_parameters(model),
        memory_bytes=step.kept_bytes + step.peak_bytes + state_bytes(step.trained_bytes, facts.state_bytes_per_element),
        step_time_s=sum(roofline_s(rates, *work) for work in step.works) + update_s,
        uncertainty=UNCERTAINTY_ROOFLINE,
        wide_gain=1 + ROUGH_EFFICIENCY * (num_cores / own.num_cores - 1),
        outline_s=outline_s,
        is_rough=True,
    )


def _wide_gain(graph: Graph, optimizer: torch.optim.Optimizer, own_s: float, everywhere: Cluster) -> float:
    """How many times as fast as `own_s` a step is predicted to be with a worker on each core; 1 if it has no such
    plan."""
    try:
        wide = one_plan(graph, everywhere, optimizer, num_data=everywhere.num_cores)
    except PartitaError:
        return 1.0
    return min(float(everywhere.num_cores), max(1.0, own_s / wide.step_time_s))


def best_plan(graph: Graph, where: Cluster, optimizer: torch.optim.Optimizer) -> Plan:
    """The plan that is predicted to be fastest on a cluster, from measured ops. Plans that compile are left out: what
    they gain is predicted badly from single ops, and it is compared with a step that is not compiled."""
    facts, constraints = OptimizerFacts.of(optimizer), Constraints(compiled=False)
    return ranked_plans(graph, where, CostTable(where), constraints, facts, limit=1, refines=False)[0]


def one_plan(
    graph: Graph, where: Cluster, optimizer: torch.optim.Optimizer, *, num_data: int = 1, num_threads: int = 1
) -> Prediction:
    """Of the one plan that has so many workers along the data axis, with so many threads each."""
    constraints = Constraints(
        data=num_data,
        tensor=1,
        pipeline=1,
        num_workers=num_data,
        threads_per_worker=num_threads,
        num_microbatches=1,
        compiled=False,
    )
    facts = OptimizerFacts.of(optimizer)
    plans: tuple[Plan, ...] = ranked_plans(graph, where, CostTable(where), constraints, facts, limit=1, refines=False)
    if not plans or plans[0].prediction is None:
        raise PlanError("no plan of this shape can be had")
    return plans[0].prediction


def too_large(size: int, limits: Limits) -> str:
    """Why a candidate of so many parameters is not trained; "" if it is."""
    if limits.max_params is not None and size > limits.max_params:
        return f"it has {size:,} parameters, more than max_params = {limits.max_params:,}"
    return ""


def infeasible(price: Price, limits: Limits, now_s: float) -> str:
    """Why a candidate is not trained; "" if it is. A predicted step time counts only so far as it is sure."""
    if price.refused:
        return price.refused
    if price.memory_bytes is not None and price.memory_bytes > limits.max_memory_bytes:
        return (
            f"a step is predicted to take {format_bytes(price.memory_bytes)} of memory, more than "
            f"{format_bytes(limits.max_memory_bytes)}"
        )
    if price.step_time_s is not None:
        return too_slow(price.step_time_s * (1 - price.uncertainty) / price.wide_gain, limits, now_s, "predicted")
    return ""


def too_slow(step_time_s: float, limits: Limits, now_s: float, how: str) -> str:
    """Why a candidate whose steps take so long is not trained (on); "" if it is."""
    left_s = max(0.0, limits.last_s - now_s)
    if step_time_s * LEAST_STEPS > left_s:
        return (
            f"a step is {how} to take {format_time(step_time_s)}, so it would make fewer than {LEAST_STEPS} in the "
            f"{format_time(left_s)} until the deadline"
        )
    return ""

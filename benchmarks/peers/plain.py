"""Plain PyTorch, eager or compiled, on one thread or on all; and what all torch peers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks import families
from benchmarks.families import Task
from benchmarks.peers.choose import Prepared, StepFn, Variant, fastest
from benchmarks.peers.roster import BY_NAME, num_cores
from benchmarks.peers.workload import OPTIMIZER, Workload

IMPLEMENTATIONS: Mapping[str, Mapping[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def plain_step(optimizer: torch.optim.Optimizer, loss_fn: Callable[..., torch.Tensor], model: nn.Module) -> StepFn:
    def step(batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def optimizer_variants(
    task: Task, loss_fn: Callable[..., torch.Tensor], model: nn.Module, *, label: str = ""
) -> list[Variant]:
    """One variant for each implementation of the optimizer's update; they share the model.

    The parameters are read when a variant is built, since wrapping a model may replace them.
    """

    def variant(name: str, options: Mapping[str, bool]) -> Variant:
        return Variant(
            f"{label}{name} optimizer",
            lambda: plain_step(families.make_optimizer(OPTIMIZER, task, **options), loss_fn, model),
        )

    return [variant(name, options) for name, options in IMPLEMENTATIONS.items()]


def prepare(name: str, workload: Workload) -> Prepared:
    num_threads = num_cores() if BY_NAME[name].num_threads == "all" else 1
    torch.set_num_threads(num_threads)
    task = workload.task()
    loss_fn = task.loss_fn
    if name.startswith("compiled"):
        torch.compiler.reset()
        loss_fn = torch.compile(task.loss_fn)
    variants = optimizer_variants(task, loss_fn, task.model)
    return fastest(variants, workload.batches(task), label=f"{num_threads} thread(s), ")

"""DistributedDataParallel with one process a core, eager or compiled on each rank; and what all torch jobs share.

Every process steps on its own rows; the mean of their losses is the batch's where all rows weigh the same. Where
they do not, or where rows meet (batch norm), these peers compute something cheaper than the batch's gradient, and are
raced all the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.families import Task
from benchmarks.peers.choose import Prepared, fastest
from benchmarks.peers.plain import optimizer_variants
from benchmarks.peers.workload import Workload


def join_job() -> None:
    """Form the process group once a process, with one intra-op thread each."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def own_rows(batches: list[Any]) -> list[Any]:
    """This rank's share of the rows of every batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [pytree.tree_map(lambda leaf: leaf.tensor_split(size)[rank], batch) for batch in batches]


def largest(value: float) -> float:
    """The largest of the ranks' values, so that all choose alike."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def mean_first_loss(prepared: Prepared) -> Prepared:
    """`prepared` with the ranks' mean first loss."""
    tensor = torch.tensor(prepared.first_loss, dtype=torch.float64)
    dist.all_reduce(tensor)
    prepared.first_loss = float(tensor) / dist.get_world_size()
    return prepared


class ModelWithLoss(nn.Module):
    """A model whose forward pass is its loss, so that all of it is inside of the wrapper, and compiled with it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.loss_fn = task.model, task.loss_fn

    def forward(self, batch: Any) -> torch.Tensor:
        return self.loss_fn(self.model, batch)


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch)
    return loss


def prepare(name: str, workload: Workload) -> Prepared:
    join_job()
    task = workload.task()
    inner = ModelWithLoss(task)
    if name == "ddp compiled":
        torch.compiler.reset()
        inner.compile()  # inside of the wrapper, which cuts the graph at its buckets so that sums overlap
    model = DistributedDataParallel(inner, gradient_as_bucket_view=True)
    variants = optimizer_variants(task, loss_of, model)
    batches = own_rows(workload.batches(task))
    return mean_first_loss(fastest(variants, batches, agree=largest, label=f"{name} x{dist.get_world_size()}, "))

"""Fully sharded data parallelism (`fully_shard`, "FSDP2"), one process a core.

The whole model as one unit, or one unit a block; parameters kept gathered between forward and backward, since
memory is not what is raced.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import families
from benchmarks.peers.choose import Prepared, StepFn, Variant, fastest
from benchmarks.peers.ddp import join_job, largest, mean_first_loss, own_rows
from benchmarks.peers.plain import IMPLEMENTATIONS, plain_step
from benchmarks.peers.workload import OPTIMIZER, Workload

# They are never called and so cannot be units.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Members of the model's module lists that can be called, inner ones first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    members = [member for blocks in reversed(lists) for member in blocks if not isinstance(member, _CONTAINERS)]
    return [member for member in members if any(True for _ in member.parameters())]


def prepare(name: str, workload: Workload) -> Prepared:
    join_job()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def build(by_block: bool, options: Mapping[str, bool]) -> StepFn:
        task = workload.task()
        for block in blocks_of(task.model) if by_block else ():
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(task.model, mesh=mesh, reshard_after_forward=False)
        return plain_step(families.make_optimizer(OPTIMIZER, task, **options), task.loss_fn, task.model)

    def variant(by_block: bool, implementation: str) -> Variant:
        units = "a unit a block" if by_block else "one unit"
        return Variant(f"{units}, {implementation} optimizer", lambda: build(by_block, IMPLEMENTATIONS[implementation]))

    task = workload.task()
    units = (False, True) if blocks_of(task.model) else (False,)
    variants = [variant(by_block, implementation) for by_block in units for implementation in IMPLEMENTATIONS]
    prepared = fastest(variants, own_rows(workload.batches(task)), agree=largest, label=f"x{dist.get_world_size()}, ")
    return mean_first_loss(prepared)

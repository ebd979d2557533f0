"""DeepSpeed with optimizer states sharded over the processes (ZeRO stage 1), one process a core, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist

from benchmarks import families
from benchmarks.peers.choose import Prepared, StepFn, Variant, fastest
from benchmarks.peers.ddp import join_job, largest, mean_first_loss, own_rows
from benchmarks.peers.plain import IMPLEMENTATIONS
from benchmarks.peers.workload import OPTIMIZER, Workload


def prepare(name: str, workload: Workload) -> Prepared:
    join_job()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    task = workload.task()
    variants = [
        Variant(f"{implementation} optimizer", lambda options=options: _build(workload, options))
        for implementation, options in IMPLEMENTATIONS.items()
    ]
    batches = own_rows(workload.batches(task))
    return mean_first_loss(fastest(variants, batches, agree=largest, label=f"stage 1 x{dist.get_world_size()}, "))


def _build(workload: Workload, options: Mapping[str, bool]) -> StepFn:
    task = workload.task()
    engine, *_ = deepspeed.initialize(
        model=task.model,
        optimizer=families.make_optimizer(OPTIMIZER, task, **options),
        config={
            "train_micro_batch_size_per_gpu": 1,  # only counted: rows are cut by `own_rows`
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )

    def step(batch: Any) -> float:
        loss = task.loss_fn(engine, batch)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step

"""Partita's automatic plan, without a hint of any kind."""

from __future__ import annotations

import itertools

import torch

import partita
from benchmarks import families
from benchmarks.peers.choose import Prepared
from benchmarks.peers.roster import num_cores
from benchmarks.peers.workload import OPTIMIZER, Workload


def prepare(name: str, workload: Workload) -> Prepared:
    torch.set_num_threads(num_cores())
    task = workload.task()
    batches = workload.batches(task)
    step = partita.parallelize(task.model, families.make_optimizer(OPTIMIZER, task), task.loss_fn, batches[0])
    stream = itertools.cycle(batches)
    first_loss = float(step(next(stream)).loss)
    while not step.is_settled:  # candidates run in turns, and compiled ones come in when they are ready
        step(next(stream))
    return Prepared(
        lambda batch: float(step(batch).loss), stream, first_loss, _in_words(step.plan),
        close=step.close,
    )  # fmt: skip


def _in_words(plan: partita.Plan) -> str:
    compiled = " compiled" if plan.compiled else ""
    return f"{plan.mode}{compiled} {plan.axes} x{plan.num_microbatches}, {plan.threads_per_worker} thread(s) a worker"

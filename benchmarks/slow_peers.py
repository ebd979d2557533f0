"""The peers of `benchmarks.slow_network`: one process a machine, each with its own way of training the same model.

Every model is an `nn.Sequential`, so that torch's pipelining has somewhere to cut it; a batch is (inputs, classes).
Losses of data-parallel peers are means over their own rows, whose mean is that of the batch, since all rows weigh the
same and the machines divide them.
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Row
from benchmarks.ddp_hooks import register_hook
from benchmarks.processes import Message

PARTITA = "partita"
INEXACT = ("ddp fp16", "ddp powersgd")  # they change the gradients
FORCED = ("partita data", "partita pipeline")  # what the automatic plan may have been, so that its bytes are seen
PEERS = ("plain", "ddp", *INEXACT, "fsdp2", "pipelining", PARTITA, *FORCED)
PARAMETER_HEAVY = ("mlp", "transformer")
MODELS = (*PARAMETER_HEAVY, "conv")
NUM_CLASSES = 16
NUM_BATCHES = 2
Batch = tuple[Any, Any]
StepFn = Callable[[Batch], float]


def make_model(name: str) -> Any:
    """ "mlp": 1.8 M parameters in 7 layers. "transformer": 1.9 M in an embedding of 1,000 and 8 blocks of width 128.
    "conv": 0.15 M in 8 convolutions on 32 x 32 images."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":
        blocks = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(7)]
        return nn.Sequential(*blocks, nn.Linear(512, NUM_CLASSES))
    if name == "transformer":
        blocks = [
            nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True) for _ in range(8)
        ]
        return nn.Sequential(nn.Embedding(1000, 128), *blocks, _head(128))
    if name == "conv":
        widths = [3, 32, 32, 48, 48, 48, 64, 64, 64]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=2 if a != b and a > 3 else 1), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        ]
        return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, NUM_CLASSES)))
    raise ValueError(f"the model must be one of {MODELS}, but got {name!r}")


def _head(width: int) -> Any:
    from torch import nn

    class Head(nn.Module):
        """[B, T, D] -> classes of the mean over T."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(width, NUM_CLASSES)

        def forward(self, x_BTD: Any) -> Any:
            return self.linear(x_BTD.mean(1))

    return Head()


def make_batches(name: str) -> list[Batch]:
    import torch

    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(NUM_BATCHES):
        if name == "mlp":
            x, rows = torch.randn(256, 512, generator=random), 256
        elif name == "transformer":
            x, rows = torch.randint(0, 1000, (32, 32), generator=random), 32
        else:
            x, rows = torch.randn(32, 3, 32, 32, generator=random), 32
        found.append((x, torch.randint(0, NUM_CLASSES, (rows,), generator=random)))
    return found


def make_optimizer(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=1e-3)


def loss_of(model: Any, batch: Batch) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Prepared:
    """A model that is ready to step. `facts` are told once; `bytes_sent` of the last step, where the peer counts it."""

    step: StepFn
    stream: Iterator[Batch]
    facts: Row
    close: Callable[[], None] = lambda: None
    last: Callable[[], Row] = lambda: {}


def _group() -> tuple[int, int]:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _own_rows(batches: list[Batch], rank: int, size: int) -> Iterator[Batch]:
    return itertools.cycle([(x.tensor_split(size)[rank], y.tensor_split(size)[rank]) for x, y in batches])


def _plain_step(model: Any, optimizer: Any) -> StepFn:
    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def prepare_plain(model: Any, batches: list[Batch]) -> Prepared:
    """One machine trains, the others have nothing to do."""
    if os.environ["RANK"] != "0":
        return Prepared(lambda batch: 0.0, itertools.cycle(batches), {})
    return Prepared(_plain_step(model, make_optimizer(model.parameters())), itertools.cycle(batches), {})


def prepare_ddp(model: Any, batches: list[Batch], hook: str = "") -> Prepared:
    from torch.nn.parallel import DistributedDataParallel

    rank, size = _group()
    options = {"bucket_cap_mb": 1000} if hook == "powersgd" else {}
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    register_hook(wrapped, hook, rank=1)
    return Prepared(_plain_step(wrapped, make_optimizer(wrapped.parameters())), _own_rows(batches, rank, size), {})


def prepare_fsdp2(model: Any, batches: list[Batch]) -> Prepared:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = _group()
    mesh = init_device_mesh("cpu", (size,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Prepared(_plain_step(model, make_optimizer(model.parameters())), _own_rows(batches, rank, size), {})


def prepare_pipelining(model: Any, batches: list[Batch]) -> Prepared:
    """Stages of equal numbers of blocks, 1F1B, as many microbatches as give the bubble a third: 2 (stages - 1)."""
    import torch
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, size = _group()
    bounds = [len(model) * stage // size for stage in range(size + 1)]
    mine = nn.Sequential(*list(model)[bounds[rank] : bounds[rank + 1]])
    num_microbatches = max(size, 2 * (size - 1))
    while len(batches[0][0]) % num_microbatches:
        num_microbatches += 1
    stage = PipelineStage(mine, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, num_microbatches, loss_fn=nn.functional.cross_entropy)
    optimizer = make_optimizer(mine.parameters())

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        losses: list[Any] = []
        if rank == 0:
            schedule.step(batch[0])
        elif rank == size - 1:
            schedule.step(target=batch[1], losses=losses)
        else:
            schedule.step()
        optimizer.step()
        return float(sum(float(loss.detach()) for loss in losses) / max(len(losses), 1))

    return Prepared(step, itertools.cycle(batches), {"num_microbatches": num_microbatches})


def prepare_partita(model: Any, batches: list[Batch], axis: str = "") -> Prepared:
    """The automatic plan, or one that is spread along one axis: not compiled, since its bytes are the same."""
    start_s = time.perf_counter()
    plan: Any = "auto"
    if axis:
        extents = {"data": 1, "pipeline": 1, axis: int(os.environ["WORLD_SIZE"])}
        plan = partita.Constraints(**extents, compiled=False)
    step = partita.parallelize(model, make_optimizer(model.parameters()), loss_of, batches[0], plan=plan)
    stream = itertools.cycle(batches)
    while not step.is_settled:  # candidates run in turns, and compiled ones come in when they are ready
        step(next(stream))
    plan, last = step.plan, {"bytes_sent": 0}

    def run(batch: Batch) -> float:
        result = step(batch)
        last["bytes_sent"] = result.bytes_sent
        return float(result.loss)

    compiled = " compiled" if plan.compiled else ""
    alternatives = [
        {"plan": a.description, "predicted_s": a.predicted_step_time_s, "measured_s": a.measured_step_time_s}
        for a in plan.alternatives
    ]
    facts: Row = {
        "plan": f"{plan.mode}{compiled} {plan.axes} x{plan.num_microbatches}"
        + (f" buckets of {plan.bucket_bytes:,}" if plan.bucket_bytes else ""),
        "predicted_step_time_s": plan.prediction.step_time_s if plan.prediction else None,
        "predicted_bytes_sent": plan.prediction.bytes_sent if plan.prediction else None,
        "measured_step_time_s": plan.measured_step_time_s,
        "prepare_time_s": time.perf_counter() - start_s,
        "alternatives": alternatives,
    }
    return Prepared(run, stream, facts, step.close, lambda: dict(last))


PREPARERS: dict[str, Callable[[Any, list[Batch]], Prepared]] = {
    "plain": prepare_plain,
    "ddp": prepare_ddp,
    "ddp fp16": lambda model, batches: prepare_ddp(model, batches, "fp16"),
    "ddp powersgd": lambda model, batches: prepare_ddp(model, batches, "powersgd"),
    "fsdp2": prepare_fsdp2,
    "pipelining": prepare_pipelining,
    PARTITA: prepare_partita,
    "partita data": lambda model, batches: prepare_partita(model, batches, "data"),
    "partita pipeline": lambda model, batches: prepare_partita(model, batches, "pipeline"),
}


class Peer:
    """The child's side: prepares a model, then steps when it is its turn."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._prepared: Prepared | None = None

    def __call__(self, message: Message) -> Row:
        if message["do"] == "prepare":
            return self._prepare(message["model"])
        if message["do"] == "forget":
            self._forget()
            return {}
        return self._turn(message["num_steps"])

    def _prepare(self, name: str) -> Row:
        import torch

        warnings.simplefilter("ignore")
        self._forget()
        torch.set_num_threads(1)
        self._prepared = PREPARERS[self.peer](make_model(name), make_batches(name))
        times_s = []
        for _ in range(2):
            start_s = time.perf_counter()
            self._prepared.step(next(self._prepared.stream))
            times_s.append(time.perf_counter() - start_s)
        return {**self._prepared.facts, "times_s": times_s}

    def _turn(self, num_steps: int) -> Row:
        assert self._prepared is not None, "a model must be prepared before its turn"
        times_s: list[float] = []
        for _ in range(num_steps):
            batch = next(self._prepared.stream)
            start_s = time.perf_counter()
            loss = self._prepared.step(batch)
            times_s.append(time.perf_counter() - start_s)
        return {"times_s": times_s, "loss": loss, **self._prepared.last()}

    def _forget(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None

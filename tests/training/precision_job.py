"""One process of a job of two, started by `test_training_precision.py`: whole-matrix optimizers, float32 masters and a
scaled loss."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import plain_training
import torch
from plain_training import Coupled, train_plain
from torch import nn

import partita
from partita import Constraints
from partita.training import update_costs
from partita.training.step import Step

BASE: dict[str, Any] = {"compiled": False, "threads_per_worker": 1}
DATA = Constraints(**BASE, data=2, pipeline=1, num_microbatches=1)
SHARDED = Constraints(**BASE, data=2, pipeline=1, num_microbatches=1, fully_sharded=True)
DECAY, LIMIT, NUM_STEPS = 0.7, 0.5, 5


class Shampoo(torch.optim.Optimizer):
    """Gupta et al. 2018, algorithm 1: a matrix is preconditioned by the inverse fourth roots of both of its second
    moments, anything else by the root of its squares, as Adagrad does."""

    def __init__(self, params: Any, lr: float = 0.05, eps: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(self._direction(weight, weight.grad, group["eps"]), alpha=group["lr"])

    def _direction(self, weight: torch.Tensor, gradient: torch.Tensor, eps: float) -> torch.Tensor:
        state = self.state[weight]
        if weight.dim() != 2:
            state.setdefault("square", torch.zeros_like(weight)).add_(gradient.square())
            return gradient / (state["square"].sqrt() + eps)
        rows, columns = weight.shape
        state.setdefault("left", eps * torch.eye(rows)).add_(gradient @ gradient.T)
        state.setdefault("right", eps * torch.eye(columns)).add_(gradient.T @ gradient)
        return _root(state["left"]) @ gradient @ _root(state["right"])


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse fourth root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-12).pow(-0.25)) @ vectors.T


class MuonWithAdam(torch.optim.Optimizer):
    """Muon for the groups that say so and AdamW for the others, in one class, by those of torch."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"is_muon": False, "lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            made = torch.optim.Muon if group["is_muon"] else torch.optim.AdamW
            for weight in group["params"]:
                inner: torch.optim.Optimizer = made([weight], lr=group["lr"])  # type: ignore[operator]
                inner.state[weight] = self.state[weight]
                inner.step()


def _mixed(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [value for value in model.parameters() if value.dim() == 2]
    others = [value for value in model.parameters() if value.dim() != 2]
    return MuonWithAdam([{"params": matrices, "is_muon": True}, {"params": others, "lr": 3e-3}])


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "muon": lambda model: torch.optim.Muon([v for v in model.parameters() if v.dim() == 2], lr=1e-2),
    "shampoo": lambda model: Shampoo(model.parameters()),
    "mixed": _mixed,
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "coupled": lambda model: Coupled(model.parameters(), lr=0.1),
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    return model, OPTIMIZERS[kind](model)


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    x_BI = batch[0].to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x_BI).float(), batch[1])


def batch_of(seed: int) -> Any:
    return plain_training.batch_of(seed, 12)


def plain(kind: str, num_steps: int = NUM_STEPS) -> tuple[list[float], nn.Module]:
    """Losses and model by plain PyTorch."""
    model, optimizer = build(kind)
    return train_plain(model, optimizer, map(batch_of, range(num_steps)), loss_fn), model


def plain_masters(
    kind: str, dtype: torch.dtype, num_steps: int = NUM_STEPS, *, limit: float | None = None
) -> tuple[list[float], nn.Module, nn.Module, nn.Module]:
    """Losses, half-precision model, masters and their average, by a plain loop with explicit float32 copies."""
    model, _ = build(kind, dtype)
    masters = copy.deepcopy(model).float()
    optimizer, average = OPTIMIZERS[kind](masters), copy.deepcopy(masters)
    losses = []
    for index in range(num_steps):
        model.zero_grad()
        loss = loss_fn(model, batch_of(index))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        for weight, master in zip(model.parameters(), masters.parameters(), strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        if limit is not None:
            nn.utils.clip_grad_norm_(masters.parameters(), limit)
        optimizer.step()
        with torch.no_grad():
            for weight, master, mean in zip(*(m.parameters() for m in (model, masters, average)), strict=True):
                weight.copy_(master)
                mean.copy_(master if index == 0 else DECAY * mean + (1 - DECAY) * master)
    return losses, model, masters, average


def updates_by_process(step: Step) -> list[list[str]]:
    """By process, the parameters that it updates."""
    programs = step._runners[step._adopting_key].programs  # type: ignore[union-attr]
    found: dict[int, list[str]] = {program.process: [] for program in programs.programs}
    for program in programs.programs:
        found[program.process] += [part.parameter for slices in program.updates for part in slices]
    return [sorted(found[process]) for process in sorted(found)]


class Overflowing(nn.Module):
    """float32 weights, float16 values in between: gradients of float16 overflow at large scales of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        h_BJ = torch.tanh(self.first(x_BI))
        gain = (1.0 + 40.0 * (x_BI[:, :1] > 1.5)).half()  # some batches have steeper gradients than others
        return self.last((h_BJ.half() * gain).float())


def scaled_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return 60.0 * nn.functional.cross_entropy(model(batch[0]), batch[1])


def build_scaled() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = Overflowing()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def plain_scaled(
    num_steps: int, *, limit: float | None = None, updates: Sequence[bool] | None = None
) -> tuple[list[float], list[float], nn.Module]:
    """Losses, scales of each step, and model by `torch.amp.GradScaler`."""
    model, optimizer = build_scaled()
    scaler = torch.amp.GradScaler("cpu")
    losses, scales = [], []
    for index in range(num_steps):
        loss = scaled_loss(model, batch_of(index))
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        losses.append(loss.item())
        if updates is not None and not updates[index]:
            continue
        if limit is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses, scales, model


def _whole_matrices(found: dict[str, Any], folder: str) -> None:
    for kind in ("muon", "shampoo", "mixed"):
        model, optimizer = build(kind)
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=DATA, timeout_s=60) as step:
            losses = [step(batch_of(index)).loss for index in range(NUM_STEPS - 1)]
            updated = updates_by_process(step)
            held = [value.tolist() for value in model.parameters()]  # without collecting anything
            step.save(f"{folder}/{kind}")
            step.load(f"{folder}/{kind}")
            losses.append(step(batch_of(NUM_STEPS - 1)).loss)
            step.sync_to(model)
            num_states = sum(bool(state) for state in optimizer.state.values())
        weights = [value.tolist() for value in model.parameters()]
        found[kind] = {"losses": losses, "held": held, "weights": weights, "updated": updated, "states": num_states}


def _masters(found: dict[str, Any], folder: str) -> None:
    cases = [("adamw", DATA), ("adamw", SHARDED), ("sgd", DATA), ("muon", DATA), ("coupled", DATA)]
    for place, (kind, plan) in enumerate(cases):
        model, optimizer = build(kind, torch.bfloat16)
        average = copy.deepcopy(model).float()
        options: dict[str, Any] = {"master_weights": True, "ema": DECAY, "clip_grad_norm": LIMIT, "timeout_s": 60}
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, **options) as step:
            losses = [step(batch_of(index)).loss for index in range(NUM_STEPS - 1)]
            step.save(f"{folder}/{place}")
            step.load(f"{folder}/{place}")
            losses.append(step(batch_of(NUM_STEPS - 1)).loss)
            step.sync_to(model)
            step.ema_to(average)
            masters = [optimizer.state[value].get("master") for value in model.parameters()]
        found[f"masters of {kind}, {'sharded' if plan is SHARDED else 'data'}"] = {
            "losses": losses,
            "weights": [value.tolist() for value in model.parameters()],
            "masters": [None if value is None else value.tolist() for value in masters],
            "types": [None if value is None else str(value.dtype) for value in masters],
            "average": [value.tolist() for value in average.parameters()],
        }


def _scaled(found: dict[str, Any]) -> None:
    for limit in (None, LIMIT):
        model, optimizer = build_scaled()
        options: dict[str, Any] = {"loss_scale": "dynamic", "clip_grad_norm": limit, "timeout_s": 60}
        with partita.parallelize(model, optimizer, scaled_loss, batch_of(0), plan=DATA, **options) as step:
            results = [step(batch_of(index)) for index in range(8)]
            step.sync_to(model)
        found[f"scaled, {limit}"] = {
            "losses": [result.loss for result in results],
            "scales": [result.loss_scale for result in results],
            "skipped": [result.skipped for result in results],
            "weights": [value.tolist() for value in model.parameters()],
        }


def main(corner: str, folder: str, rank: int) -> None:
    # Updates of matrices so small are not worth a message: as if they took a second.
    measured = update_costs.update_times_s
    update_costs.update_times_s = lambda *args, **options: {  # type: ignore[assignment]
        name: time_s + args[1][name].dim() - 1 for name, time_s in measured(*args, **options).items()
    }
    found: dict[str, Any] = {}
    _whole_matrices(found, folder)
    _masters(found, folder)
    _scaled(found)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


def counted(updated: Sequence[Sequence[str]]) -> Counter[str]:
    return Counter(name for names in updated for name in names)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""One process of a job of two, started by `test_training_connecting.py`: learns connections."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from averages_job import BASE
from averages_job import PLANS as OTHER_PLANS
from clipping_job import batch_of, build, loss_fn
from torch import nn

import partita
from partita import Constraints, PlanError
from partita.connections import SET, Magnitude, RigL, Static
from partita.training.connecting import Connections

NUM_STEPS = 9
METHODS: dict[str, Connections] = {
    "static": Static(density=0.4),
    "set": SET(density=0.4, until=8, every=2, fraction=0.5, seed=2),
    "rigl": RigL(density=0.4, until=8, every=2, fraction=0.5),
    "blocks": RigL(density=0.5, until=8, every=2, fraction=0.8, block=(3, 2), form="masked"),
    "magnitude": Magnitude(density=0.3, until=7, every=2, since=2, distribution="uniform", dense=("4.*",)),
}
OPTIONS: dict[str, Any] = {"density": 0.5, "block": (3, 2), "distribution": "uniform", "form": "blocks"}
BY_BLOCKS: dict[str, Connections] = {
    "static by blocks": Static(**OPTIONS),
    "set by blocks": SET(**OPTIONS, until=8, every=3, fraction=0.8, seed=2),
    "rigl by blocks": RigL(**OPTIONS, until=8, every=2, fraction=0.8),
    "some by blocks": RigL(**OPTIONS | {"distribution": "erk"}, until=8, every=2, fraction=0.8, dense=("0.*",)),
}
ALL = METHODS | BY_BLOCKS

WIDTHS = {"0.*": {"tensor": "S(0)"}, "2.*": {"tensor": "S(0)"}}  # the outputs of two layers, one after the other
PLANS = OTHER_PLANS | {"widths": Constraints(**BASE, data=1, pipeline=1, tensor=2, inputs=WIDTHS)}
CASES = [
    *(("rigl", corner) for corner in OTHER_PLANS),
    ("static", "data"),
    ("set", "data"),
    ("set", "fully sharded"),
    ("magnitude", "pipeline"),
    ("blocks", "tensor"),
]
CASES_BY_BLOCKS = [
    ("rigl by blocks", "data"),
    ("rigl by blocks", "pipeline"),
    ("rigl by blocks", "widths"),
    ("static by blocks", "data"),
    ("set by blocks", "pipeline"),
    ("set by blocks", "widths"),
    ("some by blocks", "data"),
    ("some by blocks", "fully sharded"),
]
REFUSED = "rigl by blocks", "tensor"  # a process would store some of the blocks that a block of outputs reads


def plain(
    method: Connections,
    kind: str = "AdamW",
    num_steps: int = NUM_STEPS,
    limit: float | None = None,
    num_batches: int = 1,
) -> tuple[nn.Module, dict[str, torch.Tensor], list[float]]:
    """The model, its connections and losses, by plain PyTorch; each step adds up the gradients of some batches."""
    model, optimizer = build(kind)
    random = torch.Generator().manual_seed(method.seed)
    parameters = method.parameters_of(model)
    masks = method.start({name: item.detach() for name, item in parameters.items()}, random)
    losses = []

    @torch.no_grad()
    def clean() -> None:
        for name, item in parameters.items():
            item.mul_(masks[name])
            for value in optimizer.state.get(item, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == item.shape:
                    value.mul_(masks[name])

    clean()
    for index in range(num_steps):
        optimizer.zero_grad()
        for number in range(index * num_batches, (index + 1) * num_batches):
            loss = loss_fn(model, batch_of(number))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        gradients = {}
        for name, item in parameters.items():
            assert item.grad is not None
            gradients[name] = item.grad.clone()
            item.grad.mul_(masks[name])
        if limit is not None:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        clean()
        if method.is_due(index + 1):
            weights = {name: item.detach() for name, item in parameters.items()}
            masks = method.changed(index + 1, weights, gradients, masks, random)
            clean()
    return model, masks, losses


def assert_alike(model: nn.Module, masks: Any, method: Any, **options: Any) -> None:
    """A model and its connections are those of plain PyTorch, and nothing is where no connections are."""
    expected, wanted, _ = plain(method, **options)
    assert masks.keys() == wanted.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, wanted[name]), name
        assert not model.get_parameter(name)[~mask].any()
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def main(kind: str, folder: str, rank: int) -> None:
    found: dict[str, Any] = {}
    for name, corner in CASES_BY_BLOCKS if kind == "by blocks" else CASES:
        model, optimizer = build("AdamW")
        with partita.parallelize(
            model, optimizer, loss_fn, batch_of(0), plan=PLANS[corner], connections=ALL[name], timeout_s=30
        ) as step:
            results = [step(batch_of(index)) for index in range(NUM_STEPS)]
            step.sync_to(model)
            found[f"{name}, {corner}"] = {
                "losses": [result.loss for result in results],
                "bytes": [result.bytes_sent for result in results],
                "weights": [value.tolist() for value in model.parameters()],
                "masks": {key: mask.tolist() for key, mask in step.connections.items()},
            }
    if kind == "by blocks":
        name, corner = REFUSED
        with pytest.raises(PlanError, match="must store all blocks that a block of outputs reads"):
            partita.parallelize(*build("AdamW"), loss_fn, batch_of(0), plan=PLANS[corner], connections=ALL[name])
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

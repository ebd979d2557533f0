"""Searches a small network for handwritten digits in 30 seconds: widths, depth, activation, learning rate, batch size.

python -m examples.search_digits
partita search examples/search_digits.py --deadline 30s --what-if "1,2 machines at 100 Mbit/s"
"""

from __future__ import annotations

from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin

import torch  # isort: skip
from sklearn.datasets import load_digits
from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def data() -> tuple[Any, Any]:
    """(training part, judged part), each (pixels, digits)."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    targets = torch.tensor(digits.target)[order]
    return (pixels[:1437], targets[:1437]), (pixels[1437:], targets[1437:])


def build(trial: Any) -> nn.Module:
    """One to three hidden layers of equal width."""
    width = trial.suggest_int("width", 16, 256, log=True)
    activation = ACTIVATIONS[trial.suggest_categorical("activation", sorted(ACTIVATIONS))]
    layers: list[nn.Module] = [nn.Linear(64, width), activation()]
    for _ in range(trial.suggest_int("depth", 1, 3) - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def main() -> None:
    result = partita.search(build, data, deadline="30s", folder="runs/search_digits", listener=print)
    print(result.explain())
    pixels, digits = data()[1]
    print(f"\n{int((result.model(pixels).argmax(1) == digits).sum())} of {len(digits)} digits are right")


if __name__ == "__main__":
    main()

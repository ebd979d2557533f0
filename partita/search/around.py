"""An automatic space: networks around a given one.

    widths       each from a quarter to four times its size, on a logarithmic scale
    depths       of runs of equal blocks, from one block to twice as many
    connections  all, or learnt ones (`partita.connections`) of a density

Blocks that are equal share their suggestions, whose names have a "*" in the place of the blocks' numbers. Weights are
new, and drawn as those of the given network were (`structure.resizing`).
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from partita.connections import SET, RigL, Static
from partita.errors import InputError
from partita.search.structure import Network, resized
from partita.search.structure.depth import repeated, with_depth
from partita.training.connecting import Connections

if TYPE_CHECKING:
    from partita.search.trials import SearchTrial

RANGE = 4
MOST_DEPTH = 2
DENSITIES = (0.05, 0.5)
UNTIL = 2000  # steps in which connections change
METHODS = ("all", "static", "set", "rigl")


@dataclass(frozen=True, eq=False)
class Around:
    """Builds networks around one.

    Args:
        model: it is not changed.
        args, kwargs: what it takes, for example.

    Raises:
        InputError: it cannot be captured.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Which space it is."""
        return f"around {type(self.model).__name__}"

    @functools.cached_property
    def runs(self) -> list[list[str]]:
        """Names of equal blocks that follow each other."""
        return repeated(Network(self.model, self.args, self.kwargs))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "args": self.args, "kwargs": self.kwargs, "runs": self.runs}

    def __call__(self, trial: SearchTrial) -> nn.Module:
        stars = _stars(self.runs)
        depths = [trial.suggest_int(f"depth of {star}", 1, MOST_DEPTH * len(run))
                  for run, star in zip(self.runs, stars, strict=True)]  # fmt: skip
        model = self.model
        for run, depth in reversed(list(zip(self.runs, depths, strict=True))):  # numbers of those before stay
            if depth != len(run):
                model = with_depth(model, run, depth)
        network = Network(model, self.args, self.kwargs)
        labels = _labels(self.model, self.runs, depths)
        sizes = {}
        for name, size in network.sizes.items():
            label = f"width of {_labelled(name, labels)}"
            sizes[name] = trial.suggest_int(label, max(1, size // RANGE), RANGE * size, log=True)
        return resized(network, sizes)

    def connections(self, trial: SearchTrial) -> Connections | None:
        """What learns the connections of a network."""
        method = trial.suggest_categorical("connections", METHODS)
        if method == "all":
            return None
        density = trial.suggest_float("density", *DENSITIES, log=True)
        if method == "static":
            return Static(density=density)
        return {"set": SET, "rigl": RigL}[method](density=density, until=UNTIL)


def _stars(runs: list[list[str]]) -> list[str]:
    """What each run is called: "blocks.*", or "blocks.4*" where its list has several."""
    holders = [run[0].rpartition(".")[0] for run in runs]
    found = []
    for run, holder in zip(runs, holders, strict=True):
        first = run[0].rpartition(".")[2] if holders.count(holder) > 1 else ""
        found.append(f"{holder}.{first}*".lstrip("."))
    return found


def _labels(model: nn.Module, runs: list[list[str]], depths: list[int]) -> dict[str, list[str]]:
    """By name of a list of modules, what those at its places are called once runs have these depths: what does not
    depend on depths."""
    found: dict[str, list[str]] = {}
    changed = {run[0]: (len(run), star, depth) for run, star, depth in zip(runs, _stars(runs), depths, strict=True)}
    for holder in {run[0].rpartition(".")[0] for run in runs}:
        names = [f"{holder}.{child}".lstrip(".") for child, _ in model.get_submodule(holder).named_children()]
        labels, place = [], 0
        while place < len(names):
            length, label, depth = changed.get(names[place], (1, names[place], 1))
            labels += [label] * depth
            place += length
        found[holder] = labels
    return found


def _labelled(name: str, labels: Mapping[str, list[str]]) -> str:
    for holder, found in labels.items():
        match = re.match(rf"{re.escape(f'{holder}.') if holder else ''}(\d+)(?=[./]|$)", name)
        if match:
            return found[int(match[1])] + name[match.end() :]
    return name


def call_of(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], torch.Tensor], batch: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With what the loss calls the model.

    Raises:
        InputError: it does not, or its code raises.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    twin = copy.deepcopy(model)
    twin.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        loss_fn(twin, batch)
    if not calls:
        raise InputError("loss_fn(model, batch) must call the model, but did not")
    return calls[0]

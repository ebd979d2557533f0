"""TARGET and CLUSTER arguments: from text to a model with its loss, and to a cluster."""

from __future__ import annotations

import difflib
import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from partita.cluster import Cluster
from partita.errors import ClusterError, InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

FORM = "TARGET must be file.py:function or package.module:function"


class Target(NamedTuple):
    """What a target function returns."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], torch.Tensor]
    batch: Any
    optimizer: torch.optim.Optimizer | None


def load_target(text: str) -> Target:
    """The model, loss, batch and optimizer of ``file.py:function``.

    Raises:
        InputError: there is no such file, module or function, or it returns something else. What the user's own code
            raises passes through as it is.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"{FORM}, but got {text!r}. Example: train.py:task.")
    names = _names_of_file(Path(place)) if place.endswith(".py") else _names_of_module(place)
    function = names.get(name)
    if not callable(function):
        known = [key for key, value in names.items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise InputError(f"{FORM}, but {place} has no function {name!r}.{hint}")
    return _check(function(), text)


def _names_of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{FORM}, but there is no file {str(path)!r} in {str(Path.cwd())!r}.")
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` would: its neighbours can be imported
    return runpy.run_path(str(path), run_name=path.stem)


def _names_of_module(name: str) -> dict[str, Any]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return vars(importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise  # something that the module itself imports
        raise InputError(
            f"{FORM}, but there is no module {name!r}. A file needs its ending: file.py:function."
        ) from None


def _check(value: object, text: str) -> Target:
    import torch

    if not isinstance(value, (tuple, list)) or len(value) not in (3, 4):
        got = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
        raise InputError(f"{text} must return (model, loss_fn, batch) or (model, loss_fn, batch, optimizer), but it "
                         f"returned {got}.")  # fmt: skip
    model, loss_fn, batch = value[:3]
    optimizer = value[3] if len(value) == 4 else None
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{text} must return an nn.Module first, but it returned {type(model).__name__}.")
    if not callable(loss_fn):
        raise InputError(f"{text} must return loss_fn(model, batch) second, but it returned {type(loss_fn).__name__}.")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"{text} must return a torch.optim.Optimizer or None fourth, but it returned {type(optimizer).__name__}."
        )
    return Target(model, loss_fn, batch, optimizer)


def load_cluster(text: str | None) -> Cluster:
    """A TOML file if `text` names one, else a preset; without text, the machines of this job.

    Raises:
        ClusterError: neither a file nor a preset; says what is nearest.
    """
    if text is None:
        return Cluster.detect()
    path = Path(text)
    if path.suffix == ".toml" or path.is_file():
        return Cluster.load(path)
    if len(path.parts) > 1:
        raise ClusterError(f"CLUSTER must be a TOML file or a preset, but there is no file {text!r}.")
    return Cluster.preset(text)

"""Checkpoints: written whole or not at all, and independent of the plan that trained.

A checkpoint is a folder ``step-00000042`` with ``weights.safetensors``, ``optimizer.pt`` and ``meta.json``. It is
written under a temporary name, flushed to disk, and renamed last, so a crash at any moment leaves the previous one
complete.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from partita.errors import CheckpointError

FORMAT = 1
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    SafetensorError,
    EOFError,
    pickle.UnpicklingError,
)
KEEP = 2  # complete checkpoints that stay


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, read back. `weights` are by the names of `state_dict`, tied ones under every name."""

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer_state: dict[str, Any]
    extra: dict[str, Any]
    optimizer: str | None = None  # class of the optimizer whose state it is, where the writer said so


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer_state: dict[str, Any],
    extra: dict[str, Any],
    optimizer: str | None = None,
) -> Path:
    """Writes a checkpoint atomically into `folder` and removes all but the last two complete ones.

    Args:
        optimizer: class of the optimizer, which whoever loads its state must have as well.

    Raises:
        CheckpointError: the disk refuses; the previous checkpoints are untouched.
    """
    base = Path(folder)
    target = base / f"step-{step:08d}"  # further ones of the same step: step-00000042.001, ...
    temporary: Path | None = None
    try:
        base.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=base))
        tensors, aliases = _without_aliases(weights)
        save_file(tensors, temporary / "weights.safetensors")
        torch.save({"optimizer": optimizer_state, "extra": extra}, temporary / "optimizer.pt")
        meta = {
            "format": FORMAT,
            "step": step,
            "aliases": aliases,
            "optimizer": optimizer,
            "group_sizes": _group_sizes(optimizer_state),
        }
        (temporary / "meta.json").write_text(json.dumps(meta))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        target = _next(base, target.name)
        temporary.rename(target)
        _flush(base)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint could not be written to {base}: {error}; earlier ones are complete"
        ) from error
    for old in _complete(base)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_checkpoint(
    folder: str | os.PathLike[str],
    *,
    like: Mapping[str, torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Checkpoint:
    """Reads the latest complete checkpoint in `folder` (or `folder` itself, if it is one).

    Args:
        like: names and shapes that the weights must have.
        optimizer: whose class and parameter groups those of the checkpoint must be.

    Raises:
        CheckpointError: there is none, it is corrupt and no earlier one is complete, or it belongs to another model or
            optimizer.
    """
    base = Path(folder)
    paths = [base] if (base / "meta.json").exists() else _complete(base)
    if not paths:
        raise CheckpointError(f"{base} must hold a complete checkpoint, but has none; was anything saved there?")
    problems: list[str] = []
    for path in reversed(paths):
        try:
            found = _read(path)
        except _READ_ERRORS as error:
            problems.append(f"{path.name}: {type(error).__name__}: {error}")
            continue
        if like is not None:
            _check_like(found, like, path)
        if optimizer is not None:
            _check_optimizer(found, optimizer, path)
        return found
    raise CheckpointError(f"no checkpoint in {base} can be read: {'; '.join(problems)}")


def _read(path: Path) -> Checkpoint:
    meta = _mapping(json.loads((path / "meta.json").read_text()), "meta.json")
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']} is not {FORMAT}, which this version reads")
    weights = load_file(path / "weights.safetensors")
    for name, first in _mapping(meta["aliases"], "aliases").items():
        weights[name] = weights[first]
    state = torch.load(path / "optimizer.pt", weights_only=True)  # a checkpoint of a stranger must not run code
    state = _mapping(state, "optimizer.pt")
    optimizer_state, extra = _mapping(state["optimizer"], "optimizer"), _mapping(state["extra"], "extra")
    if meta.get("group_sizes", _group_sizes(optimizer_state)) != _group_sizes(optimizer_state):
        raise ValueError("optimizer.pt has other parameter groups than meta.json")
    return Checkpoint(int(meta["step"]), weights, optimizer_state, extra, meta.get("optimizer"))


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping, but is a {type(value).__name__}")
    return value


def _group_sizes(optimizer_state: Mapping[str, Any]) -> list[int]:
    """Number of parameters in each group of an optimizer's state."""
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def _check_optimizer(found: Checkpoint, optimizer: torch.optim.Optimizer, path: Path) -> None:
    own, kind = _group_sizes(optimizer.state_dict()), type(optimizer).__name__
    theirs = _group_sizes(found.optimizer_state)
    if found.optimizer is not None and found.optimizer != kind:
        raise CheckpointError(
            f"{path} must hold the state of this optimizer ({kind}), but holds that of {found.optimizer}. Train on "
            f"with {found.optimizer}, or load only its weights.safetensors"
        )
    if own != theirs:
        raise CheckpointError(
            f"{path} must hold the state of this optimizer, with {own} parameters in its groups, but has groups of "
            f"{theirs}. Make the same parameter groups as when it was saved"
        )


def _check_like(found: Checkpoint, like: Mapping[str, torch.Tensor], path: Path) -> None:
    missing = sorted(set(like) - set(found.weights))
    surplus = sorted(set(found.weights) - set(like))
    shapes = [name for name in like if name in found.weights and like[name].shape != found.weights[name].shape]
    if missing or surplus or shapes:
        raise CheckpointError(
            f"{path} must belong to this model, but lacks {missing[:3]}, has {surplus[:3]} too many, and differs in "
            f"shape for {shapes[:3]}"
        )


def _without_aliases(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and other names of the same storage -> first name."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, value in weights.items():
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = value.detach().contiguous().clone()
    return tensors, aliases


def _next(base: Path, name: str) -> Path:
    """The name of the next checkpoint of one step. The older one stays until the newer one is complete."""
    last = max((path.name for path in base.glob(f"{name}*")), default="")
    return base / (f"{name}.{int(last.partition('.')[2] or 0) + 1:03d}" if last else name)


def _complete(base: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in base.glob("step-*") if (path / "meta.json").exists())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

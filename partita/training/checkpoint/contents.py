"""What a checkpoint holds of a model and its optimizer: which process writes what, and how it goes back."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partita.errors import CheckpointError
from partita.program.instructions import Box
from partita.training.checkpoint.folder import DamagedError
from partita.training.checkpoint.shards import Chunk

_REST_ERRORS = (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError)
State = dict[str, Any]
Parts = Mapping[str, Mapping[int, Box]]


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """Which processes have what, after a step.

    `owners`: parameter or buffer -> processes with its current value and state; absent: rank 0. `parts`: parameter that
    no process has whole -> process -> the box that it has.
    """

    num_processes: int = 1
    owners: Mapping[str, Sequence[int]] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)

    def writers(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """Parameter or buffer -> the process that writes it, so that all write about the same number of bytes."""
        found: dict[str, int] = {}
        load = [0] * self.num_processes
        for name, value in values.items():
            if name in self.parts:
                found[name] = min(self.parts[name])
                continue
            found[name] = min(self.owners.get(name) or (0,), key=lambda rank: (load[rank], rank))
            load[found[name]] += value.nbytes
        return found


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What one process writes: parts of weights, of the optimizer's state, and what is no tensor."""

    weights: list[Chunk]
    optimizer: list[Chunk]
    rest: State

    def frozen(self) -> Contents:
        """The same with copies of all tensors, which training does not change."""
        return Contents(
            weights=[chunk.frozen() for chunk in self.weights],
            optimizer=[chunk.frozen() for chunk in self.optimizer],
            rest=_copied(self.rest),
        )


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a model's tensors, and of the parameters in each group of its optimizer."""

    weights: Mapping[str, Tensor]  # by first names
    aliases: Mapping[str, str]
    others: State  # what is no tensor in `state_dict`
    groups: list[list[str]]

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> Names:
        weights: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        others: State = {}
        first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                others[name] = value
                continue
            key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
            if value.numel() and key in first:
                aliases[name] = first[key]
            else:
                first[key] = name
                weights[name] = value.detach()
        by_identity = {id(value): name for name, value in model.named_parameters()}
        groups = [[by_identity[id(item)] for item in group["params"]] for group in optimizer.param_groups]
        return cls(weights=weights, aliases=aliases, others=others, groups=groups)


def contents_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Names, ownership: Ownership, rank: int
) -> Contents:
    """What process `rank` writes; all processes together write everything once."""
    writers = ownership.writers({**dict(model.named_parameters()), **names.weights})
    first_name = {id(value): name for name, value in model.named_parameters()}
    by_first: dict[str, str] = {}  # name in `state_dict` -> that of the parameter, which owners are told by
    for name, value in model.state_dict(keep_vars=True).items():
        by_first[name] = first_name.get(id(value), name)
    weights = []
    for name, value in names.weights.items():
        own = by_first[name]
        box = ownership.parts.get(own, {}).get(rank)
        if box is not None:
            weights.append(Chunk.cut(name, value, box))
        elif own not in ownership.parts and writers[own] == rank:
            weights.append(Chunk.whole(name, value))
    chunks, rest = _optimizer_contents(model, optimizer, names, ownership, writers, rank)
    return Contents(weights=weights, optimizer=chunks, rest=rest)


def _optimizer_contents(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Names,
    ownership: Ownership,
    writers: Mapping[str, int],
    rank: int,
) -> tuple[list[Chunk], State]:
    found = optimizer.state_dict()
    if "state" not in found or "param_groups" not in found:  # of a class that keeps it in a way of its own
        return [], {"states": {}, **({"whole": found} if rank == 0 else {})}
    flat = [name for group in names.groups for name in group]
    parameters = dict(model.named_parameters())
    chunks: list[Chunk] = []
    states: dict[str, State] = {}
    others: State = {}
    for index, state in found["state"].items():
        name = flat[index] if isinstance(index, int) and index < len(flat) else None
        if name is None or not isinstance(state, dict):
            others[index] = state
            continue
        box = ownership.parts.get(name, {}).get(rank)
        for key, value in state.items():
            if not _is_plain(value):
                if writers[name] == rank:
                    states.setdefault(name, {})[key] = value
            elif box is not None and value.shape == parameters[name].shape:
                chunks.append(Chunk.cut(f"{name}/{key}", value, box))
            elif writers[name] == rank:
                chunks.append(Chunk.whole(f"{name}/{key}", value))
    rest: State = {"states": states}
    if rank == 0:
        rest["groups"] = [{key: value for key, value in group.items() if key != "params"}
                          for group in found["param_groups"]]  # fmt: skip
        rest["other_states"] = others
        rest["others"] = {key: value for key, value in found.items() if key not in ("state", "param_groups")}
    return chunks, rest


def optimizer_state(tensors: Mapping[str, Tensor], rests: Iterable[State], groups: Sequence[Sequence[str]]) -> State:
    """The state dict of an optimizer, from what all processes wrote, for one whose groups have these names.

    Raises:
        CheckpointError: an entry belongs to no parameter of the optimizer.
    """
    places = {name: index for index, name in enumerate(name for group in groups for name in group)}
    state: dict[Any, Any] = {}
    found: State = {}
    for rest in rests:
        if "whole" in rest:
            whole: State = rest["whole"]
            return whole
        for name, entries in rest["states"].items():
            state.setdefault(places[name], {}).update(entries)
        if "groups" in rest:
            state |= rest["other_states"]
            found |= rest["others"]
            found["param_groups"] = [
                {**group, "params": [places[name] for name in names]}
                for group, names in zip(rest["groups"], groups, strict=True)
            ]
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in places:
            raise CheckpointError(f"the checkpoint must hold states of the optimizer's parameters, but has {name!r}")
        state.setdefault(places[parameter], {})[key] = value
    found["state"] = dict(sorted(state.items(), key=lambda item: (not isinstance(item[0], int), str(item[0]))))
    return found


def plain(value: Any) -> Any:
    """The value with Python's numbers in the place of numpy's, which are not read back."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def read_rest(path: Path) -> State:
    """What is no tensor, from a file.

    Raises:
        DamagedError: it cannot be read without running its code, or is no such file.
    """
    try:
        found = torch.load(path, weights_only=True)  # a checkpoint of a stranger must not run code
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{path.name}: states must consist of tensors, numbers, texts, lists and mappings, since nothing else is "
            f"read back without running its code, but: {error}"
        ) from error
    except _REST_ERRORS as error:
        raise DamagedError(f"{path.name}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path.name} must be a mapping, but is a {type(found).__name__}")
    return found


def random_state() -> State:
    """The states of the generators of torch, Python and numpy, and of the GPUs in use."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": (version, words, gauss),
        "numpy": (str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached),
    }


def set_random_state(state: State) -> None:
    """Goes on from a state of the generators."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(tuple(state["python"]))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def _is_plain(value: object) -> bool:
    """Whether a value can be in a file of tensors."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_complex()
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value

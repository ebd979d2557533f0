"""Reads checkpoints: the latest that is as it was written, under any plan and on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from partita.errors import CheckpointError
from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.contents import Names, State, optimizer_state, read_rest, set_random_state
from partita.training.checkpoint.folder import DamagedError, Meta
from partita.training.checkpoint.shards import Shards
from partita.training.job import Team


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was read besides weights and optimizer.

    `sync`: states of the synchronisation method, by key, that this process wrote, if there were as many processes and
    all see the checkpoint; `has_sync`: whether there are any; `method` is the method's text. `also`: states of what
    else was saved, by name.
    """

    path: str
    step: int
    num_bytes: int
    method: str
    has_sync: bool
    sync: dict[str, dict[str, Tensor]]
    also: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A checkpoint, as one process needs it."""

    weights: dict[str, Tensor]
    optimizer: State
    rest: State  # of rank 0
    random: State
    sync: dict[str, dict[str, Tensor]]


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, team: Team | None = None, *, own: bool = False
) -> Loaded:
    """Brings the latest checkpoint in `folder` (or `folder` itself, if it is one) that is as it was written into the
    model, the optimizer and the generators of random numbers. All processes of the team call it; those that do not see
    the folder receive what rank 0 reads. `own`: each has a folder of its own, with equal content.

    Raises:
        CheckpointError: there is none, all are damaged, or the latest belongs to another model or optimizer. Nothing
            was changed.
    """
    team = team or Team()
    names = Names.of(model, optimizer)
    path, meta, is_shared = _latest(folder, team, own)
    error = ""
    try:
        _check_belongs(path, meta, names, optimizer)
    except CheckpointError as found:
        error = str(found)
    for text in team.gather(error, "whether the checkpoint belongs to the model"):
        if text:
            raise CheckpointError(text)
    read = _read_together(path, meta, names, team, is_shared)
    also = _restore(read, names, model, optimizer, team, is_shared)
    return Loaded(
        path=str(path),
        step=meta.step,
        num_bytes=sum(facts.num_bytes for facts in meta.files.values()),
        method=meta.sync,
        has_sync=bool(_files(path, meta, "sync/")),
        sync=read.sync if read is not None and is_shared else {},
        also=also,
    )


def latest_step(folder: Path, team: Team) -> int:
    """The step of the latest checkpoint that rank 0 sees, -1 if there is none; the same on all processes."""
    found = folders.candidates(folder)[:1]
    return int(team.from_first(folders.order(found[0])[0] if found else -1, "whether there is a checkpoint"))


# Which -----------------------------------------------------------------------------------------------------------


def _latest(folder: Path, team: Team, own: bool = False) -> tuple[Path, Meta, bool]:
    """The latest checkpoint that is not damaged, and whether all processes see it."""
    found = [str(path.resolve()) for path in folders.candidates(folder)] if team.rank == 0 else []
    paths = [Path(text) for text in team.from_first(found, "the checkpoints in a folder")]
    if own:
        paths = [folder / path.name for path in paths]
    if not paths:
        raise CheckpointError(f"{folder} must hold a complete checkpoint, but has none; was anything saved there?")
    problems: list[str] = []
    for path in paths:
        outcome = _examine(path, team)
        if not isinstance(outcome, str):
            return path, *outcome
        problems.append(f"{path.name}: {outcome}")
    raise CheckpointError(f"no checkpoint in {folder} can be read: {'; '.join(problems)}")


def _examine(path: Path, team: Team) -> tuple[Meta, bool] | str:
    """What the checkpoint says of itself, and whether all processes see it; or why it cannot be read."""
    meta, problem = None, ""
    try:
        meta = folders.read_meta(path)
    except DamagedError as error:
        problem = str(error)
    own = "" if meta is None else msgspec.json.encode(meta).decode()
    told = team.gather((own, problem), "what processes see of a checkpoint")
    text, problem = told[0]
    if not text:
        return str(problem)
    first = msgspec.json.decode(text, type=Meta)
    is_shared = all(other == text for other, _ in told)
    names = sorted(first.files)
    mine = names[team.rank :: team.num_processes] if is_shared else names if team.rank == 0 else []
    problem = ""
    try:
        folders.verify(path, first, mine)
    except DamagedError as error:
        problem = str(error)
    problems = [text for text in team.gather(problem, "checksums of a checkpoint") if text]
    return problems[0] if problems else (first, is_shared)


def _check_belongs(path: Path, meta: Meta, names: Names, optimizer: torch.optim.Optimizer) -> None:
    """Raises CheckpointError unless the optimizer is the one whose state is there."""
    kind = type(optimizer).__name__
    if meta.optimizer != kind:
        raise CheckpointError(
            f"{path} must hold the state of this optimizer ({kind}), but holds that of {meta.optimizer}. Train on "
            f"with {meta.optimizer}, or load only its weights"
        )
    if [sorted(group) for group in meta.groups] != [sorted(group) for group in names.groups]:
        sizes, own = [[len(group) for group in groups] for groups in (meta.groups, names.groups)]
        raise CheckpointError(
            f"{path} must hold the state of this optimizer, with {own} parameters in its groups, but has groups of "
            f"{sizes}, or of other names. Make the same parameter groups as when it was saved"
        )


def _check_like(path: Path, shapes: Mapping[str, tuple[int, ...]], names: Names) -> None:
    own = {name: tuple(value.shape) for name, value in names.weights.items()}
    own |= {alias: own[first] for alias, first in names.aliases.items()}
    missing, surplus = sorted(set(own) - set(shapes)), sorted(set(shapes) - set(own))
    differing = [name for name in own if name in shapes and own[name] != shapes[name]]
    if missing or surplus or differing:
        raise CheckpointError(
            f"{path} must belong to this model, but lacks {missing[:3]}, has {surplus[:3]} too many, and differs in "
            f"shape for {differing[:3]}"
        )


# Reading ---------------------------------------------------------------------------------------------------------


def _read_together(path: Path, meta: Meta, names: Names, team: Team, is_shared: bool) -> _Read | None:
    """What this process reads, once all have read theirs; None where rank 0 reads for all."""
    read, error = None, ""
    if is_shared or team.rank == 0:
        try:
            read = _read(path, meta, names, team.rank, team.num_processes)
        except (DamagedError, CheckpointError) as found:
            error = str(found)
    for text in team.gather(error, "the reading of a checkpoint"):
        if text:
            raise CheckpointError(text)
    return read


def _read(path: Path, meta: Meta, names: Names, rank: int, num_processes: int) -> _Read:
    weights = Shards(_files(path, meta, "weights"))
    shapes = {**weights.shapes, **{alias: weights.shapes[first] for alias, first in meta.aliases.items()}}
    _check_like(path, shapes, names)
    values = {name: weights.read(meta.aliases.get(name, name)) for name in names.weights}
    rests = [read_rest(file) for file in _files(path, meta, "rest")]
    own = rank % meta.num_replicas if meta.num_replicas else 0
    where = f"replica-{own:05d}/" if meta.num_replicas else "optimizer/"
    tensors = Shards(_files(path, meta, where))
    state = optimizer_state(
        {name: tensors.read(name) for name in tensors.shapes},
        [rests[own]] if meta.num_replicas else rests,
        names.groups,
    )
    same = num_processes == meta.num_processes
    return _Read(
        weights=values,
        optimizer=state,
        rest=rests[0],
        random=rests[own]["random"],
        sync=_read_sync(path, meta, rank) if same else {},
    )


def _files(path: Path, meta: Meta, start: str) -> list[Path]:
    """Files whose name within the checkpoint starts so, in the order of ranks."""
    return [path / name for name in sorted(meta.files) if name.startswith(start)]


def _read_sync(path: Path, meta: Meta, rank: int) -> dict[str, dict[str, Tensor]]:
    """The states that the process of this rank wrote."""
    suffix = f"-{rank + 1:05d}-of-{meta.num_processes:05d}" if meta.num_processes > 1 else ""
    found: dict[str, dict[str, Tensor]] = {}
    shards = Shards(_files(path, meta, f"sync/sync{suffix}.safetensors"))
    for name in shards.shapes:
        key, _, entry = name.rpartition("/")
        found.setdefault(key, {})[entry] = shards.read(name)
    return found


# Putting it in place ---------------------------------------------------------------------------------------------


def _restore(
    read: _Read | None, names: Names, model: nn.Module, optimizer: torch.optim.Optimizer, team: Team, is_shared: bool
) -> dict[str, Any]:
    """Puts everything in place; gives the states of what else was saved."""
    told: tuple[State, State, State] = ({}, {}, {})
    if read is not None:
        told = read.optimizer, read.random, {key: read.rest.get(key, {}) for key in ("also", "others_of_model")}
        with torch.no_grad():
            for name, value in names.weights.items():
                value.copy_(read.weights[name])
    if not is_shared:
        team.spread(names.weights.values())
        told = team.from_first(told, "the state of the optimizer")
    state, random, others = told
    if others["others_of_model"]:
        model.load_state_dict({**model.state_dict(), **others["others_of_model"]})
    optimizer.load_state_dict(state)
    set_random_state(random)
    found: dict[str, Any] = others["also"]
    return found


def weights_of(folder: Path | str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The weights of the latest checkpoint in a folder that is as it was written, whole, by the names of `state_dict`.

    Args:
        names: only these; None: all.

    Raises:
        CheckpointError: there is none, or all are damaged.

    Example:
        >>> model.load_state_dict(weights_of("checkpoints/"))
    """
    path, meta, _ = _latest(Path(folder), Team())
    try:
        shards = Shards(_files(path, meta, "weights"))
        wanted = [*shards.shapes, *meta.aliases] if names is None else list(names)
        return {name: shards.read(meta.aliases.get(name, name)) for name in wanted}
    except DamagedError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error

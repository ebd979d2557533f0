"""Brings weights, buffers and optimizer state together on every process, after which each has all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from partita.errors import InputError
from partita.program.instructions import Box
from partita.training.checkpoint.contents import Ownership
from partita.training.graph_runner import GraphRunner, named_state, owners_of
from partita.training.job import Team
from partita.training.optimizers import cut_state, paste_state


def collect_all(team: Team, model: nn.Module, optimizer: torch.optim.Optimizer, runner: object) -> None:
    """Makes `model` and `optimizer` of every process current; `runner` has brought in what this process has."""
    parameters, buffers = named_state(model)
    if not isinstance(runner, GraphRunner):
        team.spread([*parameters.values(), *buffers.values()])
        optimizer.load_state_dict(team.from_first(optimizer.state_dict()))
        return
    owners = owners_of(runner.programs)
    parts = _parts(runner)
    for name, value in parameters.items():
        if name in parts:
            for source, box in parts[name].items():
                team.spread([box.of(value.detach())], source=source)
        else:
            team.spread([value], source=owners.get(name, (0,))[0])
    for name, buffer in buffers.items():
        team.spread([buffer], source=runner.buffer_owner(name))
    whole = {name: found for name, found in owners.items() if name not in parts}
    _collect_state(team, optimizer, parameters, whole)
    _collect_parts_of_state(team, optimizer, parameters, parts)


def ownership_of(runner: object, num_processes: int) -> Ownership:
    """Which processes have what, once each has brought in what it has; by the runner of the last step."""
    if not isinstance(runner, GraphRunner):
        return Ownership(num_processes=num_processes)  # rank 0 computes
    buffers = {name: (runner.buffer_owner(name),) for name in runner.buffers}
    owners = {**buffers, **owners_of(runner.programs)}
    return Ownership(num_processes=num_processes, owners=owners, parts=_parts(runner))


def _parts(runner: GraphRunner) -> dict[str, dict[int, Box]]:
    """Parameter -> process -> the box that it brings, each box once, of the parameters that no process has whole."""
    found: dict[str, dict[int, Box]] = {}
    for process, held in sorted(runner.users_parts().items()):
        for name, box in held.items():
            by_process = found.setdefault(name, {})
            if box not in by_process.values():
                by_process[process] = box
    return found


def sources_for_first(runner: object, names: Iterable[str]) -> dict[str, dict[int, Box | None]]:
    """Of these parameters, those of which rank 0 has not all: the processes that have it, with their parts (None: all).
    Gradients are where weights are."""
    if not isinstance(runner, GraphRunner):
        return {}  # rank 0 computes
    parts, owners = _parts(runner), owners_of(runner.programs)
    found: dict[str, dict[int, Box | None]] = {}
    for name in names:
        if name in parts:
            found[name] = dict(parts[name])
        elif 0 not in owners.get(name, (0,)):
            found[name] = {owners[name][0]: None}
    return found


def _collect_state(
    team: Team,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    owners: Mapping[str, tuple[int, ...]],
) -> None:
    state = optimizer.state
    for source in range(team.num_processes):
        mine = [name for name, found in owners.items() if found[0] == source]
        theirs = {name: state.get(parameters[name], {}) for name in mine} if team.rank == source else None
        if mine:
            found_state = team.from_first(theirs, "collecting the optimizer's state", source=source)
            if team.rank != source and found_state is not None:
                for name, value in found_state.items():
                    if team.rank not in owners[name]:
                        state[parameters[name]] = value


def _collect_parts_of_state(
    team: Team,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Mapping[int, Box]],
) -> None:
    for source in sorted({process for by_process in parts.values() for process in by_process}):
        mine = {name: by_process[source] for name, by_process in parts.items() if source in by_process}
        theirs: dict[str, dict[str, Any]] | None = None
        if team.rank == source:
            theirs = {name: cut_state(optimizer.state.get(parameters[name], {}), parameters[name], box)
                      for name, box in mine.items()}  # fmt: skip
        found = team.from_first(theirs, "collecting parts of the optimizer's state", source=source)
        if team.rank != source:
            for name, part in found.items():
                if part:
                    paste_state(optimizer.state[parameters[name]], parameters[name], mine[name], part)


def copy_state(values: Mapping[str, torch.Tensor], model: nn.Module, what: str) -> None:
    """Loads values by the names of `state_dict` into a module, which must have the same ones."""
    own = model.state_dict()
    if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in own.items()}:
        differing = sorted(set(values) ^ set(own))[:5]
        raise InputError(
            f"{what} needs a module of the same structure, but names or shapes differ (e.g. {differing or 'shapes'})"
        )
    model.load_state_dict(values)

"""`search`: the network and its training settings that score best at a deadline, found and trained on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from partita.arguments import check_count, check_number, path_of, told
from partita.cluster import Cluster
from partita.cluster.job import current_job
from partita.errors import InputError
from partita.search.deadline import instant_of
from partita.search.resources import resources as resources_of
from partita.search.task import Direction, Objective, Task, check_task, default_loss, suggested_adamw
from partita.training.connecting import Connections

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from partita.search.result import SearchResult
    from partita.search.trials import SearchTrial

FINAL_SHARE = 0.4


def search(
    build: Callable[[SearchTrial], nn.Module] | nn.Module,
    data: Any,
    *,
    deadline: object,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    score: Callable[[nn.Module, Any], float] | None = None,
    direction: Direction | None = None,
    optimizer: Callable[[SearchTrial, nn.Module], torch.optim.Optimizer] | None = None,
    batch_size: int | Callable[[SearchTrial], int] | None = None,
    connections: Callable[[SearchTrial], Connections | None] | None = None,
    objectives: Sequence[Objective] = ("score",),
    max_params: int | None = None,
    max_memory: int | None = None,
    cluster: Cluster | None = None,
    resources: str | None = None,
    folder: str | os.PathLike[str] = "search",
    storage: str | BaseStorage | None = None,
    study: str | None = None,
    max_trials: int | None = None,
    side_by_side: int | None = None,
    final_share: float = FINAL_SHARE,
    retries: int = 1,
    seed: int = 0,
    listener: Callable[[str], None] | None = None,
) -> SearchResult:
    """Finds the network and training settings that score best at a deadline, trains them, and returns the network
    before it. Called again after a crash, it goes on with the same deadline; once it has delivered, it returns the same
    result.

    Every candidate trains in a process of its own, which imports the functions given here: they must be at the top
    level of a module, and a script must call this under ``if __name__ == "__main__":``. Needs ``pip install
    partita[search]``.

    Args:
        build: ``build(trial)`` -> module, of values that it asks for: ``trial.suggest_int("width", 16, 256,
            log=True)``, `suggest_float` and `suggest_categorical`, as of Optuna. Or a module: then networks around it
            are searched, with other widths, other numbers of equal blocks, and maybe connections that are learnt
            (`partita.search.around`).
        data: (training part, judged part), or a function that returns them. A part is a tuple, list or dictionary of
            tensors with equally many rows, a `Dataset`, a `DataLoader`, or another iterable of batches.
        deadline: seconds from now, "20m", "1h30m", a timedelta, or a datetime.
        loss_fn: ``loss_fn(model, batch)`` -> scalar tensor. Default, of batches (inputs, targets): cross entropy for
            whole targets, else mean squared error.
        score: ``score(model, judged part)`` -> number; the model is in evaluation mode. Default: the share of right
            classes where the default loss is a cross entropy, else the mean loss.
        direction: whether to "maximize" (the default) or "minimize" a score of your own.
        optimizer: ``optimizer(trial, model)``; default: AdamW with a suggested "learning_rate". Its rate is constant at
            first, and goes to zero in the last part of the final training.
        batch_size: rows of a batch, or ``batch_size(trial)``; default: suggested, a power of two from 16 to 512. Where
            the training part has batches of its own, these are taken.
        connections: ``connections(trial)`` -> a method of `partita.connections`, or None.
        objectives: what proposals aim at: "score", and maybe "parameters" and "step_time" (then NSGA-II instead of
            TPE). The network that is delivered is the one that scores best in any case.
        max_params: candidates with more elements of parameters are not trained.
        max_memory: nor those whose step is predicted to need more bytes; default: a trial's share of the machine's.
        cluster: the cores to use, a `Cluster` of this machine alone; default: all that this process may use.
        resources: what the network is searched for, if not for these cores, e.g. "2 machines at 100 Mbit/s": candidates
            train here, and are judged by how far they would get there, under the plan that is predicted to be best. The
            one that is delivered is trained here.
        folder: of the study, checkpoints and results; what it has is continued.
        storage: where the study is: a database's URL or ``grpc://host:port``; default: a file in the folder. Searches
            on several machines that share one learn from each other's trials.
        study: its name there; default: that of the folder.
        max_trials: so many candidates at most.
        side_by_side: so many trials at a time; default: one a core at first, fewer and wider ones towards the end; on a
            machine with GPUs one.
        final_share: of the time, for the final training.
        retries: so often a candidate is tried again whose process died before it had a checkpoint.
        seed: of proposals and of training.
        listener: is called with a line of text about whatever happens.

    Raises:
        InputError: something given cannot be used; says what must hold and what to change.
        SearchError: no candidate could be trained, or another search works in the folder.

    Example:
        >>> result = partita.search(build, data, deadline="20m")
        >>> print(result.explain())
    """
    task = Task(
        build=build,
        data=data,
        loss_fn=default_loss if loss_fn is None else loss_fn,
        score=score,
        direction=direction,
        optimizer=suggested_adamw if optimizer is None else optimizer,
        batch_size=batch_size,
        connections=connections,
    )
    check_task(task)
    at_s = instant_of(deadline, now_s=time.time())
    _check_objectives(objectives)
    _check_numbers(max_params, max_memory, max_trials, side_by_side, final_share, retries, seed)
    where = _cluster(cluster)
    path = path_of(folder, "folder")
    try:
        from partita.search.session import Request, run
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("optuna"):
            raise
        raise InputError("partita.search needs Optuna: pip install 'partita[search]'") from error
    return run(
        Request(
            task=task,
            deadline_s=at_s,
            objectives=tuple(objectives),
            max_params=max_params,
            max_memory_bytes=max_memory,
            cluster=where,
            resources=resources,
            target=None if resources is None else _target(resources, where),
            folder=Path(path),
            storage=storage,
            study=study,
            max_trials=max_trials,
            side_by_side=side_by_side,
            final_share=final_share,
            retries=retries,
            seed=seed,
            tell=listener or _silent,
        )
    )


def _silent(line: str) -> None:
    pass


def _check_objectives(objectives: object) -> None:
    known = get_args(Objective)
    given = list(objectives) if isinstance(objectives, (tuple, list)) else []
    if not given or given[0] != "score" or len(set(given)) != len(given) or not set(given) <= set(known):
        raise InputError(
            f'objectives must be a sequence that begins with "score", of {", ".join(map(repr, known))}, but got '
            f"{given or told(objectives)}"
        )


def _check_numbers(
    max_params: int | None,
    max_memory: int | None,
    max_trials: int | None,
    side_by_side: int | None,
    final_share: float,
    retries: int,
    seed: int,
) -> None:
    counts = {
        "max_params": max_params,
        "max_memory": max_memory,
        "max_trials": max_trials,
        "side_by_side": side_by_side,
    }
    for name, value in counts.items():
        if value is not None:
            check_count(value, name)
    check_number(final_share, "final_share", above=0, below=1)
    check_number(retries, "retries", least=0, whole=True)
    check_number(seed, "seed", least=0, whole=True)


def _target(text: object, here: Cluster) -> Cluster:
    """The one cluster that is meant."""
    if not isinstance(text, str):
        raise InputError(f'resources must be a text such as "2 machines at 100 Mbit/s", but got {told(text)}')
    found = resources_of(text, here)
    if len(found) != 1:
        raise InputError(
            f"a search is for one kind of resources, but got {text!r}; partita.search.what_if compares more"
        )
    return next(iter(found.values()))


def _cluster(cluster: Cluster | None) -> Cluster:
    """The cores of this machine that may be used."""
    job = current_job()
    if job is not None and job.world_size > 1:
        raise InputError(
            f"partita.search must be called by one process, which starts the others itself, but this is one of "
            f"{job.world_size} of a job. Start the script without a launcher; on several machines, start a search "
            "on each of them with one storage"
        )
    where = Cluster.detect() if cluster is None else cluster
    if not isinstance(where, Cluster) or not where.is_here or len(where.processes) != 1:
        raise InputError(
            "cluster must be the cores of this machine that are to be used: a Cluster of one process that is_here, "
            f"made from partita.Cluster.detect(), but got {told(cluster)}"
        )
    return where

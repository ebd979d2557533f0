"""One call of `partita.search`: opens or continues a study, runs it, and hands over the result. Needs Optuna."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from partita.cluster import Cluster
from partita.errors import InputError
from partita.search.candidates import Aims
from partita.search.coordinator import Coordinator, Settings
from partita.search.course import Course
from partita.search.deadline import Budget
from partita.search.delivery import FACTS, Delivered, deliver
from partita.search.pricing import Limits
from partita.search.processes import Server, refuse_nested
from partita.search.result import SearchResult
from partita.search.study import Study, let_go, lock, open_storage, owner_of
from partita.search.task import Task, bound_of, settled

MEMORY_SHARE = 0.8  # of the machine's, for trials


@dataclass(frozen=True, kw_only=True)
class Request:
    """The checked arguments of `partita.search`."""

    task: Task
    deadline_s: float
    objectives: tuple[str, ...]
    max_params: int | None
    max_memory_bytes: int | None
    cluster: Cluster
    resources: str | None
    target: Cluster | None
    folder: Path
    storage: Any
    study: str | None
    max_trials: int | None
    side_by_side: int | None
    final_share: float
    retries: int
    seed: int
    tell: Callable[[str], None]


def run(request: Request) -> SearchResult:
    """Runs a search, or what is left of it."""
    refuse_nested()
    start_s, folder = time.time(), request.folder.resolve()
    with lock(folder):
        modules = _modules(request.task)
        is_over = (folder / "best" / FACTS).exists()
        server = None if is_over else Server(modules)  # it imports while the study is opened
        importlib.import_module("optuna.importance")  # with scikit-learn: a second, which the deadline has not
        task = settled(request.task)
        aims = Aims(objectives=request.objectives, maximize=task.direction == "maximize", bound=bound_of(task))
        name = request.study or folder.name
        storage = open_storage(request.storage, folder)
        try:
            study = Study(
                storage,
                name,
                owner=owner_of(folder),
                aims=aims,
                seed=request.seed,
                is_alone=request.storage is None,
            )
            budget = _budget(study, request, task, start_s)
            told = study.read("delivered")
            if told is None:
                candidates, delivered = _searched(study, request, task, aims, budget, server or Server(modules))
            else:
                candidates, _ = study.recover()
                delivered = Delivered(**told)
        finally:
            let_go(storage)
        return SearchResult(
            best=candidates[delivered.number],
            score=delivered.score,
            trials=tuple(candidates[number] for number in sorted(candidates)),
            weights=Path(delivered.weights),
            folder=folder,
            budget=budget,
            delivered_s=delivered.at_s,
            aims=aims,
            task=task,
            study=study.optuna,
        )


def _searched(
    study: Study, request: Request, task: Task, aims: Aims, budget: Budget, server: Server
) -> tuple[dict[int, Any], Delivered]:
    folder = request.folder.resolve()
    for left_behind in folder.glob("task-*.pt"):  # by a search that was killed; the folder is this one's alone
        left_behind.unlink()
    task_file = folder / f"task-{os.getpid()}.pt"
    torch.save(task, task_file)
    machine = request.cluster.machines[request.cluster.processes[0].machine]
    side_by_side = request.side_by_side or (1 if machine.gpus else None)  # trials would share the GPU's memory
    slots = side_by_side or request.cluster.num_cores
    memory_bytes = request.cluster.processes[0].memory_bytes or machine.memory_bytes
    settings = Settings(
        task_file=task_file,
        everywhere=request.cluster,
        target=request.target,
        limits=Limits(
            max_params=request.max_params,
            max_memory_bytes=request.max_memory_bytes or int(MEMORY_SHARE * memory_bytes / slots),
            last_s=budget.last_s,
        ),
        seed=request.seed,
        num_slots=side_by_side,
    )
    course = Course(study, aims, budget, folder, max_trials=request.max_trials, retries=request.retries)
    try:
        best = Coordinator(course, settings, server, request.tell).run()
        delivered = deliver(folder, best, time.time())
        study.write("delivered", dataclasses.asdict(delivered))
    finally:
        task_file.unlink(missing_ok=True)
    return course.candidates, delivered


def _budget(study: Study, request: Request, task: Task, start_s: float) -> Budget:
    """The time of this search: what it was when it began, if it goes on.

    Raises:
        InputError: the folder holds another search.
    """
    asked = {
        "name": task.name,
        "objectives": list(request.objectives),
        "direction": task.direction,
        "resources": request.resources,
        "start_s": start_s,
        "deadline_s": request.deadline_s,
        "final_share": request.final_share,
    }
    known = study.read("search")
    if known is None:
        study.write("search", asked)
        known = asked
    for field in ("name", "objectives", "direction", "resources"):
        if known[field] != asked[field]:
            raise InputError(
                f"a search goes on in its folder, so {field} must be {known[field]!r} as it was in "
                f"{str(request.folder)!r}, but got {asked[field]!r}; choose another folder for another search"
            )
    return Budget(start_s=known["start_s"], deadline_s=known["deadline_s"], final_share=known["final_share"])


def _modules(task: Task) -> list[str]:
    """Where the user's functions are, so that the server of trials imports it once."""
    functions = [task.build, task.data, task.loss_fn, task.score, task.optimizer, task.batch_size, task.connections]
    found = {module.__name__ for item in functions if callable(item) and (module := inspect.getmodule(item))}
    return sorted(found - {"__main__"})

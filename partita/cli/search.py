"""`partita search SCRIPT`: the network that scores best at a deadline, searched and trained."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import tyro

from partita.cli.attend import CAN_ATTEND, attend
from partita.cli.output import print_json
from partita.errors import InputError

if TYPE_CHECKING:
    from partita.search.result import SearchResult

REQUIRED = ("build", "data")
OPTIONAL = (
    "loss_fn", "score", "direction", "optimizer", "batch_size", "connections", "objectives", "final_share", "retries",
)  # fmt: skip
GRACE_S = 60.0  # after the deadline, in which a search that was killed is still started again, to deliver


def search(
    script: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")],
    /,
    *,
    deadline: Annotated[str | None, tyro.conf.arg(metavar="TIME")] = None,
    folder: str = "search",
    resources: Annotated[str | None, tyro.conf.arg(metavar="RESOURCES")] = None,
    what_if: Annotated[str | None, tyro.conf.arg(metavar="RESOURCES")] = None,
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    study: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    max_params: int | None = None,
    max_memory: int | None = None,
    max_trials: int | None = None,
    side_by_side: int | None = None,
    seed: int = 0,
    report: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    export: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None,
    unattended: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Search for the network and training settings that score best at a deadline, and train them until then.

    SCRIPT defines `build` and `data`, and maybe loss_fn, score, direction, optimizer, batch_size, connections,
    objectives, final_share and retries, which are the arguments of `partita.search` of these names. The same command
    goes on after a crash, and with a folder whose search is over tells its result.

    Args:
        script: the Python file.
        deadline: from now: 90s, 20m, 1h30m. Not needed where the folder has a search.
        folder: of the study, checkpoints and results.
        resources: what the network is searched for, if not for these cores: "2 machines at 100 Mbit/s". It is trained
            here.
        what_if: how the best configuration changes with resources: "1,2,4 machines", "2 machines at 100 Mbit/s" or
            "1,2 cores".
        storage: URL of the study's database, or grpc://host:port; default: a file in the folder.
        study: its name there; default: that of the folder.
        max_params: candidates with more elements of parameters are not trained.
        max_memory: nor those whose step is predicted to need more bytes.
        max_trials: so many candidates at most.
        side_by_side: so many trials at a time.
        seed: of proposals and of training.
        report: write a page (HTML) about the search here: Pareto fronts, learning curves, what mattered.
        export: write the network as plain files that load without partita.
        unattended: without the process that goes on with the search when it is killed.
        quiet: no lines about what happens.
        json: print the result as JSON; all else goes to standard error.
    """
    path = Path(script)
    if not path.is_file():
        raise InputError(f"SCRIPT must be a Python file, but there is no file {script!r} in {str(Path.cwd())!r}.")
    import partita

    if CAN_ATTEND and not unattended:
        deadline = _attended(deadline)

    result = partita.search(
        **_names_of(path),
        deadline=_time(deadline, Path(folder)),
        folder=folder,
        resources=resources,
        storage=storage,
        study=study,
        max_params=max_params,
        max_memory=max_memory,
        max_trials=max_trials,
        side_by_side=side_by_side,
        seed=seed,
        listener=None if quiet else _listener(),
    )
    if export is not None:
        result.export(export)
    if report is not None:
        from partita.report import write_search_page

        write_search_page(result, report)
    return _show(result, what_if, json)


def _show(result: SearchResult, what_if: str | None, json: bool) -> int:
    told = None
    if what_if is not None:
        from partita.cluster import Cluster
        from partita.search.resources import resources
        from partita.search.what_if import what_if as compare

        told = compare(result, resources(what_if, Cluster.detect()))
    if json:
        print_json(result.as_dict() | ({} if told is None else {"what_if": told}))
    else:
        print(result.explain() + ("" if told is None else f"\n\n{told}"))
    return 0


def _time(deadline: str | None, folder: Path) -> str:
    if deadline is not None:
        return deadline
    if (folder / "owner").exists():
        return "1s"  # the search has a deadline of its own already
    raise InputError(
        f"--deadline must be given, e.g. --deadline 20m, since {str(folder)!r} has no search to go on with."
    )


def _listener() -> Callable[[str], None]:
    start_s = time.monotonic()
    return lambda line: print(f"{time.monotonic() - start_s:8.1f} s  {line}", file=sys.stderr, flush=True)


def _names_of(path: Path) -> dict[str, Any]:
    """What the script defines of the arguments of `partita.search`. It is imported under its own name, so that the
    processes of trials can import it as well.

    Raises:
        InputError: it lacks one, or another module has its name.
    """
    sys.path.insert(0, str(path.resolve().parent))
    module: ModuleType = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise InputError(
            f"SCRIPT must be importable by its name, but {path.stem!r} is the module {module.__file__!r}; rename it."
        )
    missing = [name for name in REQUIRED if not hasattr(module, name)]
    if missing:
        raise InputError(f"{path} must define {' and '.join(REQUIRED)}, but has no {' and no '.join(missing)}.")
    return {name: getattr(module, name) for name in (*REQUIRED, *OPTIONAL) if hasattr(module, name)}


def _attended(deadline: str | None) -> str | None:
    """Goes on in a process that another one attends to, which goes on in a new one whenever it is killed; the deadline
    as an instant, so that it is the same for all of them."""
    from partita.search.deadline import instant_of

    with contextlib.suppress(ModuleNotFoundError):  # what is missing is told later
        importlib.import_module("partita.search.session")  # it takes seconds, which there may not be after a crash

    until_s = time.time()
    if deadline is not None:
        until_s = instant_of(deadline, now_s=psutil.Process().create_time())  # imports may have taken seconds
        deadline = f"@{until_s:.3f}"
    attend(until_s + GRACE_S)
    return deadline

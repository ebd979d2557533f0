"""Storages that several machines share: the same study from two folders, as two machines see it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

import partita
from benchmarks.processes import free_port
from partita.search import study as module
from partita.search.candidates import Aims, Candidate
from partita.search.curves import Point
from partita.search.messages import Suggest
from partita.search.study import Study, let_go, open_storage, owner_of

AIMS = Aims(objectives=("score",), maximize=True)
PROXY = """
import sys, optuna
optuna.storages.run_grpc_proxy_server(optuna.storages.RDBStorage(sys.argv[1]), host="localhost", port=int(sys.argv[2]))
"""
PATIENCE_S = 60.0


def postgresql(_: Path) -> Iterator[str]:
    """A server of its own, which Debian's package makes; it refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs PostgreSQL's server (Debian's package postgresql) and psycopg")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    who = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if root else []
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="postgresql-") as place:  # not pytest's folder, which is root's alone
        if root:
            shutil.chown(place, "postgres", "postgres")

        def run(program: str, *options: str) -> None:
            command = [*who, str(programs[-1] / program), "-D", f"{place}/data", *options]
            subprocess.run(command, check=True, cwd=place, stdout=subprocess.DEVNULL)

        run("initdb", "--auth=trust", "--username=postgres")
        run("pg_ctl", "-w", "-l", f"{place}/log", "-o", f"-p {port} -c listen_addresses=localhost -k {place}", "start")
        try:
            yield f"postgresql://postgres@localhost:{port}/postgres"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


def grpc(folder: Path) -> Iterator[str]:
    """Optuna's proxy of a database."""
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("needs grpcio and protobuf")
    port = free_port()
    url = f"sqlite:///{folder / 'behind.db'}"
    with subprocess.Popen([sys.executable, "-c", PROXY, url, str(port)]) as proxy:
        try:
            yield f"grpc://localhost:{port}"
        finally:
            proxy.kill()


def sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder / 'shared.db'}"


@pytest.fixture(scope="module", params=[sqlite, postgresql, grpc], ids=lambda make: make.__name__)
def url(request, tmp_path_factory) -> Iterator[str]:
    made = request.param(tmp_path_factory.mktemp(request.param.__name__))
    found = next(made)
    end_s = time.monotonic() + PATIENCE_S
    while True:  # the proxy needs a moment
        try:
            storage = open_storage(found, Path())
            storage.get_all_studies()
            let_go(storage)
            break
        except Exception:
            assert time.monotonic() < end_s, f"{found} did not answer"
            time.sleep(0.2)
    yield found
    made.close()


@pytest.fixture
def closing() -> Iterator[list[BaseStorage]]:
    """Storages whose connections are closed in the end."""
    storages: list[BaseStorage] = []
    yield storages
    for storage in storages:
        let_go(storage)


@pytest.fixture
def opened(url: str, tmp_path: Path, closing: list[BaseStorage]) -> Callable[[str, str], Study]:
    """The study of a name, as the search in a folder sees it."""

    def open_it(folder: str, name: str) -> Study:
        (tmp_path / folder).mkdir(exist_ok=True)
        closing.append(open_storage(url, tmp_path / folder))
        return Study(closing[-1], name, owner=owner_of(tmp_path / folder), aims=AIMS, seed=0)

    return open_it


def proposed(study: Study) -> Candidate:
    number = study.propose()
    study.suggest(number, Suggest(kind="int", name="width", arguments=(4, 64), options={"log": True}))
    return Candidate(number=number, params=study.params(number))


def test_machines_see_each_others_trials_and_keep_their_own_candidates(opened) -> None:
    here, there = (opened(name, "shared") for name in ("here", "there"))
    first, second = proposed(here), proposed(there)
    assert {first.number, second.number} == {0, 1}
    done = first.with_point(Point(100, 1.0, 0.5), state="waiting")
    here.finish(first.number, done, score=0.5)
    here.write("search", {"deadline_s": 5.0})
    again = opened("here", "shared")
    candidates, interrupted = again.recover()
    assert candidates == {first.number: done} and interrupted == []
    assert again.read("search") == {"deadline_s": 5.0} and there.read("search") is None
    seen = there.optuna.get_trials()
    assert [trial.state for trial in seen] == [TrialState.COMPLETE, TrialState.RUNNING] and seen[0].values == [0.5]
    candidates, interrupted = opened("there", "shared").recover()
    assert [one.number for one in interrupted] == [second.number], "its process is gone, whoever else has one"


def test_trials_of_a_machine_that_is_gone_are_failed_and_queued(opened, monkeypatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 1)
    monkeypatch.setattr(module, "GRACE_S", 2)
    gone, here = (opened(name, "gone") for name in ("gone", "here"))
    left = proposed(gone)
    gone.beat(left.number)
    if not isinstance(here._storage, optuna.storages.RDBStorage):
        pytest.skip("Optuna's proxy has no heartbeats: its trials are failed when their own search starts again")
    time.sleep(3)
    here.fail_stale()
    assert here.optuna.get_trials()[left.number].state is TrialState.FAIL
    again = here.propose()
    here.suggest(again, Suggest(kind="int", name="width", arguments=(4, 64), options={"log": True}))
    assert here.params(again) == left.params


def test_a_search_beside_that_of_another_machine(url, opened, closing, tmp_path, monkeypatch) -> None:
    """It ends by its deadline with candidates of its own, and what runs elsewhere is left in peace."""
    if url.startswith("sqlite"):
        pytest.skip("as in a file of its own, which other tests have")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import search_task

    elsewhere = opened("elsewhere", "both")
    other = proposed(elsewhere)
    elsewhere.beat(other.number)
    closing.append(open_storage(url, tmp_path))
    start_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import partita"], check=True)
    deadline_s = 6 + 3 * (time.monotonic() - start_s)
    options: dict[str, Any] = {"deadline": deadline_s, "storage": closing[-1], "study": "both", "batch_size": 50}
    result = partita.search(search_task.build, search_task.data, folder=tmp_path / "own", **options)
    running = [trial.number for trial in result.study.get_trials() if trial.state is TrialState.RUNNING]
    assert running == [other.number] and other.number not in {one.number for one in result.trials}
    assert result.score > 0.5 and result.weights.is_relative_to(tmp_path / "own")

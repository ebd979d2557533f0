"""Searches with their processes: what is delivered, and what survives kill -9 of a trial and of the search itself."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import partita
from partita import InputError, SearchError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def pace_s() -> float:
    """What starting a process takes that imports partita, as busy as the machine is: deadlines are multiples of it."""
    start_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import partita"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return time.monotonic() - start_s


@pytest.fixture
def task(monkeypatch) -> Any:
    """The functions that are searched, as a module that other processes can import."""
    monkeypatch.syspath_prepend(str(HERE))
    import search_task

    return search_task


def trials(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """State and attributes of all trials, read by somebody else (who may have to roll back what a killed one began)."""
    with sqlite3.connect(f"file:{folder / 'study.db'}?mode=rw", uri=True) as connection:
        found = connection.execute("SELECT trial_id, state FROM trials ORDER BY number").fetchall()
        read = "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = ?"
        return [(state, {k: json.loads(v) for k, v in connection.execute(read, (number,))}) for number, state in found]


def states(folder: Path) -> list[str]:
    try:
        return [state for state, _ in trials(folder)]
    except sqlite3.Error:  # not there yet
        return []


def wait_for(holds: Callable[[], bool], what: str, patience_s: float) -> None:
    end_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end_s, f"{what} did not come"
        time.sleep(0.1)


def accuracy(model: torch.nn.Module, judged: Any) -> float:
    return float((model(judged[0]).argmax(1) == judged[1]).float().mean())


def job(folder: Path, deadline: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / "search_job.py"), str(folder), deadline, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_search_delivers_what_it_says(task, tmp_path, pace_s) -> None:
    deadline_s = 8 + 5 * pace_s
    start_s = time.time()
    told: list[str] = []
    options: dict[str, Any] = {"folder": tmp_path / "s", "batch_size": 50, "max_params": 400}
    result = partita.search(task.build, task.data, deadline=deadline_s, listener=told.append, **options)
    judged = task.data()[1]
    assert result.score == pytest.approx(accuracy(result.model, judged), abs=1e-6)
    assert result.score > 0.8, "a constant answer is right for half of them"
    assert start_s + deadline_s <= result.budget.deadline_s <= start_s + deadline_s + 2 + pace_s
    assert "RUNNING" not in states(tmp_path / "s")
    for one in result.trials:
        assert (one.num_parameters > 400) == (one.state == "rejected" and "max_params" in one.why)
    assert result.best in result.trials and result.pareto
    assert f"candidate {result.best.number}" in result.explain() and told
    again = partita.search(task.build, task.data, deadline=1, **options)
    assert (again.score, again.trials, again.budget) == (result.score, result.trials, result.budget)
    with pytest.raises(InputError, match="same objectives"):
        partita.search(task.build, task.data, deadline=1, objectives=("score", "parameters"), **options)


def test_a_module_is_enough(task, tmp_path, pace_s) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    result = partita.search(model, task.data, deadline=10 + 8 * pace_s, folder=tmp_path / "s")
    judged = [one for one in result.trials if one.points]
    assert len({one.params["width of 0"] for one in judged}) > 1 or len(judged) == 1
    assert set(judged[0].params) >= {"width of 0", "connections", "learning_rate", "batch_size"}
    assert result.model[0].out_features == result.best.params["width of 0"]
    assert result.score == pytest.approx(accuracy(result.model, task.data()[1]), abs=1e-6)


def test_a_killed_trial_is_tried_again_and_harms_no_other(task, tmp_path, pace_s) -> None:
    marker = tmp_path / "marker"
    result = partita.search(
        task.DieOnce(str(marker)),
        task.data,
        deadline=10 + 5 * pace_s,
        folder=tmp_path / "s",
        batch_size=50,
        max_trials=3,
    )
    found = trials(tmp_path / "s")
    assert marker.exists() and "RUNNING" not in states(tmp_path / "s")
    killed = [attributes for state, attributes in found if state == "FAIL"]
    assert len(killed) == 1 and "signal 9" in killed[0]["why"]
    assert any(attributes.get("retries") == killed[0]["candidate"] for _, attributes in found)
    assert sum(state == "COMPLETE" for state, _ in found) >= 2 and result.score > 0.5


@pytest.mark.skipif(len(partita.Cluster.detect().processes[0].cores) < 2, reason="needs a second core")
def test_cores_that_the_final_training_leaves_idle_train_the_next_best(task, tmp_path, pace_s) -> None:
    told: list[str] = []
    result = partita.search(
        task.regressor,
        task.smooth,
        deadline=10 + 5 * pace_s,
        folder=tmp_path / "s",
        loss_fn=task.squared,
        optimizer=task.fast_adam,
        batch_size=50,
        max_trials=3,
        listener=told.append,
    )
    beside = [line for line in told if "is trained beside it on core" in line]
    assert beside, "so small a network is fastest on one thread"
    assert result.score == min(one.best_score for one in result.trials if one.best_score is not None)
    assert "RUNNING" not in states(tmp_path / "s")


def test_few_data_are_not_learnt_by_heart_until_the_deadline(task, tmp_path, pace_s) -> None:
    result = partita.search(
        task.regressor,
        task.few,
        deadline=10 + 8 * pace_s,
        folder=tmp_path / "s",
        loss_fn=task.squared,
        optimizer=task.fast_adam,
        batch_size=24,
    )
    judged = [one for one in result.trials if one.points]
    spent = [one for one in judged if result.aims.is_past_best(one)]
    assert spent, "a network of 64 and more neurons learns 24 points by heart within a second"
    assert result.score == min(one.best_score for one in judged if one.best_score is not None)
    left_s = result.budget.last_s - result.budget.explore_end_s
    assert all(one.train_s < left_s for one in judged), "nobody has the time of the final training"
    assert "RUNNING" not in states(tmp_path / "s")


@pytest.mark.slow
def test_a_killed_search_goes_on_with_what_it_had_and_meets_the_same_deadline(tmp_path, pace_s) -> None:
    folder, deadline_s = tmp_path / "s", 15 + 8 * pace_s
    with job(folder, f"{deadline_s:.0f}s") as first:
        wait_for(lambda: {"COMPLETE", "RUNNING"} <= set(states(folder)), "a trial beside a finished one", deadline_s)
        children = psutil.Process(first.pid).children(recursive=True)
        first.kill()
    _, alive = psutil.wait_procs(children, timeout=deadline_s)
    assert children and not alive, "a trial ends with its search"
    before = {number: one for number, one in enumerate(trials(folder)) if one[0] == "COMPLETE"}
    with sqlite3.connect(folder / "study.db") as connection:
        read = "SELECT value_json FROM study_user_attributes WHERE key LIKE 'search:%'"
        instant_s = json.loads(connection.execute(read).fetchone()[0])["deadline_s"]
    with job(folder, "9999s") as second:
        output, errors = second.communicate(timeout=4 * deadline_s)
    assert second.returncode == 0, errors
    after = trials(folder)
    assert all(after[number] == one for number, one in before.items()), "no finished trial is lost"
    assert "RUNNING" not in states(folder) and "delivered" in output
    assert json.loads((folder / "best" / "candidate.json").read_text())["score"] > 0.5
    assert time.time() < instant_s + 3 * deadline_s, "not the 9999 s of the second call"


@pytest.mark.slow
def test_the_command_starts_a_killed_search_again(tmp_path, pace_s) -> None:
    folder, deadline_s = tmp_path / "s", 15 + 8 * pace_s
    script, environment = str(HERE / "search_script.py"), {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "partita", "search", script, "--deadline", f"{deadline_s:.0f}s", "--json"]

    with subprocess.Popen(
        [*command, "--folder", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(lambda: "COMPLETE" in states(folder), "a finished trial", deadline_s)
        searching = psutil.Process(process.pid).children()
        assert len(searching) == 1
        searching[0].kill()
        output, errors = process.communicate(timeout=4 * deadline_s)
    assert process.returncode == 0, errors
    assert "goes on in another process" in errors
    assert json.loads(output)["score"] > 0.5 and "RUNNING" not in states(folder)


def test_code_that_raises_ends_the_search_with_its_traceback(task, tmp_path) -> None:
    with pytest.raises(SearchError, match="broken on purpose"):
        partita.search(task.broken, task.data, deadline=3000, folder=tmp_path / "s")
    found = states(tmp_path / "s")
    assert "FAIL" in found and set(found) <= {"FAIL", "PRUNED"}, "those beside it end"


def test_a_space_in_which_nothing_fits_says_so(task, tmp_path) -> None:
    with pytest.raises(SearchError, match="parameters, more than max_params = 3"):
        partita.search(task.build, task.data, deadline=3000, folder=tmp_path / "s", max_params=3, max_trials=2)
    assert states(tmp_path / "s") == ["PRUNED", "PRUNED"]
    with pytest.raises(SearchError, match="of memory, more than"):
        partita.search(task.build, task.data, deadline=3000, folder=tmp_path / "m", max_memory=2000, max_trials=2)


def test_a_script_that_searches_while_it_is_imported_is_told_so(tmp_path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport partita, search_task\n"
        "def build(trial):\n    return search_task.build(trial)\n"
        f"partita.search(build, search_task.data, deadline=3000, folder={str(tmp_path / 's')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and '__name__ == "__main__"' in done.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"build": lambda trial: None}, "build must be found by other processes"),
        ({"build": 5}, "build must be a function"),
        ({"deadline": "soon"}, "deadline must be"),
        ({"objectives": ("parameters",)}, 'begins with "score"'),
        ({"objectives": "score"}, "objectives"),
        ({"direction": "minimize"}, "direction belongs to a score"),
        ({"max_params": 0}, "max_params"),
        ({"final_share": 1.0}, "final_share"),
        ({"cluster": partita.Cluster.preset("1x1xcpu-4")}, "is_here"),
        ({"data": (torch.zeros(3), torch.zeros(3))}, "single tensor"),
        ({"resources": "1,2 machines"}, "one kind of resources"),
        ({"resources": 2}, "resources must be"),
        ({"storage": "nonsense"}, "storage must be"),
    ],
)
def test_bad_input(task, tmp_path, wrong: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"build": task.build, "data": task.data, "deadline": 10, "folder": tmp_path / "s"} | wrong
    with pytest.raises(InputError, match=told):
        partita.search(**given)

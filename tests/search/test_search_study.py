"""The study: what becomes of trials, here and of searches that are gone."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from partita import InputError, SearchError
from partita.search.candidates import Aims, Candidate, as_record, of_record
from partita.search.curves import Point
from partita.search.messages import Suggest
from partita.search.study import Study, lock, open_storage, owner_of

SCORE = Aims(objectives=("score",), maximize=True)
ALL = Aims(objectives=("score", "parameters", "step_time"), maximize=False)


def opened(folder: Path, owner: str = "me", aims: Aims = SCORE, **options: Any) -> Study:
    return Study(open_storage(None, folder), "study", owner=owner, aims=aims, **({"seed": 0} | options))


def proposed(study: Study) -> Candidate:
    """A candidate whose width was suggested."""
    number = study.propose()
    study.suggest(number, Suggest(kind="int", name="width", arguments=(1, 9), options={}))
    return Candidate(number=number, params=study.params(number))


def judged(candidate: Candidate, **changes: Any) -> Candidate:
    return candidate.with_point(Point(100, 1.0, 0.5), state="waiting", num_parameters=7, step_time_s=0.1, **changes)


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.optuna.get_trials()]


def test_what_becomes_of_trials(tmp_path) -> None:
    study = opened(tmp_path)
    for state, score in (("waiting", 0.9), ("gone", None), ("rejected", None), ("failed", None), ("raised", None)):
        candidate = proposed(study)
        study.finish(candidate.number, Candidate(number=candidate.number, state=state, why=state), score=score)  # type: ignore[arg-type]
    assert states(study) == ["COMPLETE", "PRUNED", "PRUNED", "FAIL", "FAIL"]
    assert study.optuna.best_value == 0.9
    assert [trial.intermediate_values for trial in study.optuna.get_trials()] == [{}] * 5
    assert [trial.user_attrs["why"] for trial in study.optuna.get_trials()][2] == "rejected"


def test_a_candidate_is_trained_on_in_a_trial_of_its_own(tmp_path) -> None:
    study = opened(tmp_path, aims=ALL)
    candidate = judged(proposed(study))
    study.finish(candidate.number, candidate, score=0.5)
    number = study.continued(candidate)
    trial = study.optuna.get_trials()[number]
    assert trial.state is TrialState.RUNNING and trial.params == candidate.params
    assert trial.user_attrs["continues"] == candidate.number
    study.finish(number, candidate, score=0.25)
    assert [list(trial.values) for trial in study.optuna.get_trials()] == [[0.5, 7.0, 0.1], [0.25, 7.0, 0.1]]


def test_optuna_sees_the_curve(tmp_path) -> None:
    study = opened(tmp_path)
    candidate = judged(proposed(study))
    study.note(candidate.number, candidate)
    candidate = candidate.with_point(Point(300, 2.0, 0.75))
    study.finish(candidate.number, candidate, score=0.9)
    assert study.optuna.get_trials()[0].intermediate_values == {100: 0.5, 300: 0.75}


def test_own_trials_of_an_earlier_process_are_failed_at_once(tmp_path) -> None:
    study = opened(tmp_path)
    finished, left, fresh = judged(proposed(study)), judged(proposed(study)), proposed(study)
    study.finish(finished.number, finished, score=0.5)
    study.note(left.number, left)
    other = opened(tmp_path, owner="other")
    foreign = proposed(other)
    again = opened(tmp_path)
    candidates, interrupted = again.recover()
    assert {one.number for one in interrupted} == {left.number, fresh.number}
    assert candidates[finished.number] == finished and candidates[left.number] == left
    assert candidates[fresh.number].params == fresh.params
    assert states(again) == ["COMPLETE", "FAIL", "FAIL", "RUNNING"]
    assert foreign.number not in candidates


def test_an_interrupted_continuation_is_the_candidate_that_it_continued(tmp_path) -> None:
    study = opened(tmp_path)
    candidate = judged(proposed(study))
    study.finish(candidate.number, candidate, score=0.5)
    study.continued(candidate)  # and the process ends before it notes anything
    candidates, interrupted = opened(tmp_path).recover()
    assert interrupted == [candidate] and candidates == {candidate.number: candidate}


def test_what_failed_is_proposed_again(tmp_path) -> None:
    study = opened(tmp_path)
    candidate = proposed(study)
    study.finish(candidate.number, Candidate(number=candidate.number, state="failed"), score=None)
    study.again(Candidate(number=candidate.number, failures=1))
    again = proposed(study)
    assert again.params == candidate.params and study.failures(again.number) == 1
    assert proposed(study).number == again.number + 1


def test_trials_of_others_whose_heart_has_stopped_are_failed_and_queued(tmp_path) -> None:
    gone, alive = opened(tmp_path, owner="gone"), opened(tmp_path, owner="alive")
    dead, living = proposed(gone), proposed(alive)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = '2001-01-01 00:00:00' WHERE trial_id = 1")
    study = opened(tmp_path)
    study.recover()
    assert states(study) == ["FAIL", "RUNNING", "WAITING"]
    assert proposed(study).params == dead.params != living.params or dead.params == living.params


def test_nothing_runs_for_ever_that_was_asked_for_and_never_begun(tmp_path) -> None:
    study = opened(tmp_path)
    study.optuna.sampler = optuna.samplers.RandomSampler(seed=0)
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.optuna.ask()
    study.fail_stale()
    assert states(study) == ["RUNNING"], "another search may be about to begin it"
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE trials SET datetime_start = '2001-01-01 00:00:00'")
    opened(tmp_path).fail_stale()
    assert states(opened(tmp_path)) == ["FAIL"]


def test_who_is_alone_need_not_wait_for_trials_that_nobody_has_begun(tmp_path) -> None:
    """Killed between asking and beginning, a search that goes on may be over within the minute."""
    with pytest.warns(UserWarning, match="Heartbeat"):
        opened(tmp_path).optuna.ask()
    again = opened(tmp_path, is_alone=True)
    again.recover()
    assert states(again) == ["FAIL"]


def test_records_are_read_as_they_were_written() -> None:
    candidate = judged(Candidate(number=3, params={"width": 4}, notes=("a", "b"), rung=2))
    assert of_record(as_record(candidate)) == candidate
    assert of_record(as_record(candidate) | {"of a later version": 1}) == candidate


def test_another_search_in_the_same_study_is_refused(tmp_path) -> None:
    opened(tmp_path)
    with pytest.raises(InputError, match="same objectives"):
        opened(tmp_path, aims=ALL)


@pytest.mark.parametrize("url", ["nonsense", "postgresql://nowhere.invalid/x", "sqlite:////no/such/folder/study.db"])
def test_a_storage_that_cannot_be_opened(tmp_path, url: str) -> None:
    with pytest.raises(InputError, match="storage must be a database"):
        open_storage(url, tmp_path)


def test_one_search_at_a_time_in_a_folder(tmp_path) -> None:
    with lock(tmp_path), pytest.raises(SearchError, match="another search"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_owners_differ_by_folder_and_stay(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert owner_of(tmp_path / "a") == owner_of(tmp_path / "a") != owner_of(tmp_path / "b")


def test_a_restart_does_not_suggest_the_same_once_more(tmp_path) -> None:
    def widths(study: Study) -> list[int]:
        question = Suggest(kind="int", name="width", arguments=(1, 10**6), options={})
        return [study.suggest(study.propose(), question).value for _ in range(3)]

    first = widths(opened(tmp_path))
    assert not set(first) & set(widths(opened(tmp_path)))

"""`SearchTrial` against Optuna's own trial: the same calls, the same values."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from partita import InputError
from partita.search.candidates import Aims
from partita.search.messages import Suggest
from partita.search.study import Study, open_storage
from partita.search.trials import SearchTrial


def build(trial: Any) -> dict[str, Any]:
    found = {"depth": trial.suggest_int("depth", 1, 4), "kind": trial.suggest_categorical("kind", ["a", "b", None])}
    if found["depth"] > 1:
        found["rate"] = trial.suggest_float("rate", 1e-4, 1.0, log=True)
    found["width"] = trial.suggest_int("width", 16, 256, step=16)
    found["depth again"] = trial.suggest_int("depth", 1, 4)
    return found


@pytest.fixture
def study(tmp_path) -> Study:
    aims = Aims(objectives=("score",), maximize=True)
    return Study(open_storage(None, tmp_path), "study", owner="me", aims=aims, seed=0)


def test_it_suggests_what_optuna_does(study: Study) -> None:
    plain = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=10, seed=0), direction="maximize")
    for _ in range(5):
        number = study.propose()

        def ask(kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any], number: int = number) -> Any:
            return study.suggest(number, Suggest(kind=kind, name=name, arguments=arguments, options=options)).value

        trial, expected = SearchTrial(number, {}, ask), plain.ask()
        assert build(trial) == build(expected)
        assert trial.params == expected.params == study.params(number)
        study.optuna.tell(number, 1.0)
        plain.tell(expected, 1.0)


def test_what_is_known_is_given_again() -> None:
    known = {"depth": 2, "kind": "b", "rate": 0.5, "width": 32}
    assert build(SearchTrial(7, known)) == known | {"depth again": 2}


def test_a_candidate_that_is_built_otherwise_the_second_time_is_refused() -> None:
    with pytest.raises(InputError, match="'rate' was not suggested then"):
        build(SearchTrial(7, {"depth": 2, "kind": "b"}))


def test_a_wrong_suggestion_says_which(study: Study) -> None:
    question = Suggest(kind="int", name="width", arguments=(5, 1), options={"step": 1, "log": False})
    assert "suggest_int('width'" in study.suggest(study.propose(), question).error


def test_what_build_notes_is_kept() -> None:
    trial = SearchTrial(0, {})
    trial.set_user_attr("why", "wide")
    assert trial.user_attrs == {"why": "wide"}

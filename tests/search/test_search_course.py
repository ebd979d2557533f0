"""What is to happen next in a search, without processes: exploring, promoting, the final training, the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from partita import SearchError
from partita.search.candidates import Aims, Candidate
from partita.search.course import MOST_FINAL_FAILURES, MOST_KEPT, NUM_BROKEN, Course
from partita.search.curves import Point
from partita.search.deadline import Budget
from partita.search.messages import Suggest
from partita.search.study import STARTUP_TRIALS, Study, open_storage
from partita.search.weights import write_weights

FIRST_RUNG_S = 1.0
BUDGET = Budget(start_s=0.0, deadline_s=100.0, final_share=0.4)  # exploring ends at about 59


def course(folder: Path, **options: Any) -> Course:
    aims = Aims(objectives=("score",), maximize=True)
    study = Study(open_storage(None, folder), "study", owner="me", aims=aims, seed=0)
    return Course(study, aims, BUDGET, folder, **({"max_trials": None, "retries": 1} | options))


def add(course: Course, score: float, *, checkpoint: bool = True, num_points: int = 3, **changes: Any) -> Candidate:
    """A candidate that waits, with a flat curve."""
    number = course.study.propose()
    course.study.suggest(number, Suggest(kind="float", name="rate", arguments=(0.0, 1.0), options={}))
    points = tuple(Point(100.0 * i, float(i), score - 1e-3 * (num_points - i)) for i in range(1, num_points + 1))
    candidate = Candidate(
        number=number, params=course.study.params(number), state="waiting", rung=0, points=points, samples_per_s=100.0
    )
    candidate = dataclasses.replace(candidate, **{"is_saved": checkpoint} | changes)
    if checkpoint:
        folder = course.folder_of(number) / "step-00000001"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").touch()
        write_weights(nn.Linear(1, 1), course.folder_of(number), score)
    course.candidates[number] = candidate
    if candidate.rung >= 0 and course.first_rung_s is None:
        course.first_rung_s = FIRST_RUNG_S
        course.study.write("first_rung_s", FIRST_RUNG_S)
    return candidate


def test_exploring_ends_with_its_time_once_somebody_can_be_trained_on(tmp_path) -> None:
    now = course(tmp_path)
    assert not now.is_explored(70, num_running=0)
    assert now.may_propose(70, startup_s=1, num_running=0), "late, but there is nothing to deliver yet"
    add(now, 0.5)
    assert not now.is_explored(10, num_running=2)
    assert now.is_explored(60, num_running=2)
    assert now.may_propose(10, startup_s=1, num_running=2) and not now.may_propose(58.5, startup_s=1, num_running=0)


def test_exploring_ends_early_with_as_many_candidates_as_were_wanted(tmp_path) -> None:
    now = course(tmp_path, max_trials=2)
    add(now, 0.5)
    assert now.may_propose(10, startup_s=1, num_running=0)
    add(now, 0.6)
    assert not now.may_propose(10, startup_s=1, num_running=0)
    assert not now.is_explored(10, num_running=1) and now.is_explored(10, num_running=0)


def test_the_final_training_is_for_the_best_and_for_another_after_failures(tmp_path) -> None:
    now = course(tmp_path)
    worse, best = add(now, 0.5), add(now, 0.7)
    assert now.finalist(60) == best
    now.choose(best, 60)
    for _ in range(MOST_FINAL_FAILURES):
        assert now.finalist(61) == best
        now.final_failed()
    assert now.finalist(62) == worse
    now.choose(worse, 62)
    assert now.final_begin_s == 60, "the rate's decay goes on"
    assert now.delivered() == best, "its weights score best still"
    write_weights(nn.Linear(1, 1), now.folder_of(worse.number), 0.8)
    assert now.delivered() == worse


def test_idle_cores_are_for_the_best_of_those_who_wait(tmp_path) -> None:
    now = course(tmp_path)
    best = add(now, 0.7)
    now.choose(best, 60)
    assert now.runner_up(61) is None
    worst, second, running = add(now, 0.4), add(now, 0.6), add(now, 0.65, state="running")
    assert now.runner_up(61) == second and running.number != best.number
    now.candidates[second.number] = dataclasses.replace(second, failures=99)
    assert now.runner_up(61) == worst, "whose processes die again and again is not tried once more"


def test_a_few_points_that_promise_much_are_not_relied_on(tmp_path) -> None:
    """Two points on a steep line promise more than a long curve has reached, and are worth nothing."""
    now = course(tmp_path)
    known = add(now, 0.8, num_points=9)
    steep = add(now, 0.5)
    points = (Point(100, 1, 0.1), Point(200, 2, 0.5))
    steep = now.candidates[steep.number] = dataclasses.replace(steep, points=points, samples_per_s=1e4)
    assert now.aims.predicted(steep, BUDGET, 60).score > 0.8
    assert now.finalist(60) == known


def test_who_was_promoted_among_few_is_not_preferred_for_it(tmp_path) -> None:
    now = course(tmp_path)
    add(now, 0.5, num_points=9, rung=2)
    better = add(now, 0.8, num_points=4)
    assert now.finalist(60) == better


def test_of_equal_curves_the_one_with_fewer_samples_is_preferred(tmp_path) -> None:
    """It is at the beginning of what it can learn, and predicted alike."""
    now = course(tmp_path)
    quick, slow = add(now, 0.8, rung=1), add(now, 0.8, rung=1)
    points = tuple(Point(one.samples / 50, one.train_s, one.score) for one in slow.points)
    slow = now.candidates[slow.number] = dataclasses.replace(slow, points=points, samples_per_s=2.0)
    assert now.predicted(quick, 60) == pytest.approx(now.predicted(slow, 60))
    assert now.finalist(60) == slow
    by_number = {one.number: one for one in now.standings(10)}
    assert by_number[slow.number].at < by_number[quick.number].at


def past_best(now: Course, candidate: Candidate) -> Candidate:
    """The same one, after it has become worse for long."""
    last = candidate.points[-1]
    more = [Point(last.samples * k, last.train_s * k, last.score - 0.3) for k in (2, 3, 4)]
    found = dataclasses.replace(candidate, points=(*candidate.points, *more), best_score=last.score)
    now.candidates[candidate.number] = found
    return found


def test_who_is_past_its_best_is_not_trained_on_but_delivered(tmp_path) -> None:
    now = course(tmp_path)
    spent = past_best(now, add(now, 0.9))
    assert now.promoted(10) is None and now.finalist(60) is None
    assert not now.is_explored(60, num_running=0), "there is nothing to train until the deadline"
    assert now.may_propose(60, startup_s=1, num_running=1) and not now.is_exhausted(60, num_running=0)
    assert not now.may_propose(97, startup_s=1, num_running=0) and now.is_exhausted(97, num_running=0)
    assert now.delivered() == spent
    other = add(now, 0.5)
    assert now.is_explored(60, num_running=0) and now.finalist(60) == other
    assert not now.may_propose(60, startup_s=1, num_running=0)
    now.choose(other, 60)
    now.give_up_final()
    past_best(now, other)
    assert not now.is_explored(70, num_running=0)
    assert course(tmp_path).final is None and now.delivered() == spent


def test_what_a_candidate_scores_already_counts_however_unsure_its_future_is(tmp_path) -> None:
    now = course(tmp_path)
    add(now, 0.8, num_points=9)
    better = add(now, 0.9)
    points = (Point(100, 1, 0.7), Point(200, 2, 0.9))
    now.candidates[better.number] = dataclasses.replace(better, points=points)
    assert now.finalist(60).number == better.number  # type: ignore[union-attr]


def test_a_restart_knows_the_final_training(tmp_path) -> None:
    before = course(tmp_path)
    best = add(before, 0.7)
    before.study.note(best.number, best)
    before.study.finish(best.number, best, score=0.7)
    before.choose(best, 60)
    before.next_until_s(best, 0.5)
    before.study.continued(best)
    after = course(tmp_path)
    assert (after.final, after.final_begin_s, after.first_rung_s) == (best.number, 60, before.first_rung_s)
    assert after.finalist(70).number == best.number  # type: ignore[union-attr]
    assert [trial.state.name for trial in after.study.optuna.get_trials()] == ["COMPLETE", "FAIL"]


def test_interrupted_candidates_go_on_from_checkpoints_and_others_are_proposed_again(tmp_path) -> None:
    before = course(tmp_path)
    saved, lost = add(before, 0.7, state="running"), add(before, 0.6, checkpoint=False, state="running")
    for one in (saved, lost):
        before.study.note(one.number, one)
    after = course(tmp_path)
    assert [after.candidates[one.number].state for one in (saved, lost)] == ["waiting", "failed"]
    trials = after.study.optuna.get_trials()
    assert [trial.state.name for trial in trials] == ["FAIL", "FAIL", "WAITING"]
    assert trials[2].system_attrs["fixed_params"] == lost.params


def test_who_was_interrupted_before_the_first_rung_comes_first(tmp_path) -> None:
    now = course(tmp_path)
    for score in (0.9, 0.8, 0.7):
        add(now, score)
    assert now.promoted(10) == 0
    one = add(now, 0.1, rung=-1, failures=1)
    assert now.promoted(10) == one.number
    now.candidates[one.number] = dataclasses.replace(one, failures=2)
    assert now.promoted(10) == 0, "what dies again and again is left"


def test_a_candidate_whose_process_dies_again_and_again_has_failed(tmp_path) -> None:
    now = course(tmp_path, retries=1)
    for failures, queued in ((1, 1), (2, 0)):
        one = add(now, 0.5, checkpoint=False, failures=failures)
        before = len(now.study.optuna.get_trials())
        now.recover(one)
        assert len(now.study.optuna.get_trials()) == before + queued
        assert now.candidates[one.number].state == "failed"


@pytest.mark.parametrize("state", ["raised", "failed"])
def test_code_that_always_raises_or_dies_ends_the_search_with_its_reason(tmp_path, state: str) -> None:
    now = course(tmp_path, retries=0)
    for _ in range(NUM_BROKEN):
        assert not now.is_exhausted(10, num_running=1)
        add(now, 0.0, checkpoint=False, state=state, why="Traceback ... on purpose", points=())
    add(now, 0.0, checkpoint=False, state="running", points=())
    with pytest.raises(SearchError, match="on purpose"):
        now.is_exhausted(10, num_running=1)


def test_nothing_left_to_try_ends_the_search(tmp_path) -> None:
    now = course(tmp_path, max_trials=2)
    for _ in range(2):
        add(now, 0.0, checkpoint=False, state="rejected", why="too large", points=())
    assert now.is_exhausted(10, num_running=0)
    with pytest.raises(SearchError, match="none of 2 was judged.*too large"):
        now.delivered()


def test_rungs_follow_the_training_time(tmp_path) -> None:
    now = course(tmp_path)
    one = add(now, 0.5, rung=-1)
    first_s = now.next_until_s(one, 0.25)
    assert now.next_until_s(one, 99.0) == first_s, "they are the same for all, once known"
    late = one.with_point(Point(1e5, 9.5 * first_s, 0.6))
    assert now.at_its_rung(late).rung == 2 and now.at_its_rung(one).is_saved


def test_a_rung_is_decided_by_what_is_near(tmp_path) -> None:
    """The steep one is predicted to win in the end, but nothing so far away follows from two seconds; who has trained
    for longer is compared by what he had then."""
    now = course(tmp_path)
    flat = add(now, 0.6, num_points=4)
    steep = add(now, 0.3)
    points = tuple(Point(100.0 * t, t, 0.3 - 0.3 / t) for t in (0.25, 0.5, 1.0, 2.0))
    steep = now.candidates[steep.number] = dataclasses.replace(steep, points=points)
    long = add(now, 0.9, rung=2)
    points = tuple(Point(100.0 * t, t, 0.9 - 0.5 / t) for t in (1.0, 2.0, 4.0, 8.0, 16.0))
    now.candidates[long.number] = dataclasses.replace(long, points=points)
    at = {one.number: [value for (value,) in one.at] for one in now.standings(20)}
    assert at[flat.number][0] < at[steep.number][0], "lower is better"
    assert at[long.number] == pytest.approx([-(0.9 - 0.5 / 3.0), -(0.9 - 0.5 / 9.0), -0.88], abs=0.03)
    assert now.expected(flat, 20) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("now_s", [20.0, 85.0, 97.9])
def test_what_is_known_of_candidates_is_as_if_computed_anew(tmp_path, now_s: float) -> None:
    now = course(tmp_path)
    for rung, num_points in ((0, 3), (1, 5), (2, 12), (0, 4)):
        points = tuple(Point(100.0 * t, float(t), 0.8 - 0.3 / t) for t in range(1, num_points + 1))
        one = add(now, 0.5, rung=rung)
        now.candidates[one.number] = dataclasses.replace(one, points=points)
    now.standings(10.0)
    known = now.standings(now_s)
    now.candidates = {number: dataclasses.replace(one) for number, one in now.candidates.items()}
    assert not any(one.reached for one in now.all)
    assert now.standings(now_s) == known
    one = now.all[2]
    now.candidates[one.number] = one.with_point(Point(2e3, 20.0, 0.1))
    assert now.standings(now_s) != known


def test_what_is_compared_is_never_beyond_the_deadline(tmp_path) -> None:
    now = course(tmp_path)
    one = add(now, 0.6)
    late = now.aims.after(1e6, one, BUDGET, BUDGET.last_s)
    assert late == pytest.approx(one.points[-1].score)


def test_checkpoints_without_prospects_are_removed(tmp_path) -> None:
    now = course(tmp_path)
    for i in range(MOST_KEPT + 2):
        add(now, 0.5 + 0.01 * i)
    now.forget_worst(10)
    gone = [one.number for one in now.all if one.state == "gone"]
    assert gone == [0, 1] and not now.folder_of(0).exists() and now.folder_of(2).exists()


def test_proposals_learn_once_enough_candidates_were_promoted(tmp_path, monkeypatch) -> None:
    now = course(tmp_path)
    asked: list[bool] = []
    monkeypatch.setattr(now.study, "propose", lambda *, learns: asked.append(learns) or 7)
    last = BUDGET.last_rung(FIRST_RUNG_S)
    known = [Candidate(number=i, rung=0, points=(Point(1.0, 1.0, 0.5),)) for i in range(2 * STARTUP_TRIALS)]
    now.candidates.update({one.number: one for one in known})
    now.first_rung_s = FIRST_RUNG_S
    assert now.proposed() == 7
    for one in known[:STARTUP_TRIALS]:
        now.candidates[one.number] = dataclasses.replace(one, rung=1)
    now.proposed()
    assert last > 0 and asked == [False, True]

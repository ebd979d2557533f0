"""One candidate's training: limits, judging, continuing from a checkpoint, the end of the rate and the best weights."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from partita.cluster import Cluster
from partita.connections import Static
from partita.errors import SearchError
from partita.search import training_run
from partita.search.candidates import Candidate
from partita.search.delivery import deliver, with_weights
from partita.search.messages import Go, Judged, Order, Priced, Stop
from partita.search.pricing import Limits, Price
from partita.search.resources import resources
from partita.search.task import Task, default_loss, default_score, suggested_adamw
from partita.search.training_run import DECAY_SHARE, RejectedError, TrainingRun, decay, fastest_threads
from partita.search.trial_process import _explore
from partita.search.trials import SearchTrial
from partita.training.parallelize import parallelize

KNOWN = {"width": 16, "learning_rate": 0.01}


def data() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    y = (x[:, 0] > x[:, 1]).long()
    return (x[:300], y[:300]), (x[300:], y[300:])


def build(trial: SearchTrial) -> nn.Module:
    width = trial.suggest_int("width", 4, 64)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 2))


TASK = Task(
    build=build, data=data, loss_fn=default_loss, score=None, direction="maximize", optimizer=suggested_adamw,
    batch_size=20, connections=None,
)  # fmt: skip


def order(folder: Path, **changes: Any) -> Order:
    where = Cluster.detect()
    plain = Order(
        task_file="", folder=str(folder), number=3, seed=1, known=KNOWN, resumed=False, everywhere=where, target=None,
        final_s=1e3, final=None, price=None, cores=where.machines[0].cores[:1],
        limits=Limits(max_params=None, max_memory_bytes=2**33, last_s=time.time() + 1000),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def run_of(given: Order, task: Task = TASK, known: dict[str, Any] = KNOWN) -> TrainingRun:
    return TrainingRun(task, SearchTrial(given.number, known), given)


def steps(run: TrainingRun, count: int, told: list[Judged]) -> None:
    """Trains so many steps: judging does not count as training, so the clock is asked for the next step only."""
    for _ in range(count):
        run.train(run.train_s + 1e-9, lambda: False, told.append)


def test_a_continued_candidate_trains_as_if_it_had_not_stopped(tmp_path) -> None:
    whole: list[Judged] = []
    straight = run_of(order(tmp_path / "a"))
    straight.begin(1.0, resumed=False)
    steps(straight, 12, whole)
    straight.close()
    parts: list[Judged] = []
    first = run_of(order(tmp_path / "b"))
    first.begin(1.0, resumed=False)
    steps(first, 7, parts)
    first.save()
    first.close()
    second = run_of(order(tmp_path / "b", resumed=True))
    second.begin(1.0, resumed=True)
    assert second.train_s == first.train_s
    steps(second, 5, parts)
    second.close()
    torch.testing.assert_close(second.model.state_dict(), straight.model.state_dict())
    assert (
        [one.point.samples for one in parts] == [one.point.samples for one in whole] == [20.0 * k for k in range(1, 13)]
    )
    assert [one.point.score for one in parts] == [one.point.score for one in whole]


def test_a_plan_is_looked_for_where_it_pays_and_changes_nothing(tmp_path, monkeypatch) -> None:
    weights, wanted = [], []

    def recorded(*arguments: Any, **options: Any) -> Any:
        wanted.append(options["plan"] if isinstance(options["plan"], str) else options["plan"].mode)
        return parallelize(*arguments, **options)

    monkeypatch.setattr(training_run, "parallelize", recorded)
    for name, granted_s in (("plain", 1.0), ("split", 60.0), ("searched", 120.0)):
        told: list[Judged] = []
        run = run_of(order(tmp_path / name))
        run.begin(1.0, resumed=False)
        steps(run, 4, told)
        run.save()
        run.continue_for(granted_s)
        steps(run, 4, told)
        run.close()
        weights.append(run.model.state_dict())
        assert [one.point.samples for one in told] == [20.0 * k for k in range(1, 9)]
    assert wanted == ["block", "block", "quick", "block", "auto"]
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2])


def half(trial: SearchTrial) -> Static:
    return Static(density=0.5, seed=trial.suggest_int("width", 4, 64))


def test_connections_are_those_of_the_checkpoint(tmp_path) -> None:
    task, masks = dataclasses.replace(TASK, connections=half), []
    for resumed in (False, True):
        run = run_of(order(tmp_path, resumed=resumed), task)
        run.begin(1.0, resumed=resumed)
        steps(run, 3, [])
        run.save()
        run.close()
        masks.append([parameter.detach() != 0 for parameter in run.model.parameters() if parameter.dim() > 1])
    assert sum(int(mask.sum()) for mask in masks[0]) == pytest.approx(0.5 * (4 * 16 + 2 * 16), abs=2)
    assert all(bool((one == other).all()) for one, other in zip(*masks, strict=True))


def test_it_learns_and_says_how_fast(tmp_path) -> None:
    told: list[Judged] = []
    run = run_of(order(tmp_path))
    run.begin(1.0, resumed=False)
    run.train(1.0, lambda: False, told.append)
    run.close()
    times = [one.point.train_s for one in told]
    assert times == sorted(times) and times[-1] >= 1.0
    assert told[-1].point.score > 0.8
    rate = told[-1].point.samples / told[-1].point.train_s
    assert rate / 10 < told[-1].samples_per_s < rate * 10
    assert not any(module.training is False for module in run.model.modules()), "judging leaves no module in its mode"


def test_it_stops_when_told(tmp_path) -> None:
    run = run_of(order(tmp_path))
    run.begin(1.0, resumed=False)
    run.train(1e9, lambda: run.train_s > 0.1, lambda _: None)
    run.close()
    assert 0.1 < run.train_s < 100


def test_limits_are_kept_before_training(tmp_path) -> None:
    limits = Limits(max_params=20, max_memory_bytes=2**33, last_s=time.time() + 1000)
    with pytest.raises(RejectedError, match="114 parameters, more than max_params = 20") as found:
        run_of(order(tmp_path, limits=limits))
    assert found.value.price is not None and found.value.price.num_parameters == 114
    tight = dataclasses.replace(limits, max_params=None, max_memory_bytes=1000)
    with pytest.raises(RejectedError, match="of memory, more than 1000 B"):
        run_of(order(tmp_path, limits=tight)).price()
    late = dataclasses.replace(limits, max_params=None, last_s=time.time() + 1e-4)
    with pytest.raises(RejectedError, match="predicted to take .* fewer than 20"):
        run_of(order(tmp_path, limits=late)).price()


def test_what_is_predicted_is_told(tmp_path) -> None:
    """First by an outline, which takes a moment, then by plans, once that pays."""
    run = run_of(order(tmp_path))
    rough = run.price()
    assert run.price_for(1e-3) is None
    planned = run.price_for(1e3)
    assert planned is not None and rough.is_rough and not planned.is_rough and rough.outline_s == planned.outline_s > 0
    assert run.price_for(1e3) is None, "it is known now"
    for price in (rough, planned):
        assert price.num_parameters == 114 and price.memory_bytes is not None and price.memory_bytes > 4 * 114
        assert price.step_time_s is not None and price.step_time_s > 0 and price.wide_gain >= 1 and not price.note
    assert rough.memory_bytes == pytest.approx(planned.memory_bytes, rel=0.3)


def test_a_candidate_that_does_not_fit_its_plan_is_rejected_then(tmp_path, monkeypatch) -> None:
    run = run_of(order(tmp_path))
    run.price()
    monkeypatch.setattr(training_run, "priced", lambda *_, **__: Price(num_parameters=114, memory_bytes=2**40))
    with pytest.raises(RejectedError, match="of memory, more than"):
        run.price_for(1e3)


def test_a_search_for_other_resources_counts_their_speed(tmp_path) -> None:
    """Over a network on which nothing is gained, what counts is the best plan of one such machine."""
    here = order(tmp_path)
    slow = resources("2 machines at 1 kbit/s", here.everywhere)["2 machines"]
    price = run_of(dataclasses.replace(here, target=slow)).price()
    assert "its plan there" in price.note and 0.1 < price.wide_gain < 10


def branching_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    loss = default_loss(model, batch)
    return loss * 2 if loss.item() > 1e6 else loss


def test_a_step_that_cannot_be_captured_is_trained_all_the_same(tmp_path) -> None:
    run = run_of(order(tmp_path), dataclasses.replace(TASK, loss_fn=branching_loss))
    price = run.price()
    assert price.memory_bytes is None and "not predicted" in price.note
    run.begin(1.0, resumed=False)
    steps(run, 2, told := [])
    run.close()
    assert told[-1].point.samples == 40


def test_slow_steps_are_noticed_where_they_were_not_predicted(tmp_path) -> None:
    limits = Limits(max_params=None, max_memory_bytes=2**33, last_s=time.time() + 1e-3)
    run = run_of(order(tmp_path, limits=limits))
    run.begin(1.0, resumed=False)
    with pytest.raises(RejectedError, match="measured to take"):
        run.train(10.0, lambda: False, lambda _: None)
    run.close()


def test_a_network_that_diverges_is_not_trained_on(tmp_path) -> None:
    run = run_of(order(tmp_path), known={"width": 16, "learning_rate": 1e30})
    run.begin(1.0, resumed=False)
    with pytest.raises(RejectedError, match="diverged"):
        run.train(10.0, lambda: False, lambda _: None)
    run.close()


def test_threads_are_those_that_are_faster(monkeypatch) -> None:
    """Time passes as fast as this model says; neither it nor the random numbers are touched."""
    clock = [0.0]

    class Timed(nn.Module):
        def __init__(self, times_s: dict[int, float]) -> None:
            super().__init__()
            self.inner, self.drop, self.times_s = nn.Linear(4, 2), nn.Dropout(0.5), times_s

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += self.times_s[torch.get_num_threads()]
            return self.drop(self.inner(x))

    monkeypatch.setattr(training_run.time, "perf_counter", lambda: clock[0])
    batch = torch.ones(6, 4), torch.zeros(6).long()
    for times_s, best in (({1: 0.01, 2: 0.02}, 1), ({1: 0.02, 2: 0.01}, 2), ({1: 9.0, 2: 99.0}, 2)):
        model, random, before = Timed(times_s), torch.get_rng_state(), torch.get_num_threads()
        assert fastest_threads(model, default_loss, batch, 2) == best
        assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == before
        assert model.inner.weight.grad is None
    assert fastest_threads(model, default_loss, batch, 1) == 1


def test_what_was_predicted_before_is_not_predicted_again(tmp_path, monkeypatch) -> None:
    known = Price(num_parameters=5, wide_gain=1.5)
    run = run_of(order(tmp_path, price=known))
    monkeypatch.setattr(training_run, "priced", None)
    assert run.price() is known


def test_the_rate_falls_to_zero_at_the_end() -> None:
    factors = [decay(t, 0.0, 100.0) for t in range(0, 101)]
    assert factors == sorted(factors, reverse=True) and factors[-1] == 0.0
    assert all(factor == 1.0 for factor in factors[: int(100 * (1 - DECAY_SHARE))])


def test_the_best_weights_of_the_final_training_are_delivered(tmp_path) -> None:
    scores = iter([0.5, 0.9, 0.7, 0.8])

    def falling(model: nn.Module, judged: Any) -> float:
        return next(scores)

    now_s = time.time()
    final = order(tmp_path / "candidates" / "3", final=(now_s, now_s + 1000))
    run = run_of(final, dataclasses.replace(TASK, score=falling))
    run.begin(1.0, resumed=False)
    kept = []
    for _ in range(3):
        steps(run, 1, [])
        kept.append({name: value.clone() for name, value in run.model.state_dict().items()})
    run.close()
    candidate = Candidate(number=3, params=KNOWN)
    delivered = deliver(tmp_path, candidate, now_s)
    found = with_weights(build(SearchTrial(3, KNOWN)), Path(delivered.weights))
    torch.testing.assert_close(found.state_dict(), kept[1])
    assert delivered.score == 0.9 and not found.training
    again = run_of(final, dataclasses.replace(TASK, score=falling))
    again.begin(1.0, resumed=False)
    steps(again, 1, [])
    again.close()
    assert deliver(tmp_path, candidate, now_s).score == 0.9, "an earlier process had better ones"


def test_what_is_delivered_scores_what_is_said(tmp_path) -> None:
    """Of a candidate that was killed as well: its checkpoint may be older or newer than its last judgement."""
    folder = tmp_path / "candidates" / "3"
    run = run_of(order(folder))
    run.begin(1.0, resumed=False)
    run.save()
    steps(run, 5, told := [])
    run.close()
    delivered = deliver(tmp_path, Candidate(number=3, params=KNOWN), time.time())
    found = with_weights(build(SearchTrial(3, KNOWN)), Path(delivered.weights))
    assert delivered.score == default_score(found, [data()[1]], default_loss)
    assert delivered.score == max(one.point.score for one in told) == told[-1].best_score


def test_a_candidate_without_weights_cannot_be_delivered(tmp_path) -> None:
    with pytest.raises(SearchError, match="weights of candidate 3 must be in"):
        deliver(tmp_path, Candidate(number=3, params=KNOWN), time.time())


def test_a_trial_tells_what_plans_would_gain_before_it_trains_for_long(tmp_path) -> None:
    """First so short a training that an outline will do, then a long one, which a price by plans precedes."""
    answers = [Go(until_s=1e-4, granted_s=1e-4), Go(until_s=2e-4, granted_s=1e3), Stop()]
    told: list[Any] = []
    link: Any = SimpleNamespace(recv=lambda: answers.pop(0), send=told.append, poll=lambda: False)
    given = order(tmp_path)
    run = run_of(given)
    run.price()
    run.continue_for = lambda _: None  # type: ignore[method-assign]  # a plan is another test's matter
    _explore(run, given, link)
    kinds = [type(one).__name__ for one in told if not isinstance(one, Judged)]
    assert kinds == ["RungEnd", "Priced", "RungEnd", "Ended"]
    assert not next(one.price.is_rough for one in told if isinstance(one, Priced))

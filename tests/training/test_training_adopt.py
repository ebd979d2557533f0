"""Adoption during the first steps: every step trains once, whoever runs it, fails or comes late."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import partita
from partita.plan import Prediction, Worker
from partita.runtime import compiling, segments
from partita.runtime.segments import CompileWarning
from partita.training import adopt, parallelize, shared_plans
from partita.training.adopt import Adoption
from partita.training.events import CandidateMeasured, PlanChosen, subscribe
from partita.training.graph_runner import GraphRunner
from partita.training.job import Team

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
MOST_STEPS = 20_000  # by far more than a race of candidates has: turns of up to 61 steps, more the shorter steps are
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))


def net() -> nn.Module:
    torch.manual_seed(3)
    # Without a bias before the normalisation: its gradient is zero but for rounding, which AdamW would blow up.
    layers = (nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
    return nn.Sequential(*layers)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(count: int, rows: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator))
        for _ in range(count)
    ]


def plain(count: int, data: list[Batch], change: Callable[[nn.Module, int], None] = lambda *_: None) -> Any:
    """Losses, and the model, after steps of plain PyTorch."""
    model = net()
    optimizer = adam(model)
    losses = []
    torch.manual_seed(7)
    for index in range(count):
        change(model, index)
        optimizer.zero_grad()
        loss = loss_fn(model, data[index % len(data)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def compare(
    made: list[float], model: nn.Module, data: list[Batch], change: Callable[[nn.Module, int], None] = lambda *_: None
) -> None:
    losses, expected = plain(len(made), data, change)
    assert made == pytest.approx(losses, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


def train(
    data: list[Batch],
    *,
    more: int = 5,
    compile: Any = False,
    change: Callable[[nn.Module, int], None] = lambda *_: None,
) -> tuple[partita.Step, list[float], nn.Module]:
    """Steps until a plan is adopted, and a few with it."""
    model = net()
    torch.manual_seed(7)
    made = partita.parallelize(model, adam(model), loss_fn, data[0], compile=compile)
    losses: list[float] = []
    with made:
        while more and len(losses) < MOST_STEPS:
            change(model, len(losses))
            losses.append(made(data[len(losses) % len(data)]).loss)
            more -= made.is_settled
    return made, losses, model


def test_the_first_steps_train_as_plain_pytorch_does() -> None:
    data = batches(7)
    seen: list[Any] = []
    unsubscribe = subscribe(seen.append)
    made, losses, model = train(data)
    unsubscribe()
    compare(losses, model, data)
    measured = {event.plan.mode for event in seen if isinstance(event, CandidateMeasured)}
    assert measured == {"block", "graph"}
    first, last = (event.plan for event in seen if isinstance(event, PlanChosen))
    assert first.mode == "block" and last == made.plan
    assert made.plan.measured_step_time_s is not None and made.plan.alternatives
    assert all(item.measured_step_time_s is not None for item in made.plan.alternatives)


def test_a_step_takes_as_long_as_on_the_slowest_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another process, which does not exist, takes a second for plans that are fast here."""
    running: list[partita.Plan] = []
    whole, alone = Adoption.next_runner, Team.gather

    def noted(self: Adoption) -> Any:
        runner = whole(self)
        running.append(self._candidates[self._index].plan)
        return runner

    def gather(self: Team, item: Any, doing: str) -> list[Any]:
        told = alone(self, item, doing)
        if doing == "the adoption of a plan" and told[0][1] is not None and running[-1].mode == "graph":
            told.append((told[0][0], 1.0, told[0][2]))
        return told

    monkeypatch.setattr(Adoption, "next_runner", noted)
    monkeypatch.setattr(Team, "gather", gather)
    made, _, _ = train(batches(7))
    assert made.plan.mode == "block"
    graphs = [one for one in made.plan.alternatives if "plain" not in one.description]
    assert graphs and all(one.measured_step_time_s == 1.0 for one in graphs)


def partly_failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graph plans make their whole step, and then fail."""
    failed: list[int] = []
    whole = GraphRunner.step

    def broken(self: GraphRunner, *args: Any, update: bool = True, **options: Any) -> Any:
        whole(self, *args, update=update, **options)
        failed.append(int(update))
        raise RuntimeError("it breaks after everything was changed")

    monkeypatch.setattr(GraphRunner, "step", broken)
    return failed


def test_a_candidate_that_fails_after_it_changed_everything_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = partly_failing(monkeypatch)
    data = batches(7)
    made, losses, model = train(data)
    assert failed and all(failed) and made.plan.mode == "block"
    compare(losses, model, data)
    assert any("it breaks after" in item.reason for item in made.plan.alternatives)


def test_what_cannot_be_undone_is_tried_without_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = partly_failing(monkeypatch)
    monkeypatch.setattr(parallelize, "fits", lambda *_: False)
    data = batches(7)
    made, losses, model = train(data)
    assert failed and not any(failed) and made.plan.mode == "block"
    compare(losses, model, data)


def test_a_candidate_that_cannot_be_set_up_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parallelize.make_runner

    def picky(setup: Any, plan: partita.Plan, *rest: Any) -> Any:
        if plan.mode == "graph":
            raise MemoryError("no room")
        return whole(setup, plan, *rest)

    monkeypatch.setattr(parallelize, "make_runner", picky)
    data = batches(7)
    made, losses, model = train(data)
    compare(losses, model, data)
    assert any("no room" in item.reason for item in made.plan.alternatives)


def test_a_change_of_the_model_ends_the_adoption_and_is_followed() -> None:
    def freeze(model: nn.Module, index: int) -> None:
        if index == 4:
            model[0].requires_grad_(False)  # type: ignore[index]

    data = batches(7)
    _, losses, model = train(data, change=freeze)
    assert len(losses) <= 4 + 6
    compare(losses, model, data, freeze)


def test_batches_of_another_shape_come_in_between() -> None:
    data = [*batches(3), *batches(1, rows=5)]
    _, losses, model = train(data)
    compare(losses, model, data)


def test_a_run_that_ends_before_a_plan_is_adopted(tmp_path: Path) -> None:
    data = batches(7)
    model = net()
    torch.manual_seed(7)
    optimizer = adam(model)
    with partita.parallelize(model, optimizer, loss_fn, data[0], compile=False) as made:
        losses = [made(data[index]).loss for index in range(3)]
        assert not made.is_settled
    compare(losses, model, data)
    steps = {int(state["step"]) for state in optimizer.state_dict()["state"].values()}
    assert steps == {3}
    (kept,) = tmp_path.glob("plans/*.json")
    planned = json.loads(kept.read_text())["kept"]
    assert len(planned) > 1 and all(one["step_time_s"] is None for one in planned)
    again, _, _ = train(data)  # planned before, but not measured: all candidates are tried
    assert len(again.plan.alternatives) + 1 == len(planned)
    assert all(one["step_time_s"] > 0 for one in json.loads(kept.read_text())["kept"])


def test_a_checkpoint_made_and_loaded_in_between(tmp_path: Path) -> None:
    data = batches(7)
    model = net()
    torch.manual_seed(7)
    with partita.parallelize(model, adam(model), loss_fn, data[0], compile=False) as made:
        losses = [made(data[index]).loss for index in range(5)]
        made.save(tmp_path / "saved")
        for index in range(4):
            made(data[index])
        made.load(tmp_path / "saved")
        losses += [made(data[index % 7]).loss for index in range(5, 12)]
    compare(losses, model, data)


def test_what_was_adopted_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = batches(7)
    first, _, _ = train(data)
    asked: list[int] = []
    monkeypatch.setattr(shared_plans, "ranked_plans", lambda *_, **__: asked.append(1))
    second, losses, model = train(data)
    assert not asked
    compare(losses, model, data)
    tried = {second.plan.hash, *(item.description for item in second.plan.alternatives)}
    assert first.plan.hash in tried or adopt.describe(first.plan) in tried
    assert second.plan.mode == "block" or any("plain" in text for text in tried)
    assert second.plan.measured_step_time_s is not None  # of that run, where only one plan is left


@pytest.mark.parametrize("content", ["", "{}", '{"question": "another", "kept": []}', "not JSON"])
def test_a_damaged_memory_is_none(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(7)
    train(data, more=1)
    (kept,) = tmp_path.glob("plans/*.json")
    kept.write_text(content)
    asked: list[int] = []
    whole = shared_plans.ranked_plans

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(shared_plans, "ranked_plans", counted)
    train(data, more=1)
    assert asked


def test_plans_of_another_graph_are_not_recalled(tmp_path: Path) -> None:
    """Even where the name of the file is the same."""
    train(batches(7), more=1)
    (kept,) = tmp_path.glob("plans/*.json")
    text = kept.read_text()
    kept.unlink()
    train(batches(7, rows=6), more=1)
    (other,) = tmp_path.glob("plans/*.json")
    assert other.name != kept.name
    other.write_text(text)
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = shared_plans.ranked_plans
        patch.setattr(shared_plans, "ranked_plans", lambda *a, **o: (asked.append(1), whole(*a, **o))[1])
        train(batches(7, rows=6), more=1)
    assert asked


def test_without_a_compiler_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallelize, "has_compiler", lambda: False)
    data = batches(7)
    with pytest.warns(CompileWarning, match=r"no C\+\+ compiler was found"):
        made, losses, model = train(data, compile="auto")
    assert not made.plan.compiled
    compare(losses, model, data)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_compiled_candidates_come_in_when_they_are_ready() -> None:
    """Steps go on meanwhile, and all of them train."""
    data = batches(7)
    model = net()
    torch.manual_seed(7)
    ran: list[tuple[str, bool]] = []
    with partita.parallelize(model, adam(model), loss_fn, data[0]) as made:
        losses: list[float] = []
        while not made.is_settled and len(losses) < 200_000:
            losses.append(made(data[len(losses) % 7]).loss)
            if made._adoption is not None:
                plan = made._adoption._candidates[made._adoption._index].plan
                ran.append((plan.mode, plan.compiled))
    assert ran[0] == ("block", False)
    assert ("graph", True) in ran and ran.index(("graph", True)) > ran.index(("graph", False))
    assert made.plan.measured_step_time_s is not None


@pytest.mark.slow
def test_a_compiler_that_fails_in_the_background_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setattr(parallelize, "has_compiler", lambda: True)
    monkeypatch.setattr(segments, "_MADE", {})  # what other tests have had compiled
    surroundings = compiling._surroundings.__wrapped__  # not what an earlier test has had it remember
    monkeypatch.setattr(compiling, "_surroundings", surroundings)
    data = batches(3)
    model = net()
    torch.manual_seed(7)
    losses: list[float] = []
    with (
        pytest.warns(CompileWarning, match="could not be compiled"),
        partita.parallelize(model, adam(model), loss_fn, data[0]) as made,
    ):
        while not made.is_settled and len(losses) < 200_000:
            losses.append(made(data[len(losses) % 3]).loss)
    assert made.is_settled


@pytest.mark.parametrize(
    ("memory_mib", "step_time_s", "compiled", "stays"),
    [
        (2600, 0.99, False, False),
        (2600, 0.9, False, True),
        (2400, 0.99, False, True),
        (2600, 0.99, True, True),
    ],
)
def test_a_plan_that_takes_much_memory_for_little_speed_is_not_tried(
    memory_mib: int, step_time_s: float, compiled: bool, stays: bool
) -> None:
    """A job's peak is that of the hungriest plan that it has tried; compiled plans are not held against others."""

    def plan(num_mib: int, time_s: float, compiled: bool) -> partita.Plan:
        worker = Worker(index=0, process=0, machine=0, cores=(0,), stage=0, data=0)
        prediction = Prediction(
            step_time_s=time_s, lower_bound_s=time_s, uncertainty=0.1, memory_bytes={"0": num_mib * 2**20}, bytes_sent=0
        )
        return partita.Plan(
            mode="graph", graph_fingerprint="", cluster_fingerprint="", axes={"data": 1}, workers=(worker,),
            threads_per_worker=1, compiled=compiled, prediction=prediction,
        )  # fmt: skip

    lean, hungry = plan(2000, 1.0, False), plan(memory_mib, step_time_s, compiled)
    assert (hungry in parallelize._finalists((lean, hungry))) is stays
    assert lean in parallelize._finalists((lean, hungry))
    tiny = plan(100, 1.0, False)  # a quarter more of little is little
    assert len(parallelize._finalists((tiny, plan(300, 0.99, False)))) == 2


def test_what_was_measured_at_a_bad_moment_is_measured_again(tmp_path: Path) -> None:
    """A plan that is predicted to be faster than the best one stays in the race, however slow it was."""
    data = batches(7)
    train(data, more=1)
    (kept,) = tmp_path.glob("plans/*.json")
    found = json.loads(kept.read_text())
    plans = [one for one in found["kept"] if one["plan"]["mode"] == "graph"]
    assert plans
    unlucky = plans[0]
    for one in found["kept"]:
        one["step_time_s"] = 1.0
    unlucky["step_time_s"] = 100.0
    unlucky["plan"]["prediction"]["step_time_s"] = 0.5
    kept.write_text(json.dumps(found))
    second, _, _ = train(data, more=1)
    tried = 1 + len(second.plan.alternatives)
    unlucky["plan"]["prediction"]["step_time_s"] = 2.0
    kept.write_text(json.dumps(found))
    third, _, _ = train(data, more=1)
    assert tried == 2 + len(third.plan.alternatives)

"""Checkpoints while training goes on, and training that goes on from them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import ONE, Trap, batch_of, build, write
from plain_training import loss_fn, train_plain

import partita
from partita import Checkpoints, Constraints
from partita.errors import InputError
from partita.training.events import Checkpointed, WarningRaised, subscribe

# In the background -------------------------------------------------------------------------------------------------


def plain_losses(num_steps: int) -> list[float]:
    return train_plain(*build(), map(batch_of, range(num_steps)))


@pytest.mark.parametrize("plan", [ONE, Constraints(data=2, num_workers=2, compiled=False, num_microbatches=1)])
def test_a_checkpoint_in_the_background_holds_what_was_when_it_was_asked_for(tmp_path: Path, plan: Constraints) -> None:
    model, optimizer = build()
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan) as step:
        losses = [step(batch_of(index)).loss for index in range(2)]
        saving = step.save_async(tmp_path)
        losses += [step(batch_of(index)).loss for index in range(2, 4)]
        path = saving.wait()
        assert saving.is_over and Path(path).name == "step-00000002"
    other, other_optimizer = build(3)
    with partita.parallelize(other, other_optimizer, loss_fn, batch_of(0), plan=ONE) as step:
        step.load(path)
        assert step.num_steps == 2
        again = [step(batch_of(index)).loss for index in range(2, 4)]
    assert losses == pytest.approx(plain_losses(4), rel=1e-4) and again == pytest.approx(losses[2:], rel=1e-4)


def test_checkpoints_come_by_themselves_and_training_resumes(tmp_path: Path) -> None:
    settings, seen = Checkpoints(tmp_path, every_steps=2, keep=3), []
    unsubscribe = subscribe(seen.append)
    losses: list[float] = []
    for most in (5, 9):  # the first run ends after step 5, its last checkpoint is of step 4
        model, optimizer = build(most)
        if most == 5:
            model, optimizer = build()
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=settings) as step:
            losses = losses[: step.num_steps]
            assert step.num_steps == (0 if most == 5 else 4)
            while step.num_steps < most:
                losses.append(step(batch_of(step.num_steps)).loss)
    unsubscribe()
    assert losses == pytest.approx(plain_losses(9), rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (4, 6, 8)]
    told = [(event.action, event.step) for event in seen if isinstance(event, Checkpointed)]
    assert told == [("saved", 2), ("saved", 4), ("loaded", 4), ("saved", 6), ("saved", 8)]


def test_never_resuming_leaves_checkpoints_alone(tmp_path: Path) -> None:
    write(tmp_path, 7)
    model, optimizer = build()
    with partita.parallelize(
        model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=str(tmp_path), resume="never"
    ) as step:
        assert step.num_steps == 0
        step(batch_of(0))
        assert Path(step.save()).name == "step-00000001"


def test_a_failure_in_the_background_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    seen: list[Any] = []
    unsubscribe = subscribe(seen.append)
    model, optimizer = build()
    settings = Checkpoints(tmp_path, every_steps=1)
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=settings) as step:
        monkeypatch.setattr("partita.training.checkpoint.saver.write_chunks", fail)
        step(batch_of(0))
        step(batch_of(1))
        monkeypatch.undo()
        step(batch_of(2))
    unsubscribe()
    told = [event.message for event in seen if isinstance(event, WarningRaised)]
    assert told and "No space left" in told[0] and "step 1" in told[0]
    assert "step-00000003" in [path.name for path in tmp_path.iterdir()]


# Besides the model -------------------------------------------------------------------------------------------------


def test_schedulers_go_on_where_they_were(tmp_path: Path) -> None:
    def make() -> tuple[Any, ...]:
        model, optimizer = build()
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    model, optimizer, scheduler = make()
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE) as step:
        for index in range(3):
            step(batch_of(index))
            scheduler.step()
        step.save(tmp_path, also={"scheduler": scheduler})
        wanted = step(batch_of(3)).loss, scheduler.state_dict()
    model, optimizer, scheduler = make()
    settings = Checkpoints(tmp_path, also={"scheduler": scheduler})
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=settings) as step:
        assert [group["lr"] for group in optimizer.param_groups] == [0.015, 0.005]
        assert (step(batch_of(3)).loss, scheduler.state_dict()) == wanted


def test_what_has_no_state_or_an_unsafe_one_is_refused(tmp_path: Path) -> None:
    class Unsafe:
        def state_dict(self) -> dict[str, Any]:
            return {"trap": Trap()}

        def load_state_dict(self, state: Any) -> None: ...

    model, optimizer = build()
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE) as step:
        with pytest.raises(InputError, match="state_dict"):
            step.save(tmp_path, also={"count": 3})  # type: ignore[dict-item]
        with pytest.raises(InputError, match="'loader' must consist of tensors"):
            step.save(tmp_path, also={"loader": Unsafe()})
        with pytest.raises(InputError, match="must have a folder"):
            step.save()
    assert not Trap.sprung and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"folder": 3}, {"every_steps": 0}, {"keep": True}, {"also": [1]}])
def test_settings_of_a_wrong_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Checkpoints(**{"folder": "x", **options})

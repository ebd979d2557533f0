"""What changes between steps outside of the graph is followed as plain PyTorch follows it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partita
from partita.errors import InputError
from partita.training.watch import Watch

NUM_STEPS = 8
SETTINGS = {"beta": 0.0}
SHIFT = torch.zeros(5)
CONFIG = SimpleNamespace(scale=1.0, unused=0)
PLANS = {
    "one": partita.Constraints(num_workers=1, compiled=False),
    "data": partita.Constraints(data=2, num_workers=2, compiled=False),
    "pipeline": partita.Constraints(pipeline=2, num_workers=2, num_microbatches=1, compiled=False),
}


def penalty(model: Any) -> torch.Tensor:
    result: torch.Tensor = SETTINGS["beta"] * model[0].weight.pow(2).sum()
    return result


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]) + SHIFT, batch[1]) * CONFIG.scale + penalty(model)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 5))


Between = Callable[[int, Any, torch.optim.Optimizer], None]


def warm_up(step: int, model: Any, optimizer: Any) -> None:
    SETTINGS["beta"] = 0.02 * (step >= 3)


def shift(step: int, model: Any, optimizer: Any) -> None:
    global SHIFT
    if step == 3:
        SHIFT = torch.arange(5.0)


def scale(step: int, model: Any, optimizer: Any) -> None:
    CONFIG.scale = 2.0 if step >= 4 else 1.0


def evaluation(step: int, model: Any, optimizer: Any) -> None:
    model.train(step < 4 or step > 5)


def no_dropout(step: int, model: Any, optimizer: Any) -> None:
    model[3].p = 0.5 if step < 4 else 0.0


def freeze(step: int, model: Any, optimizer: Any) -> None:
    model[0].requires_grad_(not 2 <= step < 5)


def new_weights(step: int, model: Any, optimizer: Any) -> None:
    if step == 4:
        model[0].weight.data = torch.full((16, 6), 0.1)


def new_buffer(step: int, model: Any, optimizer: Any) -> None:
    if step == 4:
        model[1].running_mean = torch.ones(16)


def clip(step: int, model: Any, optimizer: Any) -> None:
    if step == 3:
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.05) and None)


def thaw(step: int, model: Any, optimizer: Any) -> None:
    model[0].requires_grad_(step >= 4)


def new_layer(step: int, model: Any, optimizer: Any) -> None:
    if step == 4:
        torch.manual_seed(5)
        model[4] = nn.Linear(16, 5)
        optimizer.param_groups[0]["params"] = list(model.parameters())


def hook(step: int, model: Any, optimizer: Any) -> None:
    if step == 3:
        model[2].register_forward_hook(lambda module, given, output: output * 0.5)


def another_step(step: int, model: Any, optimizer: Any) -> None:
    if step == 2:
        plain = optimizer.step

        def clipped(*args: Any, **kwargs: Any) -> Any:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            return plain(*args, **kwargs)

        optimizer.step = clipped


CHANGES: tuple[Between, ...] = (
    warm_up, shift, scale, evaluation, no_dropout, freeze, new_weights, new_buffer, clip, thaw, new_layer, hook,
    another_step,
)  # fmt: skip


@pytest.fixture(autouse=True)
def settings() -> Any:
    global SHIFT
    yield
    SETTINGS["beta"], CONFIG.scale, CONFIG.unused, SHIFT = 0.0, 1.0, 0, torch.zeros(5)


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(NUM_STEPS)
    ]


def train(between: Between, plan: partita.Constraints | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    step = None
    if plan is not None:
        step = partita.parallelize(model, optimizer, loss_fn, batches()[0], plan=plan)
    for index, batch in enumerate(batches()):
        between(index, model, optimizer)
        torch.manual_seed(index)
        if step is not None:
            losses.append(step(batch).loss)
            continue
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if step is not None:
        assert step.plan.mode == "graph"
        step.close()
    return losses, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("between", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_steps_are_followed(between: Between, plan: str, settings: Any) -> None:
    expected_losses, expected = train(between, None)
    SETTINGS["beta"], CONFIG.scale = 0.0, 1.0
    globals()["SHIFT"] = torch.zeros(5)
    losses, got = train(between, PLANS[plan])
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_parameters_that_the_optimizer_does_not_hold_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with partita.parallelize(model, optimizer, loss_fn, batches()[0], plan=PLANS["data"]) as step:
        step(batches()[0])
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        with pytest.raises(InputError, match="must hold parameters of the model"):
            step(batches()[0])


def test_what_has_no_part_in_the_step_is_looked_at_once() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with partita.parallelize(model, optimizer, loss_fn, batches()[0], plan=PLANS["data"]) as step:
        for index in range(20):
            CONFIG.unused = index
            step(batches()[0])
        assert len(step._runners) == 1


def test_a_number_that_changes_in_every_step_ends_in_plain_pytorch_with_a_warning() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with partita.parallelize(model, optimizer, loss_fn, batches()[0], plan=PLANS["data"]) as step:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for index in range(14):
                SETTINGS["beta"] = 0.01 * index
                step(batches()[0])
        messages = [str(item.message) for item in caught if "one block of plain PyTorch" in str(item.message)]
        assert len(messages) == 1
        assert "as a tensor in the batch" in messages[0]


def test_the_watch_names_what_changed() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch = Watch(model, loss_fn, optimizer)
    assert watch.changes() is None
    model[3].p = 0.25
    change = watch.changes()
    assert change is not None and change.names == ("3.p",) and not change.structural
    watch.renew()
    model[4] = nn.Linear(16, 5)
    change = watch.changes()
    assert change is not None and change.structural


def test_the_optimizers_state_is_current_when_asked_for() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with partita.parallelize(model, optimizer, loss_fn, batches()[0], plan=PLANS["data"]) as step:
        for batch in batches():
            step(batch)
        state = optimizer.state_dict()["state"]
    assert len(state) == len(list(model.parameters()))
    assert all(bool(item["momentum_buffer"].abs().sum() > 0) for item in state.values())


def _cells() -> tuple[Callable[[Any, Any], torch.Tensor], Callable[[], None]]:
    def closed(model: Any, batch: Any) -> torch.Tensor:
        return loss_fn(model, batch) * factor

    def assign() -> None:
        nonlocal factor
        factor = 2.0

    if not callable(closed):
        factor = 1.0  # never: the closure's cell is empty
    return closed, assign


def _new_default(function: Any) -> None:
    function.__defaults__ = (3.0,)


def _other_groups(optimizer: torch.optim.Optimizer) -> None:
    last = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [last]})


def _with_tensor_hook(model: Any) -> None:
    model[0].weight.register_hook(lambda gradient: gradient * 2)


TOUCHES: dict[str, Callable[[Any, Any, Any, Callable[[], None]], object]] = {
    "a hook of a module": lambda model, *_: model[1].register_forward_pre_hook(lambda *__: None),
    "a hook of a tensor": lambda model, *_: _with_tensor_hook(model),
    "another place of values": lambda model, *_: setattr(model[1].weight, "data", torch.ones(16)),
    "another buffer": lambda model, *_: model[1].register_buffer("running_var", torch.ones(16)),
    "a buffer that was none": lambda model, *_: model[1].register_buffer("more", torch.ones(1)),
    "a frozen parameter": lambda model, *_: model[4].bias.requires_grad_(False),
    "a new attribute": lambda model, *_: setattr(model[2], "slope", 0.5),
    "a mode": lambda model, *_: model[3].eval(),
    "a default": lambda model, function, *_: _new_default(function),
    "an empty cell": lambda model, function, optimizer, assign: assign(),
    "the optimizer's groups": lambda model, function, optimizer, assign: _other_groups(optimizer),
    "autocast": lambda *_: torch.set_autocast_enabled("cpu", True),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_nothing_escapes_the_quick_comparison(name: str) -> None:
    model, (function, assign) = net(), _cells()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch = Watch(model, function, optimizer)
    model[3].p = float("0.5")  # another object that is equal
    assert watch.changes() is None and watch.changes() is None
    try:
        TOUCHES[name](model, function, optimizer, assign)
        assert watch.changes() is not None
        watch.renew()
        assert watch.changes() is None
    finally:
        torch.set_autocast_enabled("cpu", False)


def test_a_global_that_was_not_there_is_seen() -> None:
    scope: dict[str, Any] = {"loss_fn": loss_fn}
    exec("def late(model, batch):\n    return loss_fn(model, batch) * late_factor\n", scope)
    model = net()
    watch = Watch(model, scope["late"], torch.optim.SGD(model.parameters(), lr=0.05))
    assert watch.changes() is None
    scope["late_factor"] = 2.0
    change = watch.changes()
    assert change is not None and change.names == ("late_factor (read by late)",)

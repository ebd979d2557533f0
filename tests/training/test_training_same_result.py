"""Forced plans give the losses and weights of plain PyTorch."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from plain_training import loss_fn, train_plain

import partita
from partita import Constraints

Batch = tuple[torch.Tensor, torch.Tensor]


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x_BTD)[0][:, -1])  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *[nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True) for _ in range(2)]
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x_BTD).mean(1))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def dropout_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 12), nn.Dropout(0.1), nn.Linear(12, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "batch_norm": (batch_norm, (6,)),
    "lstm": (Lstm, (5, 4)),
    "transformer": (Transformer, (5, 8)),
    "dropout": (dropout_mlp, (6,)),
    "transformer_dropout": (lambda: Transformer(0.1), (5, 8)),
}
CORNERS = {
    "one": Constraints(num_workers=1),
    "data2": Constraints(data=2, pipeline=1),
    "pipeline2": Constraints(data=1, pipeline=2),
    "both": Constraints(data=2, pipeline=2, threads_per_worker=1),
}


def batches(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(5)
    for rows in sizes:
        yield (
            torch.randn(rows, *shape, generator=generator),
            torch.randint(0, 3, (rows,), generator=generator),
        )


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    if name.startswith("transformer"):  # keys' biases have no gradient but rounding, which AdamW would blow up
        return model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def compare(
    name: str, constraints: Any, sizes: tuple[int, ...] = (8, 8, 8, 8), **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    data = list(batches(MODELS[name][1], sizes))
    plain, reference = build(name)
    torch.manual_seed(1)
    expected = train_plain(plain, reference, data)
    model, optimizer = build(name)
    with partita.parallelize(model, optimizer, loss_fn, data[0], plan=constraints, compile=False, **options) as step:
        torch.manual_seed(1)
        losses = [step(batch).loss for batch in data]
        other = copy.deepcopy(model)
        step.sync_to(other)
    assert losses == pytest.approx(expected, rel=1e-4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    return model, optimizer


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer_dropout"])
def test_forced_plans_equal_plain_pytorch(name: str, corner: str) -> None:
    compare(name, CORNERS[corner])


@pytest.mark.parametrize("corner", ["one", "data2"])
def test_dropout_on_transposed_activations(corner: str) -> None:
    """The masks are drawn in the order of the memory, as eager PyTorch does."""
    compare("transformer_dropout", CORNERS[corner])


class Gibbs(nn.Module):
    """Draws from what it computes, twice, and once from nothing but a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 3)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        hidden_BH = torch.bernoulli(torch.sigmoid(self.up(self.drop(x_BD))))
        visible_BD = torch.bernoulli(torch.sigmoid(hidden_BH @ self.up.weight).detach())
        return self.head(x_BD - visible_BD + (hidden_BH @ self.up.weight))  # type: ignore[no-any-return]


@pytest.mark.parametrize("corner", ["data2", "pipeline2", "both"])
def test_draws_that_depend_on_data_continue_one_stream(corner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed is set once: every later step goes on where plain PyTorch would."""
    monkeypatch.setitem(MODELS, "gibbs", (Gibbs, (6,)))
    compare("gibbs", CORNERS[corner])


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_microbatches_equal_plain_pytorch(name: str) -> None:
    compare(name, Constraints(data=1, pipeline=2, num_microbatches=4))


def test_other_batch_sizes_equal_plain_pytorch() -> None:
    compare("mlp", Constraints(data=2, pipeline=1), (8, 8, 5, 8, 1, 8))


def test_the_optimizer_state_is_the_users() -> None:
    _, optimizer = compare("mlp", CORNERS["data2"])
    plain, reference = build("mlp")
    train_plain(plain, reference, list(batches(MODELS["mlp"][1], (8, 8, 8, 8))))
    state, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert state.keys() == expected.keys()
    for index, values in expected.items():
        for key, value in values.items():
            torch.testing.assert_close(state[index][key], value, rtol=1e-3, atol=1e-5)


def test_training_continues_from_a_checkpoint_under_another_plan(tmp_path: Path) -> None:
    data = list(batches(MODELS["dropout"][1], (8,) * 6))
    plain, reference = build("dropout")
    torch.manual_seed(1)
    expected = train_plain(plain, reference, data)
    model, optimizer = build("dropout")
    with partita.parallelize(model, optimizer, loss_fn, data[0], plan=CORNERS["data2"], compile=False) as step:
        torch.manual_seed(1)
        losses = [step(batch).loss for batch in data[:3]]
        step.save(tmp_path)
    torch.manual_seed(99)
    model = MODELS["dropout"][0]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with partita.parallelize(model, optimizer, loss_fn, data[0], plan=CORNERS["pipeline2"], compile=False) as step:
        step.load(tmp_path)
        losses += [step(batch).loss for batch in data[3:]]
        assert step(data[0]).step == 7
    assert losses == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_captured_runs_as_one_block_and_says_so() -> None:
    def branching(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = loss_fn(model, batch)
        return loss * 2 if loss.item() > 0.5 else loss

    data = list(batches((6,), (8, 8, 5)))
    model, optimizer = build("mlp")
    with pytest.warns(partita.FallbackWarning, match="could not be captured"):
        step = partita.parallelize(model, optimizer, branching, data[0])
    with step, warnings.catch_warnings():
        losses = [step(batch).loss for batch in data]
        assert step.plan.mode == "block"
    plain, reference = build("mlp")
    for batch, loss in zip(data, losses, strict=True):
        reference.zero_grad()
        expected = branching(plain, batch)
        expected.backward()
        reference.step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("corner", ["data2", "pipeline2", "both"])
def test_a_loss_that_is_not_finite_spoils_nothing(corner: str) -> None:
    """Neither weights nor statistics change, and training goes on as if the bad batch had not been."""
    first, second = batches((6,), (8, 8))
    bad = (first[0].clone().index_fill_(0, torch.tensor([7]), torch.inf), first[1])
    plain, reference = build("batch_norm")
    expected = train_plain(plain, reference, [first, second])
    model, optimizer = build("batch_norm")
    with partita.parallelize(model, optimizer, loss_fn, first, plan=CORNERS[corner], compile=False) as step:
        losses = [step(first).loss]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(partita.NonFiniteLossError, match="no parameter was updated"):
            step(bad)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        losses.append(step(second).loss)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_state_that_the_user_loads_reaches_the_workers() -> None:
    data = list(batches((6,), (8, 8, 8, 8)))
    model, optimizer = build("mlp")
    with partita.parallelize(model, optimizer, loss_fn, data[0], plan=CORNERS["data2"], compile=False) as step:
        for batch in data[:2]:
            step(batch)
        step.sync_to(model)  # brings the optimizer's state into the user's optimizer
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        losses = [step(batch).loss for batch in data[2:]]
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert [step(batch).loss for batch in data[2:]] == losses


def test_auto_measures_plain_pytorch_too_and_leaves_the_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))  # no plan of an earlier run
    data = list(batches((6,), (8, 8, 8)))
    plain, reference = build("dropout")
    torch.manual_seed(1)
    expected = train_plain(plain, reference, data)
    model, optimizer = build("dropout")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[Any] = []
    unsubscribe = partita.subscribe(seen.append)
    torch.manual_seed(1)
    step = partita.parallelize(model, optimizer, loss_fn, data[0], compile=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not optimizer.state
    with step:
        losses = [step(batch).loss for batch in data]
        for _ in range(20_000):
            if step.is_settled:
                break
            step(data[0])
    unsubscribe()
    assert losses == pytest.approx(expected, rel=1e-4)
    measured = [event.plan.mode for event in seen if type(event).__name__ == "CandidateMeasured"]
    assert {"block", "graph"} <= set(measured)
    chosen = [event.plan for event in seen if type(event).__name__ == "PlanChosen"]
    assert chosen[-1] == step.plan and chosen[0].measured_step_time_s is None
    assert step.plan.measured_step_time_s is not None
    assert all(other.measured_step_time_s is not None or other.reason for other in step.plan.alternatives)

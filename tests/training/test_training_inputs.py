"""Bad input: each with an error that says what must hold."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import partita
from partita import Cluster, Constraints
from partita.training.inputs import TakenApart, check_structure, take_apart

X, Y = torch.randn(4, 3), torch.randn(4, 1)


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def make(batch: Any = (X, Y), loss_fn: Any = mse, **options: Any) -> partita.Step:
    model, optimizer = build()
    options.setdefault("plan", Constraints(num_workers=1, compiled=False))
    return partita.parallelize(model, optimizer, loss_fn, batch, **options)


def test_empty_batches() -> None:
    with pytest.raises(partita.InputError, match="at least one tensor"):
        make(batch={})
    with pytest.raises(partita.InputError, match="at least one row"):
        make(batch=(X[:0], Y[:0]))


def test_first_batch_smaller_than_the_data_axis() -> None:
    with pytest.raises(partita.InputError, match="1 rows for"):
        make(batch=(X[:1], Y[:1]), plan=Constraints(data=2, pipeline=1))


def test_losses_that_cannot_be_trained_on() -> None:
    with pytest.raises(partita.InputError, match="scalar"):
        make(loss_fn=lambda model, batch: model(batch[0]))
    with pytest.raises(partita.InputError, match="depend"):
        make(loss_fn=lambda model, batch: batch[0].sum())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sync": "sometimes"}, "sync"),
        ({"check_finite": "always"}, "check_finite"),
        ({"plan": "best"}, "plan must be"),
        ({"cluster": Cluster.preset("2x1xcpu-4")}, "described cluster"),
        ({"cluster": "4x8xH100"}, r"Cluster\.preset\('4x8xH100'\)"),
        ({"cluster": "mine.toml"}, r"Cluster\.load\('mine.toml'\)"),
        ({"cluster": 3}, "cluster must be a partita.Cluster, but got int 3"),
        ({"compile": "yes"}, "compile must be True, False"),
        ({"compile": None}, "compile must be True, False"),
        ({"timeout_s": "60"}, "timeout_s must be a positive"),
        ({"timeout_s": -1}, "timeout_s must be a positive"),
        ({"timeout_s": math.nan}, "timeout_s must be a positive"),
        ({"timeout_s": True}, "timeout_s must be a positive"),
        ({"loss_fn": None}, "loss_fn must be a function"),
    ],
)
def test_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(partita.InputError, match=match):
        make(**options)


@pytest.mark.parametrize("model", [None, lambda x: x, nn.Linear])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(partita.InputError, match=r"must be a torch\.nn\.Module"):
        partita.parallelize(model, build()[1], mse, (X, Y))
    with pytest.raises(partita.InputError, match=r"must be a torch\.nn\.Module"):
        partita.plan(model, mse, (X, Y))


def test_a_lazy_model_that_has_not_run() -> None:
    model = nn.Sequential(nn.LazyLinear(1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.raises(partita.InputError, match="Run the model once"):
        partita.parallelize(model, optimizer, mse, (X, Y))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"constraints": {"data": 2}}, r"partita\.Constraints\(\*\*"),
        ({"constraints": 2}, "constraints must be partita.Constraints or None, but got int 2"),
        ({"optimizer": "sgd"}, r"optimizer must be a torch\.optim\.Optimizer or None, but got str 'sgd'"),
        ({"cluster": "4x8xH100"}, r"Cluster\.preset\('4x8xH100'\)"),
    ],
)
def test_arguments_of_plan(options: dict[str, Any], match: str) -> None:
    with pytest.raises(partita.InputError, match=match):
        partita.plan(build()[0], mse, (X, Y), **options)


def test_arguments_of_a_step() -> None:
    with make() as step:
        for call in (step.save, step.load):
            with pytest.raises(partita.InputError, match=r"must be a path.*but got int 3"):
                call(3)  # type: ignore[arg-type]
            with pytest.raises(partita.InputError, match=r"must have a folder, but got none"):
                call(None)
        with pytest.raises(partita.InputError, match=r"must be a torch\.nn\.Module"):
            step.sync_to(None)  # type: ignore[arg-type]
        with pytest.raises(partita.InputError, match="loader must be an iterable of batches, but got None"):
            partita.data.sharded(None, step)  # type: ignore[arg-type]
        with pytest.raises(partita.InputError, match="step must be what partita.parallelize returned"):
            partita.data.sharded([(X, Y)], None)  # type: ignore[arg-type]
        assert list(partita.data.sharded([1, 2], step)) == [1, 2]


def test_a_loss_that_is_a_number() -> None:
    with pytest.warns(partita.FallbackWarning, match="Python number is read"):
        step = make(loss_fn=lambda model, batch: model(batch[0]).sum().item())
    with step, pytest.raises(partita.InputError, match=r"scalar tensor, but got float.*without \.item"):
        step((X, Y))


def test_a_plan_for_another_model() -> None:
    other = nn.Linear(3, 2)
    plan = partita.plan(
        other, lambda m, b: m(b[0]).sum(), (X, Y), constraints=Constraints(num_workers=1, compiled=False)
    )
    with pytest.raises(partita.PlanError, match="another model"):
        make(plan=plan)


def test_later_batches_must_have_the_structure_of_the_first() -> None:
    with make() as step:
        with pytest.raises(partita.InputError, match="structure"):
            step({"x": X})
        with pytest.raises(partita.InputError, match="dtype"):
            step((X.double(), Y))
        assert step((X, Y)).step == 1


@pytest.mark.parametrize("mode", ["step", "op"])
def test_nan_loss_names_the_step(mode: Any) -> None:
    with make(check_finite=mode) as step:
        step((X, Y))
        with pytest.raises(partita.NonFiniteLossError, match="step 2"):
            step((X.log(), Y))


def test_nan_loss_names_the_op_and_changes_nothing() -> None:
    def logarithm(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]).sum() * batch[1].sum()).log().mean()

    model, optimizer = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Constraints(num_workers=1, compiled=False)
    with partita.parallelize(model, optimizer, logarithm, (X, Y), plan=plan, check_finite="op") as step:
        sign = -1.0 if float((model(X).sum() * Y.sum()).detach()) > 0 else 1.0
        with pytest.raises(partita.NonFiniteLossError, match=r"aten\.log"):
            step((X, Y * sign))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_closed_step_refuses() -> None:
    step = make()
    step.close()
    step.close()
    with pytest.raises(partita.StepError, match="closed"):
        step((X, Y))
    with pytest.raises(partita.StepError, match="closed"):
        step.rows_needed(4)


def test_take_apart_keeps_what_a_graph_depends_on() -> None:
    first, same, other = take_apart((X, 3)), take_apart((Y.expand(4, 3), 3)), take_apart((X, 4))
    assert first.key == same.key
    assert first.key != other.key
    assert first.rows == 4
    with pytest.raises(partita.InputError, match="dims"):
        check_structure(take_apart((X[0], 3)).key, first.key)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("make_model", "batch", "match"),
    [
        (Lookup, torch.randint(0, 10, (4, 2)), "sparse_coo"),
        (lambda: torch.jit.script(nn.Linear(3, 1)), X, "TorchScript"),
    ],
)
def test_what_is_no_graph_of_dense_tensors_trains_as_a_block(make_model: Any, batch: Any, match: str) -> None:
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    with pytest.warns(partita.FallbackWarning, match=match):
        step = partita.parallelize(model, optimizers[0], square, batch, plan=Constraints(data=2, compiled=False))
    with step:
        for _ in range(2):
            loss = square(twin, batch)
            loss.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            assert step(batch).loss == pytest.approx(float(loss.detach()))


def _batch(draw: st.DrawFn) -> Any:
    leaves = draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3))
    names = draw(st.permutations(["a", "b", "c"]))[: len(leaves)]
    kinds: list[Any] = [tuple(leaves), list(leaves), dict(zip(names, leaves, strict=True)), {"x": leaves}, leaves[0]]
    return draw(st.sampled_from(kinds))


LEAVES: list[Any] = [X, X.double(), Y, Y[:2], X.clone(), nn.Parameter(X), torch.tensor(1.0), 3, "text", None, X[:0]]
batches = st.composite(_batch)


@settings(max_examples=300, deadline=None)
@given(st.lists(batches(), min_size=2, max_size=5))
def test_one_batch_after_the_other_is_taken_apart_as_each_alone(sequence: list[Any]) -> None:
    in_a_row = TakenApart()
    for batch in sequence:
        try:
            alone = take_apart(batch)
        except partita.InputError as error:
            with pytest.raises(partita.InputError, match=re.escape(str(error))):
                in_a_row(batch)
            continue
        found = in_a_row(batch)
        assert found.key == alone.key and hash(found.key) == hash(alone.key) and found.rows == alone.rows
        assert found.tensors.keys() == alone.tensors.keys()
        assert all(found.tensors[index] is leaf for index, leaf in alone.tensors.items())


@pytest.mark.parametrize("make_batch", [lambda: (X.clone(), Y), lambda: {"x": X.clone(), "y": Y}])
def test_the_key_of_equal_batches_is_one_object(make_batch: Any) -> None:
    in_a_row = TakenApart()
    assert in_a_row(make_batch()).key is in_a_row(make_batch()).key

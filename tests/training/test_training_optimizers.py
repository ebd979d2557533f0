from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import InputError
from partita.program.instructions import Slice
from partita.training.optimizers import (
    OptimizerFacts,
    OptimizerShards,
    by_fused_kernels,
    check_optimizer,
    fused_agrees,
    kind_of,
    state_elements,
)
from partita.training.torch_adapter import mark_stepped


class GlobalNorm(torch.optim.SGD):
    """Divides all gradients by their common norm: parameters are coupled."""

    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.grad.div_(norm)
        super().step()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "adadelta": lambda params: torch.optim.Adadelta(params),
    "adamax": lambda params: torch.optim.Adamax(params, lr=0.01),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.01),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
}


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.5)))
    return model


def gradients_of(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def run_plain(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, gradient in gradients_of(model, step).items():
            model.get_parameter(name).grad = gradient.clone()
        optimizer.step()


Layout = dict[int, tuple[tuple[Slice, ...], ...]]


def run_shards(model: torch.nn.Module, shards: OptimizerShards, layout: Layout, steps: range) -> None:
    for step in steps:
        shards.refresh_options()
        gradients = gradients_of(model, step)
        for worker, slices in ((worker, slices) for worker, updates in layout.items() for slices in updates):
            shards.update(worker, slices, [gradients[s.parameter].reshape(-1)[s.start : s.end] for s in slices])


def layout_of(model: torch.nn.Module, cut: float) -> Layout:
    """Two workers; the first makes an update for every parameter, the second one for all of them."""
    first, second = [], []
    for name, parameter in model.named_parameters():
        middle = round(parameter.numel() * cut)
        first += [Slice(name, 0, middle)] if middle else []
        second += [Slice(name, middle, parameter.numel())] if middle < parameter.numel() else []
    return {0: tuple((part,) for part in first), 1: (tuple(second),)}


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_standard_optimizers_are_element_wise(name: str) -> None:
    assert kind_of(OPTIMIZERS[name](make_model().parameters())) == "element"


def test_matrix_optimizers_need_whole_parameters() -> None:
    matrices = [p for p in make_model().parameters() if p.dim() == 2]
    assert kind_of(torch.optim.Muon(matrices, lr=0.01)) == "parameter"
    assert kind_of(torch.optim.Adafactor(matrices, lr=0.01)) == "parameter"


def test_a_common_norm_couples_parameters_even_at_learning_rate_zero() -> None:
    assert kind_of(GlobalNorm(make_model().parameters(), lr=0.0)) == "coupled"


def test_kind_leaves_the_random_generator_alone() -> None:
    before = torch.get_rng_state()
    kind_of(torch.optim.SGD(make_model().parameters(), lr=0.123, momentum=0.77))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slices_equal_the_whole_and_collect_gives_its_state(name: str) -> None:
    model, plain = make_model(), make_model()
    optimizer, reference = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    run_plain(plain, reference, range(5))
    layout = layout_of(model, 0.4)
    shards = OptimizerShards(optimizer, dict(model.named_parameters()), layout, whole=False)
    run_shards(model, shards, layout, range(3))
    shards.collect()
    run_shards(model, shards, layout, range(3, 5))
    shards.collect()
    assert_same(model, plain)
    state, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert state.keys() == expected.keys()
    for index in expected:
        assert state[index].keys() == expected[index].keys()
        for key, value in expected[index].items():
            torch.testing.assert_close(state[index][key], value, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(cut=st.floats(0, 1), other=st.floats(0, 1), turn=st.integers(0, 4))
def test_steps_continue_over_changing_layouts_and_the_user_own_steps(cut: float, other: float, turn: int) -> None:
    model, plain = make_model(), make_model()
    optimizer, reference = OPTIMIZERS["adamw"](model.parameters()), OPTIMIZERS["adamw"](plain.parameters())
    run_plain(plain, reference, range(6))
    run_plain(model, optimizer, range(turn))
    for fraction, steps in ((cut, range(turn, 5)), (other, range(5, 6))):
        layout = layout_of(model, fraction)
        shards = OptimizerShards(optimizer, dict(model.named_parameters()), layout, whole=False)
        run_shards(model, shards, layout, steps)
        shards.collect()
    assert_same(model, plain)


def test_groups_keep_their_options_and_schedulers_work() -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
        model = make_model()
        weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]  # `scale` is not in the optimizer
        optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 0.3}], lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    model, optimizer, scheduler = build()
    plain, reference, plain_scheduler = build()
    layout = layout_of(model, 0.5)
    shards = OptimizerShards(optimizer, dict(model.named_parameters()), layout, whole=False)
    for step in range(4):
        run_shards(model, shards, layout, range(step, step + 1))
        mark_stepped(optimizer)
        scheduler.step()
        run_plain(plain, reference, range(step, step + 1))
        plain_scheduler.step()
    assert_same(model, plain)
    assert float(model.scale.detach()) == 1.5  # type: ignore[operator]


def test_whole_parameters() -> None:
    model, plain = make_model(), make_model()
    optimizer, reference = (torch.optim.Adafactor(m.parameters(), lr=0.01, eps=(1e-30, 1e-3)) for m in (model, plain))
    layout = {
        0: ((Slice("0.weight", 0, 12), Slice("1.bias", 0, 2)),),
        1: ((Slice("1.weight", 0, 8), Slice("0.bias", 0, 4)), (Slice("scale", 0, 1),)),
    }
    shards = OptimizerShards(optimizer, dict(model.named_parameters()), layout, whole=True)
    run_shards(model, shards, layout, range(3))
    run_plain(plain, reference, range(3))
    assert_same(model, plain)


def test_loaded_state_is_taken_over() -> None:
    model, plain = make_model(), make_model()
    optimizer, reference = OPTIMIZERS["adam"](model.parameters()), OPTIMIZERS["adam"](plain.parameters())
    run_plain(plain, reference, range(2))
    layout = layout_of(model, 0.5)
    shards = OptimizerShards(optimizer, dict(model.named_parameters()), layout, whole=False)
    run_shards(model, shards, layout, range(4, 6))  # something else first
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    shards.load()
    run_shards(model, shards, layout, range(2, 4))
    run_plain(plain, reference, range(2, 4))
    assert_same(model, plain)


def test_fused_only_where_the_user_left_it_open() -> None:
    params = list(make_model().parameters())
    assert fused_agrees(torch.optim.AdamW(params))
    assert not fused_agrees(torch.optim.AdamW(params, fused=False))
    assert not fused_agrees(torch.optim.AdamW(params, foreach=True))
    assert not fused_agrees(torch.optim.Adadelta(params))


def test_state_is_counted() -> None:
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    counts = {
        torch.optim.SGD(weights, lr=0.0): 0,
        torch.optim.SGD([{"params": weights[:1], "momentum": 0.9}, {"params": weights[1:]}], lr=0.1): 1,
        torch.optim.AdamW(weights): 2,
        torch.optim.Adam(weights, amsgrad=True): 3,
        torch.optim.RMSprop(weights, momentum=0.9, centered=True): 3,
        torch.optim.Adafactor(weights): 0,
    }
    before = torch.get_rng_state()
    assert {optimizer: state_elements(optimizer) for optimizer in counts} == counts
    assert torch.equal(torch.get_rng_state(), before) and weights[0].grad is None

    class Stubborn(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("not on these")

    assert state_elements(Stubborn(weights)) == 2


def test_facts_for_planning() -> None:
    weights = [torch.nn.Parameter(torch.ones(3, 2))]
    fused, other = OptimizerFacts.of(torch.optim.AdamW(weights)), OptimizerFacts.of(torch.optim.Adamax(weights))
    assert (fused.name, fused.state_bytes_per_element, fused.update_values) == ("AdamW", 8.0, 0)
    assert (other.name, other.state_bytes_per_element, other.update_values) == ("Adamax", 8.0, 1)
    assert OptimizerFacts.of(None).update_values == 0


def test_unusable_optimizers_are_refused() -> None:
    model = make_model()
    named = dict(model.named_parameters())
    with pytest.raises(InputError, match="closure"):
        check_optimizer(torch.optim.LBFGS(model.parameters()), named)
    with pytest.raises(InputError, match="holds none"):
        check_optimizer(torch.optim.SGD(make_model().parameters()), named)
    with pytest.raises(InputError, match=r"torch\.optim\.Optimizer"):
        check_optimizer("adam", named)
    check_optimizer(torch.optim.SGD(model.parameters()), named)
    both = torch.optim.SGD([*model.parameters(), *make_model().parameters()])
    with pytest.raises(InputError, match="would never be updated"):
        check_optimizer(both, named)


def _stepped(optimizer_of: Any, *, fused: bool, sparse: bool) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """Parameters after three steps, the second one with a parameter more; the optimizer."""
    torch.manual_seed(0)
    table, weight = torch.nn.Embedding(10, 4, sparse=sparse), torch.nn.Parameter(torch.randn(4, 3))
    optimizer = optimizer_of([table.weight, weight])
    for step in range(3):
        optimizer.zero_grad()
        loss = table(torch.tensor([1, step, 7])).pow(2).sum()
        (loss + (weight.pow(3).sum() if step else 0.0)).backward()
        with by_fused_kernels(optimizer) if fused else contextlib.nullcontext():
            optimizer.step()
    return [table.weight.detach(), weight.detach()], optimizer


@pytest.mark.parametrize(
    ("optimizer_of", "sparse"),
    [
        (lambda items: torch.optim.SGD(items, lr=0.1, momentum=0.9), False),
        (lambda items: torch.optim.AdamW(items, lr=0.1), False),
        (lambda items: torch.optim.Adagrad(items, lr=0.1), False),
        (lambda items: torch.optim.SGD(items, lr=0.1), True),
    ],
    ids=["sgd", "adamw", "adagrad", "sgd, sparse"],
)
def test_a_block_may_step_by_fused_kernels(optimizer_of: Any, sparse: bool) -> None:
    expected, _ = _stepped(optimizer_of, fused=False, sparse=sparse)
    found, optimizer = _stepped(optimizer_of, fused=True, sparse=sparse)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert all(group["fused"] is None for group in optimizer.param_groups)

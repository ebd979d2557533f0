from __future__ import annotations

import random
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from partita.errors import CaptureError, InputError
from partita.graph import capture
from partita.graph.standins import Substitution


def _line_of(error: CaptureError) -> str:
    path, _, line = error.source.rpartition(":")
    with open(path) as file:
        return file.read().splitlines()[int(line) - 1]


def _loss(model: Any, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


class TestInputs:
    @pytest.mark.parametrize("batch", [(), {}, None, 3, {"a": [None, "b"]}])
    def test_a_batch_without_tensors(self, batch: Any) -> None:
        with pytest.raises(InputError, match="at least one tensor"):
            capture(nn.Linear(8, 2), _loss, batch)

    def test_a_batch_without_rows(self) -> None:
        with pytest.raises(InputError, match=r"at least one row.*batch\['x'\].*\(0, 8\)"):
            capture(nn.Linear(8, 2), _loss, {"x": torch.randn(0, 8)})

    @pytest.mark.parametrize("leaf", [np.zeros(3), object(), [torch.zeros(2).to_sparse()]])
    def test_leaves_that_would_be_baked_in_silently(self, leaf: Any) -> None:
        with pytest.raises(InputError, match=r"batch\[1\]"):
            capture(nn.Linear(8, 2), lambda m, b: _loss(m, b[0]), (torch.randn(3, 8), leaf))

    def test_what_is_no_module(self) -> None:
        with pytest.raises(InputError, match="nn.Module"):
            capture(lambda x: x, _loss, torch.randn(3, 8))  # type: ignore[arg-type]

    def test_compiled_modules(self) -> None:
        with pytest.raises(InputError, match=r"torch\.compile"):
            capture(torch.compile(nn.Linear(8, 2)), _loss, torch.randn(3, 8))
        model = nn.Sequential(nn.Linear(8, 2))
        model[0].compile()
        with pytest.raises(InputError, match="submodule '0'"):
            capture(model, _loss, torch.randn(3, 8))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
    @pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(3, 8))])
    @pytest.mark.parametrize("inside", [False, True])
    def test_torchscript_modules_are_left_as_they_were(self, make: Any, inside: bool) -> None:
        model = make(nn.Linear(8, 2))
        before = dict(model.named_parameters())
        with pytest.raises(CaptureError, match=r"TorchScript module.*torch\.jit\.script"):
            capture(nn.Sequential(model) if inside else model, _loss, torch.randn(3, 8))
        assert all(value is before[name] for name, value in model.named_parameters())
        model(torch.randn(3, 8)).sum().backward()

    def test_lazy_modules(self) -> None:
        with pytest.raises(InputError, match="Run the model once"):
            capture(nn.LazyLinear(2), _loss, torch.randn(3, 8))

    def test_nothing_to_train(self) -> None:
        with pytest.raises(InputError, match="requires_grad"):
            capture(nn.Linear(8, 2).requires_grad_(False), _loss, torch.randn(3, 8))
        with pytest.raises(InputError, match="requires_grad"):
            capture(nn.ReLU(), _loss, torch.randn(3, 8))


class TestLosses:
    @pytest.mark.parametrize(
        ("loss_fn", "message"),
        [
            (lambda m, b: m(b), r"scalar tensor, but got shape \(3, 2\)"),
            (lambda m, b: 1.5, "scalar tensor, but got float"),
            (lambda m, b: None, "scalar tensor, but got NoneType"),
            (lambda m, b: {"loss": m(b).sum()}, "scalar tensor, but got dict"),
            (lambda m, b: m(b).sum() * 1j, r"real floating-point type, but got torch\.complex64"),
            (lambda m, b: m(b).sum().long(), r"floating-point type, but got torch\.int64"),
            (lambda m, b: m(b).sum().detach(), "depend on a trainable parameter"),
            (lambda m, b: b.sum(), "depend on a trainable parameter"),
            (lambda m, b: b.clone().requires_grad_().sum(), "depend on a trainable parameter"),
        ],
    )
    def test_what_is_no_loss(self, loss_fn: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))

    def test_backward_inside_the_loss(self) -> None:
        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            loss = _loss(model, batch)
            loss.backward(retain_graph=True)
            return loss

        with pytest.raises(CaptureError, match="gradient"):
            capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))


class TestDataDependence:
    @pytest.mark.parametrize(
        ("change", "op"),
        [
            (lambda out: out * 2 if out.sum() > 0 else out, "_local_scalar_dense"),
            (lambda out: out * out.max().item(), "_local_scalar_dense"),
            (lambda out: out[out > 0], "nonzero"),
            (lambda out: out.masked_select(out > 0), "masked_select"),
            (lambda out: torch.unique(out), "unique"),
            (lambda out: out * float(out.detach().numpy().sum()), ""),
            (lambda out: sum(out.sum(1).tolist()) * out, "_local_scalar_dense"),
        ],
    )
    def test_names_the_op_and_the_line(self, change: Any, op: str) -> None:
        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            return change(model(batch)).square().mean()

        with pytest.raises(CaptureError) as caught:
            capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))
        assert op in caught.value.op
        assert caught.value.source in str(caught.value) and "lambda out" in _line_of(caught.value)

    def test_a_bug_in_the_model_keeps_its_cause(self) -> None:
        with pytest.raises(CaptureError, match="mat1 and mat2|size mismatch|shapes") as caught:
            capture(nn.Linear(8, 2), lambda m, b: m(b[:, :3]).sum(), torch.randn(3, 8))
        assert caught.value.__cause__ is not None

    def test_checks_of_values_are_left_out_and_named(self) -> None:
        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            out = model(batch)
            assert torch.isfinite(out).all()
            if out.isnan().any():
                raise ValueError("not a number")
            return out.sum()

        graph = capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))
        assert len(graph.unchecked) == 2 and all(line.startswith(__file__) for line in graph.unchecked)

    def test_an_op_that_fails_in_a_branch_is_no_check(self) -> None:
        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            out = model(batch)
            if (out > 0).any():
                return out[out > 0].sum()
            return out.sum()

        with pytest.raises(CaptureError, match="_local_scalar_dense"):
            capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))


class TestState:
    def test_a_trainable_parameter_that_the_step_writes_to(self) -> None:
        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            with torch.no_grad():
                model.weight.clamp_(-1, 1)
            return _loss(model, batch)

        with pytest.raises(CaptureError, match="weight") as caught:
            capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))
        assert "clamp_" in _line_of(caught.value)

    def test_a_closed_over_tensor_that_the_step_writes_to(self) -> None:
        total = torch.zeros(2)

        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            total.add_(model(batch).detach().sum(0))
            return _loss(model, batch)

        with pytest.raises(CaptureError, match="register_buffer"):
            capture(nn.Linear(8, 2), loss_fn, torch.randn(3, 8))
        assert torch.equal(total, torch.zeros(2))

    def test_a_buffer_that_changes_its_shape(self) -> None:
        class Growing(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.seen = torch.cat([self.seen, x.detach().mean(0)])
                return super().forward(x)

        model = Growing(8, 2)
        model.register_buffer("seen", torch.zeros(8))
        with pytest.raises(CaptureError, match="seen"):
            capture(model, _loss, torch.randn(3, 8))

    def test_a_hidden_state_in_an_attribute(self) -> None:
        class Carrying(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell, self.hidden = nn.RNNCell(8, 4), None

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = self.cell(x, self.hidden)
                self.hidden = hidden.detach()
                return hidden

        model = Carrying()
        with pytest.raises(CaptureError, match="hidden"):
            capture(model, _loss, torch.randn(3, 8))
        assert model.hidden is None

    @pytest.mark.parametrize(
        "use",
        [
            lambda self, out: out * min(1.0, self.calls / 10),
            lambda self, out: out * 2 if self.calls > 100 else out,
            lambda self, out: out if self.calls % 3 else -out,
        ],
    )
    def test_a_counter_that_decides_something(self, use: Any) -> None:
        class Scheduled(nn.Linear):
            calls = 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return use(self, super().forward(x))

        with pytest.raises(CaptureError, match="calls"):
            capture(Scheduled(8, 2), _loss, torch.randn(3, 8))

    @pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(np.random.normal())])
    def test_random_numbers_from_outside_torch(self, draw: Any) -> None:
        before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
        with pytest.raises(CaptureError, match="random"):
            capture(nn.Linear(8, 2), lambda m, b: F.relu(m(b)).sum() * draw(), torch.randn(3, 8))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])

    def test_the_model_is_restored_after_an_error(self) -> None:
        model = nn.Linear(8, 2)
        weight = model.weight
        with pytest.raises(CaptureError):
            capture(model, lambda m, b: m(b).sum() * m(b).sum().item(), torch.randn(3, 8))
        assert model.weight is weight and isinstance(model.weight, nn.Parameter)


class _Stubborn(nn.Module):
    """Its parameters cannot be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def break_it(self) -> None:
        self.__dict__["_parameters"] = MappingProxyType({})


def test_one_module_that_cannot_be_restored_does_not_keep_the_others_from_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), _Stubborn(), nn.Linear(2, 2))
    before = dict(model.named_parameters())
    with pytest.raises(AttributeError), Substitution(model) as substitution:
        substitution.put({id(value): value.detach().clone() for value in before.values()})
        model[1].break_it()
    assert all(value is before[name] for name, value in model.named_parameters())


class _Bags(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.table, self.head = kind(10, 4, sparse=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


class TestLayouts:
    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_sparse_gradients(self, kind: Any) -> None:
        with pytest.raises(CaptureError, match=r"dense tensor.*module 'table'.*sparse=False") as caught:
            capture(_Bags(kind), _loss, torch.randint(0, 10, (3, 5)))
        assert "self.table(x)" in _line_of(caught.value)
        assert caught.value.op.startswith("aten.")

    def test_sparse_values(self) -> None:
        matrix = torch.eye(3).to_sparse()
        with pytest.raises(CaptureError, match=r"dense tensor.*torch\.sparse_coo"):
            capture(nn.Linear(8, 2), lambda m, b: torch.sparse.mm(matrix, m(b)).sum(), torch.randn(3, 8))

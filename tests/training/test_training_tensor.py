"""The tensor axis and fully sharded parameters in training: same results as plain PyTorch, checkpoints, errors."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from plain_training import train_plain

import partita
from partita import Constraints

BASE: dict[str, Any] = {"pipeline": 1, "num_microbatches": 1, "threads_per_worker": 1, "compiled": False}
MEGATRON = {
    "*.qkv.*": {"tensor": "S(0)"},
    "*.out.weight": {"tensor": "S(1)"},
    "*.up.*": {"tensor": "S(0)"},
    "*.down.weight": {"tensor": "S(1)"},
}
SEQUENCE = {"batch*": {"tensor": "S(1)"}}
VOCABULARY = {"embedding.weight": {"tensor": "S(0)"}, "head.weight": {"tensor": "S(0)"}}


class Block(nn.Module):
    def __init__(self, width: int = 16, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BTD.shape
        qkv = self.qkv(self.norm(x_BTD)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), 0.1)
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(24, 16), nn.Linear(16, 24, bias=False)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def batches(count: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 24, (2, 6, 8), generator=generator).unbind(0) for _ in range(count)]


def build() -> nn.Module:
    torch.manual_seed(2)
    return Language()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, given: list[Any]) -> list[float]:
    torch.manual_seed(7)
    return train_plain(model, optimizer, given, loss_fn)


def compare(constraints: Constraints, optimizer: Any) -> partita.Plan:
    model, given = build(), batches()
    reference = copy.deepcopy(model)
    expected = plain(reference, optimizer(reference.parameters()), given)
    with partita.parallelize(model, optimizer(model.parameters()), loss_fn, given[0], plan=constraints) as step:
        torch.manual_seed(7)
        assert [step(batch).loss for batch in given] == pytest.approx(expected, rel=1e-4)
    for value, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=2e-5)
    return step.plan


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("mesh", "inputs"),
    [
        ({"data": 1, "tensor": 2}, MEGATRON),
        ({"data": 1, "tensor": 2}, SEQUENCE),
        ({"data": 1, "tensor": 3}, MEGATRON | SEQUENCE | VOCABULARY),
        ({"data": 2, "tensor": 2}, MEGATRON | VOCABULARY),
        ({"data": 2, "tensor": 2, "pipeline": 2, "num_microbatches": 2}, MEGATRON),
        ({"data": 2, "tensor": 2, "fully_sharded": True}, MEGATRON),
        ({"data": 3, "fully_sharded": True}, None),
        ({"data": 2, "tensor": 2}, {"batch*": {"tensor": "S(0)"}}),
        ({"data": 2, "tensor": 2}, {"batch[[]0]": {"tensor": "S(0)"}}),
        ({"data": 1, "tensor": 2, "num_microbatches": 2}, {"batch*": {"tensor": "S(0)"}}),
    ],
    ids=[
        "tensor",
        "sequence",
        "uneven",
        "data",
        "pipeline",
        "fully_sharded_tensor",
        "fully_sharded",
        "rows_twice",
        "rows_of_one_twice",
        "rows_of_microbatches",
    ],
)
def test_cut_inputs_train_like_plain_pytorch(mesh: dict[str, Any], inputs: Any) -> None:
    plan = compare(Constraints(**{**BASE, **mesh}, inputs=inputs), sgd)
    assert plan.axes.get("tensor", 1) == mesh.get("tensor", 1)


@pytest.mark.parametrize(
    "mesh",
    [{"data": 1, "tensor": 2}, {"data": 2, "tensor": 2}, {"data": 1, "tensor": 4, "num_microbatches": 2}],
    ids=["tensor", "data", "fewer_rows_than_workers"],
)
def test_the_planner_places_what_the_constraints_leave_open(mesh: dict[str, Any]) -> None:
    plan = compare(Constraints(**{**BASE, **mesh}), sgd)
    assert plan.axes["tensor"] == mesh["tensor"] and plan.rules


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_optimizers_of_whole_parameters_get_them_whole(name: str) -> None:
    model, given = build(), batches(2)
    chosen = [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else list(model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is item for item in chosen))
    reference = copy.deepcopy(model)
    kept = [p for p in reference.parameters() if p.requires_grad]
    expected = plain(reference, getattr(torch.optim, name)(kept, lr=1e-2), given)
    optimizer = getattr(torch.optim, name)(chosen, lr=1e-2)
    constraints = Constraints(**BASE, data=1, tensor=2, inputs=MEGATRON)
    with partita.parallelize(model, optimizer, loss_fn, given[0], plan=constraints) as step:
        torch.manual_seed(7)
        assert [step(batch).loss for batch in given] == pytest.approx(expected, rel=1e-4)
    for value, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        # Muon turns by products of bfloat16, where rounding of the gradients shows: an update moves a weight by 1e-2.
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3 if name == "Muon" else 1e-4)


def test_a_checkpoint_of_a_tensor_plan_goes_on_under_a_data_plan(tmp_path: Path) -> None:
    given = batches(4)
    reference = build()
    expected = plain(reference, sgd(reference.parameters()), given)
    model = build()
    first = Constraints(**BASE, data=1, tensor=2, inputs=MEGATRON | VOCABULARY)
    with partita.parallelize(model, sgd(model.parameters()), loss_fn, given[0], plan=first) as step:
        torch.manual_seed(7)
        for batch in given[:2]:
            step(batch)
        step.save(tmp_path)
    model = build()
    second = Constraints(**BASE, data=2)
    with partita.parallelize(model, sgd(model.parameters()), loss_fn, given[0], plan=second) as step:
        step.load(tmp_path)
        assert [step(batch).loss for batch in given[2:]] == pytest.approx(expected[2:], rel=1e-4)


def test_another_batch_shape_keeps_the_cuts() -> None:
    model, given = build(), batches(2)
    reference = copy.deepcopy(model)
    short = tuple(item[:5, :6] for item in given[1])
    expected = plain(reference, sgd(reference.parameters()), [given[0], short, given[1]])
    constraints = Constraints(**BASE, data=1, tensor=2, inputs=MEGATRON)
    with partita.parallelize(model, sgd(model.parameters()), loss_fn, given[0], plan=constraints) as step:
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [step(batch).loss for batch in (given[0], short, given[1])] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"blocks.9.*": {"tensor": "S(0)"}}, "'blocks.9.*' fits none"),
        ({"head.weight": {"tensor": "S(2)"}}, "must have a dim 2 of at least 2 entries"),
        ({"batch*": {"data": "S(1)"}}, "place it along"),
    ],
)
def test_cuts_that_cannot_be_are_refused(inputs: Any, words: str) -> None:
    model, given = build(), batches(1)
    constraints = Constraints(**BASE, data=2, tensor=2, inputs=inputs)
    with pytest.raises(partita.PlanError, match=words.replace("*", r"\*")):
        partita.parallelize(model, sgd(model.parameters()), loss_fn, given[0], plan=constraints)


@pytest.mark.parametrize(
    "inputs", [["x"], {"w": "S(0)"}, {"w": {"pipeline": "S(0)"}}, {"w": {"tensor": "S0"}}, {"w": {"tensor": 0}}]
)
def test_placements_of_a_wrong_form_are_refused(inputs: Any) -> None:
    with pytest.raises(partita.InputError):
        Constraints(tensor=2, inputs=inputs)

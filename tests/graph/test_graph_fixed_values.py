"""Control flow may read values that follow from the code alone, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from partita.errors import CaptureError
from partita.graph import capture

CLOSED_OVER = torch.ones(3)


def causal(x: torch.Tensor) -> bool:
    mask = torch.triu(torch.full((4, 4), -torch.inf), diagonal=1)
    return bool((mask == torch.triu(torch.full((4, 4), -torch.inf), diagonal=1)).all())


def literal(x: torch.Tensor) -> bool:
    return torch.tensor([1.0, 2.0]).sum().item() == 3.0


def filled_in_place(x: torch.Tensor) -> bool:
    table = torch.zeros(3)
    table[1:].fill_(2.0)
    return table.tolist() == [0.0, 2.0, 2.0]


def same_tables(x: torch.Tensor) -> bool:
    return torch.equal(torch.arange(3), torch.tensor([0, 1, 2]))


def split_up(x: torch.Tensor) -> bool:
    low, high = torch.arange(4).chunk(2)
    return int(high[0] - low[1]) == 1


def of_the_batch(x: torch.Tensor) -> bool:
    return bool((x > 0).all())


def overwritten_through_a_view(x: torch.Tensor) -> bool:
    table = torch.zeros(3)
    table[1:].copy_(x.detach().flatten()[:2])
    return bool((table == 0).all())


def drawn(x: torch.Tensor) -> bool:
    return bool((torch.rand(3) > 0.5).all())


def closed_over(x: torch.Tensor) -> bool:
    return bool((CLOSED_OVER > 0).all())


def step_that_asks(question: Callable[[torch.Tensor], bool]) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: model(x).sum() * (2.0 if question(x) else 3.0)


@pytest.mark.parametrize("question", [causal, literal, filled_in_place, same_tables, split_up])
def test_values_that_follow_from_the_code_are_known(question: Callable[[torch.Tensor], bool]) -> None:
    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    graph = capture(model, step_that_asks(question), x)
    factors = [node.args[1] for node in graph.module.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert 2.0 in factors and 3.0 not in factors


@pytest.mark.parametrize("question", [of_the_batch, overwritten_through_a_view, drawn, closed_over])
def test_values_that_do_not_are_refused(question: Callable[[torch.Tensor], bool]) -> None:
    with pytest.raises(CaptureError, match="one graph"):
        capture(nn.Linear(4, 2), step_that_asks(question), torch.ones(3, 4))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_transformer_of_torch_with_a_mask_is_one_graph() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def loss_fn(model: nn.Transformer, batch: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return F.mse_loss(model(batch, batch, tgt_mask=mask), batch)

    batch = torch.randn(2, 5, 8)
    graph = capture(model, loss_fn, batch)
    assert not graph.unchecked
    values = {**dict(model.named_parameters()), "batch": batch, "seed": torch.ones(())}
    loss = graph.module(*(values[item.name] for item in graph.inputs))[0]
    torch.testing.assert_close(loss, loss_fn(model, batch))

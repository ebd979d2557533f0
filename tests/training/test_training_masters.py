"""Masters: taken from a state or from the weight, kept exact where states are loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from partita.training.masters import ENTRY, HALF, ExactLoading, WholeMasters, new_master, take_master, widened


@pytest.mark.parametrize("dtype", HALF)
def test_a_master_that_rounds_to_the_weight_is_taken_over(dtype: torch.dtype) -> None:
    known = torch.randn(5)
    weight = known.to(dtype)
    master, state = new_master(weight), {ENTRY: known}
    take_master(master, weight, state)
    assert master.data_ptr() == known.data_ptr() and master.dtype == torch.float32


def test_a_master_of_another_weight_is_made_anew() -> None:
    weight = torch.randn(5).bfloat16()
    master, state = new_master(torch.zeros(5)), {ENTRY: weight.float() + 1}
    take_master(master, weight, state)
    assert torch.equal(master.detach(), weight.float()) and state[ENTRY].data_ptr() == master.data_ptr()
    empty: dict[str, Any] = {}
    take_master(master, weight, empty)
    assert not empty  # an optimizer takes a state that is not empty for one of its own


def test_a_state_of_the_weights_type_is_widened() -> None:
    weight = torch.zeros(2).bfloat16()
    found = widened({"exp_avg": weight, "step": torch.tensor(3), "n": 1}, weight)
    assert found["exp_avg"].dtype == torch.float32 and found["step"].dtype == torch.int64 and found["n"] == 1


def test_parameters_without_gradients_stay_as_they_are() -> None:
    first, second, wide = (nn.Parameter(torch.ones(3, dtype=t)) for t in (*HALF, torch.float32))
    optimizer = torch.optim.Adam([first, second, wide], lr=0.5)
    masters = WholeMasters(optimizer, decay=0.5)
    masters.step({id(first): torch.ones(3), id(wide): torch.ones(3)})
    assert torch.equal(second, torch.ones(3).half()) and not optimizer.state.get(second)
    masters.step({id(value): torch.ones(3) for value in (first, second, wide)})
    assert ENTRY in optimizer.state[first] and ENTRY in optimizer.state[second] and ENTRY not in optimizer.state[wide]
    torch.testing.assert_close(first.float(), wide.detach(), rtol=0, atol=1e-2)
    assert optimizer.state[first]["step"] == 2 and optimizer.state[second]["step"] == 1
    assert first.grad is None and wide.grad is None


def test_options_of_the_users_optimizer_are_followed() -> None:
    weight = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = torch.optim.SGD([weight], lr=0.5)
    masters = WholeMasters(optimizer, decay=None)
    optimizer.param_groups[0]["lr"] = 0.25
    masters.step({id(weight): torch.ones(3)})
    assert torch.equal(weight.float(), torch.full((3,), 0.75))


def test_loading_keeps_the_types_of_a_state_until_it_is_removed() -> None:
    weight = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = torch.optim.Adam([weight])
    WholeMasters(optimizer, decay=None).step({id(weight): torch.full((3,), 0.1)})
    saved = copy.deepcopy(optimizer.state_dict())
    exact = ExactLoading(optimizer)
    optimizer.load_state_dict(saved)
    for name, value in saved["state"][0].items():
        assert torch.equal(optimizer.state[weight][name], value) and optimizer.state[weight][name].dtype == value.dtype
    exact.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.state[weight][ENTRY].dtype == torch.bfloat16

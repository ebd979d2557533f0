"""The choice between dense, masked and block-sparse layers, and models that take blocks where they win."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partita import InputError
from partita.search.blocks import BlockLinear, Forms, fastest_form, forms, forms_of, measure_forms, with_blocks

WIN, LOSE = Forms(dense_s=2.0, masked_s=3.0, blocks_s=1.0), Forms(dense_s=1.0, masked_s=3.0, blocks_s=2.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    return


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("needs_input_gradient", [False, True])
def test_all_forms_are_measured(compiled: bool, needs_input_gradient: bool) -> None:
    found = measure_forms(
        8, 32, 16, (8, 8), 2, needs_input_gradient=needs_input_gradient, compiled=compiled, num_threads=1
    )
    assert min(found.dense_s, found.masked_s, found.blocks_s) > 0
    assert found.fastest in ("dense", "masked", "blocks")


def test_a_layer_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(*args: Any, **options: Any) -> Forms:
        calls.append((args, options))
        return WIN

    monkeypatch.setattr(forms, "measure_forms", measure)
    assert fastest_form(8, 32, 16, (8, 8), 2) == fastest_form(8, 32, 16, (8, 8), 2) == WIN
    assert len(calls) == 1
    fastest_form(9, 32, 16, (8, 8), 2)
    fastest_form(8, 32, 16, (8, 8), 2, needs_input_gradient=False)
    fastest_form(8, 32, 16, (8, 8), 2, num_threads=7)
    assert len(calls) == 4


def test_the_fastest_is_the_fastest() -> None:
    assert WIN.fastest == "blocks" and LOSE.fastest == "dense"


@pytest.mark.parametrize("case", [(0, 32, 16, (8, 8), 2), (8, 32, 16, (8, 8), 5), (8, 33, 16, (8, 8), 1)])
def test_layers_that_cannot_be_are_refused(case: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        fastest_form(*case)


def model_and_masks() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.5), nn.Linear(24, 16), nn.Linear(16, 5))
    first = torch.zeros(3, 2)
    first[[0, 1, 2], [1, 0, 1]] = 1
    second = torch.eye(3)[[0, 2]].repeat_interleave(8, 0).repeat_interleave(8, 1)
    return model, {"0.weight": first, "2.weight": second, "3.weight": torch.rand(5, 16) > 0.5}


def masked_output(model: nn.Module, masks: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    first = masks["0.weight"].repeat_interleave(8, 0).repeat_interleave(8, 1)
    weights = {name: p * (first if name[0] == "0" else masks[name]) for name, p in model.named_parameters()
               if name in masks}  # fmt: skip
    result: torch.Tensor = torch.func.functional_call(model.eval(), weights, (x,))
    return result


def test_blocks_where_they_win_and_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def answer(num_rows: int, in_features: int, *args: Any, needs_input_gradient: bool, **options: Any) -> Forms:
        asked[in_features] = (num_rows, needs_input_gradient)
        return WIN if in_features == 16 else LOSE

    monkeypatch.setattr(forms, "fastest_form", answer)
    model, masks = model_and_masks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 4, 16)
    found = with_blocks(model, masks, x, block=(8, 8))
    assert asked == {16: (8, False), 24: (8, True)}  # the last one's mask is not made of blocks
    assert [type(layer) for layer in found] == [BlockLinear, nn.Dropout, nn.Linear, nn.Linear]
    assert model.training and found.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(found.eval()(x), masked_output(model, masks, x), rtol=1e-5, atol=1e-5)


def test_layers_that_must_stay_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight with two users, of another type, of an unequal mask."""
    monkeypatch.setattr(forms, "fastest_form", lambda *args, **options: WIN)
    full, unequal = torch.ones(2, 2), torch.ones(2, 2).triu()
    shared = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    shared[1].weight = shared[0].weight
    masks = {"0.weight": full, "1.weight": full, "2.weight": full}
    x = torch.ones(1, 8)
    assert set(forms_of(shared, masks, x, block=(4, 4))) == {"2.weight"}
    assert set(forms_of(shared, masks | {"2.weight": unequal}, x, block=(4, 4))) == set()
    assert set(forms_of(shared.double(), masks, x.double(), block=(4, 4))) == set()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="named like the model's parameters"):
        with_blocks(nn.Sequential(nn.Linear(8, 8)), {"weight": torch.ones(2, 2)}, torch.ones(1, 8), block=(4, 4))

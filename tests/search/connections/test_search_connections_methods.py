"""Every method is a row of one table: what all must hold, and each its own rule, written down once more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from partita.connections import SET, Magnitude, RigL, Static
from partita.errors import InputError
from partita.search.connections.choosing import grown_GU, kept_of, top_GU
from partita.search.connections.methods import Learnt

UNTIL = 40
METHODS: dict[str, Learnt] = {
    "static": Static(density=0.25),
    "static in blocks": Static(density=0.25, block=(2, 4)),
    "set": SET(density=0.25, until=UNTIL, every=10),
    "set in blocks": SET(density=0.5, until=UNTIL, every=10, block=(4, 2), fraction=0.9),
    "rigl": RigL(density=0.25, until=UNTIL, every=10),
    "rigl in blocks": RigL(density=0.5, until=UNTIL, every=10, block=(2, 2), fraction=0.9),
    "rigl, uniform": RigL(density=0.1, until=UNTIL, every=10, distribution="uniform"),
    "magnitude": Magnitude(density=0.25, until=UNTIL, every=10),
    "magnitude in blocks": Magnitude(density=0.25, until=UNTIL, every=10, since=10, block=(2, 2)),
}


def weights_of(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "first": torch.randn(16, 8, generator=random),
        "second": torch.randn(8, 16, 3, generator=random),
        "third": torch.randn(4, 8, generator=random),
    }


def trained(method: Learnt, seed: int) -> list[tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]:
    """Masks after each change, with the weights and gradients that they were decided by."""
    random = torch.Generator().manual_seed(seed)
    weights = weights_of(seed)
    masks = method.start(weights, random)
    found = [(0, masks, weights, {})]
    for step in range(1, UNTIL + 20):
        if method.is_due(step):
            weights = {name: value * masks[name] for name, value in weights_of(seed + step).items()}
            gradients = weights_of(seed - step) if method.needs_gradients else {}
            masks = method.changed(step, weights, gradients, masks, random)
            found.append((step, masks, weights, gradients))
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [100, 200])
def test_what_all_must_hold(name: str, seed: int) -> None:
    method = METHODS[name]
    changes = trained(method, seed)
    for _, masks, weights, _ in changes:
        for key, mask in masks.items():
            assert mask.dtype == torch.bool and mask.shape == weights[key].shape
            per_group = method.grain.chosen_GU(mask).sum(1)
            assert per_group.min() == per_group.max() > 0  # a fixed fan-in
            assert torch.equal(method.grain.mask_of(method.grain.chosen_GU(mask), tuple(mask.shape)), mask)
    last = changes[-1][1]
    total = sum(mask.numel() for mask in last.values())
    group = max(weights_of(0)[key].numel() // method._extents(mask)[1] for key, mask in last.items())
    assert sum(int(mask.sum()) for mask in last.values()) == pytest.approx(method.density * total, abs=1.5 * group)
    again = trained(method, seed)
    assert all(torch.equal(one[1][key], two[1][key]) for one, two in zip(changes, again, strict=True) for key in last)
    assert (len(changes) > 1) == (not isinstance(method, Static))


@pytest.mark.parametrize("name", [name for name in METHODS if "set" in name or "rigl" in name])
def test_who_leaves_and_who_comes(name: str) -> None:
    method: Any = METHODS[name]
    before = None
    for step, masks, weights, gradients in trained(method, 7):
        for key, mask in masks.items():
            if before is None:
                continue
            old, new = method.grain.chosen_GU(before[key]), method.grain.chosen_GU(mask)
            size, growth = method.grain.scores_GU(weights[key]), None
            if gradients:
                growth = method.grain.scores_GU(gradients[key])
            num = int(method.fraction / 2 * (1 + math.cos(math.pi * step / UNTIL)) * int(old[0].sum()))
            for row in range(len(old)):
                there = [unit for unit in range(old.shape[1]) if old[row, unit]]
                staying = sorted(there, key=lambda unit: -float(size[row, unit]))[: len(there) - num]
                assert set(staying) <= set(new[row].nonzero().flatten().tolist())
                assert int(new[row].sum()) == len(there)
                if growth is not None:
                    others = [unit for unit in range(old.shape[1]) if unit not in staying]
                    come = sorted(others, key=lambda unit: -float(growth[row, unit]))[:num]
                    assert set(new[row].nonzero().flatten().tolist()) == {*staying, *come}
        before = masks


def test_magnitude_follows_its_cubic_and_keeps_the_largest() -> None:
    method = Magnitude(density=0.2, until=UNTIL, every=10, since=5, distribution="uniform")
    for step, masks, weights, _ in trained(method, 3):
        done = min(max(step - 5, 0) / (UNTIL - 5), 1.0)
        density = 0.2 + 0.8 * (1 - done) ** 3
        for key, mask in masks.items():
            assert int(mask.sum()) == round(density * mask.numel())
            if step and int(mask.sum()) < mask.numel():
                assert weights[key][mask].abs().min() >= weights[key][~mask].abs().max()
    assert [step for step, *_ in trained(method, 3)] == [0, 10, 20, 30, 40]


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_replacing(num_groups: int, num_units: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, num_units))
    num = data.draw(st.integers(0, kept))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    old = top_GU(torch.rand(num_groups, num_units, generator=random), kept)
    size = torch.randint(0, 3, (num_groups, num_units), generator=random).float() * old
    new = grown_GU(kept_of(old, size, num), torch.rand(num_groups, num_units, generator=random), num)
    assert new.sum(1).tolist() == [kept] * num_groups
    assert ((old & ~new).sum(1) <= num).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Static(density=0.0), "density"),
        (lambda: Static(density="half"), "density"),  # type: ignore[arg-type]
        (lambda: Static(density=0.5, distribution="even"), "distribution"),  # type: ignore[arg-type]
        (lambda: Static(density=0.5, block=(0, 1)), "block"),
        (lambda: Static(density=0.5, dense="head.*"), "sequence of patterns"),
        (lambda: RigL(density=0.5, until=0), "until"),
        (lambda: RigL(density=0.5, until=10, every=0), "every"),
        (lambda: SET(density=0.5, until=10, fraction=1.5), "fraction"),
        (lambda: Magnitude(density=0.5, until=10, since=10), "since"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv1d(8, 8, 3)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def test_which_parameters_are_connections() -> None:
    model = Attention()
    names = ["attention.in_proj_weight", "attention.out_proj.weight", "conv.weight", "hidden.weight"]
    assert list(Static(density=0.5).parameters_of(model)) == names
    assert list(Static(density=0.5, dense=("attention.*",)).parameters_of(model)) == names[2:]
    with pytest.raises(InputError, match="matches none"):
        Static(density=0.5, dense=("head.*",)).parameters_of(model)
    with pytest.raises(InputError, match="must have connections"):
        Static(density=0.5).parameters_of(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="whole blocks"):
        Static(density=0.5, block=(3, 2)).parameters_of(model)

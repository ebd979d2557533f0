from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import InputError
from partita.search.connections.grain import Grain


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(0, 2**32),
)
def test_blocks_by_hand(block: tuple[int, int], num: tuple[int, int], kernel: list[int], seed: int) -> None:
    shape = (block[0] * num[0], block[1] * num[1], *kernel)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    grain = Grain(block)
    assert grain.fits(shape) and (grain.num_groups(shape), grain.num_units(shape)) == num
    scores = grain.scores_GU(weight)
    chosen = torch.rand(num, generator=random) < 0.5
    mask = grain.mask_of(chosen, shape)
    assert torch.equal(grain.chosen_GU(mask), chosen)
    for row in range(num[0]):
        for column in range(num[1]):
            place = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            assert scores[row, column] == pytest.approx(float(weight[place].norm()), rel=1e-4)
            assert bool(mask[place].all()) == bool(mask[place].any()) == bool(chosen[row, column])


def test_elements_are_one_group() -> None:
    grain = Grain()
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert torch.equal(grain.scores_GU(weight), torch.tensor([[1.0, 2.0, 0.0, 3.0]]))
    chosen = torch.tensor([[True, False, False, True]])
    assert torch.equal(grain.mask_of(chosen, (2, 2)), torch.eye(2, dtype=torch.bool))
    assert grain.fits((3,)) and grain.num_units((2, 3, 4)) == 24


def test_what_is_not_whole_blocks() -> None:
    assert not Grain((2, 2)).fits((4, 3)) and not Grain((2, 2)).fits((3, 4)) and not Grain((2, 2)).fits((4,))
    with pytest.raises(InputError, match="at least one output"):
        Grain((0, 2))

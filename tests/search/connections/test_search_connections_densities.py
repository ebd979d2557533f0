from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import InputError
from partita.search.connections.densities import layer_densities, num_kept

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=3),
    st.lists(st.integers(1, 300), min_size=2, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


@given(SHAPES, st.floats(0.001, 1))
def test_layers_together_have_the_density(shapes: dict[str, tuple[int, ...]], density: float) -> None:
    found = layer_densities(shapes, density, "erk")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert found.keys() == shapes.keys()
    assert all(0 <= value <= 1 for value in found.values())
    total = sum(sizes.values())
    assert sum(found[name] * sizes[name] for name in shapes) == pytest.approx(density * total, rel=1e-9, abs=1e-9)
    sparse = [name for name in shapes if found[name] < 1]
    ratios = [found[name] * sizes[name] / sum(shapes[name]) for name in sparse]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else True


def test_of_a_known_network() -> None:
    shapes = {"first": (100, 64), "second": (50, 100), "third": (10, 50)}
    found = layer_densities(shapes, 0.1, "erk")
    # c = 0.1 x 11,900 / (164 + 150 + 60); no layer is full.
    assert found == pytest.approx({name: 1190 / 374 * sum(s) / math.prod(s) for name, s in shapes.items()})
    assert layer_densities(shapes, 0.1, "uniform") == dict.fromkeys(shapes, 0.1)


def test_full_layers_leave_the_rest_to_others() -> None:
    found = layer_densities({"small": (2, 2), "large": (100, 100)}, 0.05, "erk")
    assert found["small"] == 1.0
    assert found["large"] == pytest.approx((0.05 * 10004 - 4) / 10000)


@given(st.floats(0.0001, 1), st.integers(1, 1000))
def test_every_group_keeps_something(density: float, num_units: int) -> None:
    kept = num_kept(density, num_units)
    assert 1 <= kept <= num_units
    assert abs(kept - density * num_units) <= 0.5 or kept == 1


@pytest.mark.parametrize(("density", "distribution"), [(0, "erk"), (1.5, "erk"), (0.5, "even")])
def test_what_cannot_be_is_refused(density: float, distribution: str) -> None:
    with pytest.raises(InputError):
        layer_densities({"any": (2, 2)}, density, distribution)  # type: ignore[arg-type]

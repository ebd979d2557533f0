"""How many connections each layer gets of those that a network may have.

N_l    elements of layer l,  S_l the sum of its extents (outputs + inputs + kernel)
d      density of all layers together, d_l that of layer l
D      layers that stay dense

uniform    d_l = d
erk        d_l = c S_l / N_l  (Erdős-Rényi with kernels: Mocanu et al. 2018, equation 1; Evci et al. 2020, section
           3), where c gives sum d_l N_l = d sum N_l.  Small layers get more; where d_l would be above 1, the layer
           joins D and c is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from partita.arguments import check_number
from partita.errors import InputError

Distribution = Literal["erk", "uniform"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
Shapes = Mapping[str, tuple[int, ...]]


def check_density(density: float, distribution: str) -> None:
    """Raises InputError unless the density is in (0, 1] and there is such a distribution."""
    check_number(density, "density", above=0, most=1)
    if distribution not in DISTRIBUTIONS:
        raise InputError(f"distribution must be one of {DISTRIBUTIONS}, but got {distribution!r}")


def layer_densities(shapes: Shapes, density: float, distribution: Distribution) -> dict[str, float]:
    """The density of each layer.

    Raises:
        InputError: the density is not in (0, 1], or there is no such distribution.

    Example:
        >>> found = layer_densities({"wide": (100, 100), "small": (10, 10)}, 0.1, "erk")
        >>> {name: round(density, 3) for name, density in found.items()}
        {'wide': 0.092, 'small': 0.918}
    """
    check_density(density, distribution)
    if distribution == "uniform":
        return dict.fromkeys(shapes, density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        factor = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        full = {name for name in shapes if name not in dense and factor * raw[name] >= 1}
        if not full:
            return {name: 1.0 if name in dense else factor * raw[name] for name in shapes}
        dense |= full
    return dict.fromkeys(shapes, 1.0)


def num_kept(density: float, num_units: int) -> int:
    """Connections of a group of so many units: at least one."""
    return min(num_units, max(1, round(density * num_units)))

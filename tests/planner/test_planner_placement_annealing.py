"""Loads that are updated move by move stay those of the definition."""

from __future__ import annotations

import math

import pytest

from partita.planner.placement import price_placement, read_placement
from partita.planner.placement.annealing import Annealing
from partita.planner.placement.groups import contract_colors
from tests.planner.placement_cases import placement_file


@pytest.mark.parametrize("seed", range(40))
def test_loads_are_those_of_the_definition(seed: int) -> None:
    problem = read_placement(placement_file(seed) | {"maxCPUs": 1})
    groups = contract_colors(problem)
    start = [problem.num_accelerators] * groups.num_groups
    state = Annealing(groups, start, seed)
    largest, devices = state.run(300, math.inf, 0.0)
    priced = price_placement(problem, groups.devices_of_operators(devices))
    assert priced.broken == ()
    assert largest == pytest.approx(priced.objective, abs=1e-9)
    assert state.loads == pytest.approx(list(priced.loads), abs=1e-9)
    assert priced.objective <= price_placement(problem, groups.devices_of_operators(start)).objective + 1e-9

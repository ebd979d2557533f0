"""The knapsack of one stage against all choices."""

from __future__ import annotations

import itertools

import pytest

from partita.planner.placement import PiperProblem, Stage, price_pipeline, read_piper
from partita.planner.placement.piper_ways import best_ways
from tests.planner.placement_cases import piper_file


def choices(problem: PiperProblem, data: int, degree: int) -> list[Stage]:
    layers = tuple(range(len(problem.layers)))
    counts = [range(len(layer.ways[degree])) for layer in problem.layers]
    return [
        Stage(layers=layers, data_degree=data, tensor_degree=degree, ways=ways) for ways in itertools.product(*counts)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_the_fastest_choice_that_fits(seed: int) -> None:
    problem = read_piper(piper_file(seed), {"maxDevices": 8})
    degrees = set.intersection(*(set(layer.ways) for layer in problem.layers))
    for degree, data in itertools.product(degrees, (1, 2)):
        if problem.num_microbatches % data or data * degree > 8:
            continue
        priced = [price_pipeline(problem, [stage]) for stage in choices(problem, data, degree)]
        times = [one.objective_s for one in priced if not one.broken]
        chosen = best_ways(problem, range(len(problem.layers)), data, degree, data)
        found = price_pipeline(problem, [chosen])
        if times:
            assert found.broken == ()
            assert found.objective_s == pytest.approx(min(times), abs=1e-12)
        else:
            assert found.broken

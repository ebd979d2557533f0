"""Each option is a stage that a real choice of ways reaches, at its cap and no further."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from partita.planner.placement import read_piper
from partita.planner.placement.ideals import all_ideals
from partita.planner.placement.piper_frontier import Thinning
from partita.planner.placement.piper_options import OptionBuilder, Options
from partita.planner.placement.piper_price import price_pipeline
from partita.planner.placement.piper_problem import PiperProblem, Stage
from tests.planner.placement_cases import piper_file


def options_of(problem: PiperProblem, ub_s: float) -> Options:
    ideals = all_ideals(len(problem.layers), [edge[:2] for edge in problem.edges], 1000)
    assert ideals is not None
    ideals = ideals[np.argsort(ideals.sum(axis=1), kind="stable")]
    return OptionBuilder(problem=problem, ideals=ideals, thinning=Thinning(limit=10**6)).build(ub_s, np.inf)


@pytest.mark.parametrize("seed", range(40))
def test_options_are_what_some_choice_of_ways_reaches(seed: int) -> None:
    problem = read_piper(piper_file(seed))
    options = options_of(problem, np.inf)
    most = min(problem.num_devices, problem.num_microbatches)
    for i in range(len(options.time_s)):
        held = np.flatnonzero(options.ideals[options.end[i]] & ~options.ideals[options.start[i]]).tolist()
        degree, data = int(options.tensor_degree[i]), int(options.data_degree[i])
        counts = [range(len(problem.layers[layer].ways[degree])) for layer in held]
        reached = False
        for ways in itertools.product(*counts):
            stage = Stage(layers=tuple(held), data_degree=data, tensor_degree=degree, ways=ways)
            chosen = [problem.layers[layer].ways[degree][way] for layer, way in zip(held, ways, strict=True)]
            a = sum(way.memory_per_microbatch_bytes for way in chosen)
            b = sum(way.memory_fixed_bytes for way in chosen)
            cap = min(most, data * ((problem.limit_bytes - b) // a) if a else most)
            same_time = abs(price_pipeline(problem, [stage]).stage_time_s[0] - options.time_s[i]) < 1e-9
            reached = reached or bool(same_time and cap == options.cap[i])
        assert reached


@pytest.mark.parametrize("seed", range(40))
def test_a_time_limit_only_drops_slower_options(seed: int) -> None:
    problem = read_piper(piper_file(seed))
    everything = options_of(problem, np.inf)
    if len(everything.time_s) == 0:
        return
    ub_s = float(np.median(everything.time_s))
    fewer = options_of(problem, ub_s)
    assert (fewer.time_s <= ub_s).all()
    assert len(fewer.time_s) <= len(everything.time_s)

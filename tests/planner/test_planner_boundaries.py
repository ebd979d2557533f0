"""The best stage boundaries against enumeration of all of them, priced task by task."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import InfeasibleError
from partita.planner.boundaries import best_boundaries
from partita.planner.inter.price import price_inter
from partita.planner.inter.solve import solve_inter
from partita.planner.stage_costs import Host, StageCosts, StageGroup
from partita.planner.work import Array, Work


def work_of(there: Array, back: Array, elements: Array, shared: Array | None = None) -> Work:
    return Work(
        names=tuple(f"op{i}" for i in range(len(there))),
        position={},
        nodes=(),
        rows=frozenset(),
        forward=frozenset(),
        there_bytes=there,
        back_bytes=back,
        shared_bytes=np.zeros(len(there)) if shared is None else shared,
        saved_bytes=np.zeros(len(there)),
        parameter_elements=elements,
        parameter_bytes=4 * elements,
    )


def prefix(figures: Array) -> Array:
    return np.concatenate([np.zeros((*figures.shape[:-1], 1)), np.cumsum(figures, axis=-1)], axis=-1)


def ends_of(latency_s: float, element_s: float) -> Callable[[int, int], float]:
    return lambda elements, num_bytes: latency_s + elements * element_s + num_bytes * element_s / 8


@st.composite
def cases(draw: st.DrawFn, most_ops: int = 9) -> StageCosts:
    """Stages of one or two kinds of workers on one or two processes."""
    seed, num_ops = draw(st.integers(0, 10**6)), draw(st.integers(1, most_ops))
    num_stages = draw(st.integers(1, min(4, num_ops)))
    return random_costs(seed, num_ops, num_stages, draw(st.integers(1, 6)), draw(st.sampled_from(["1f1b", "gpipe"])))


def random_costs(seed: int, num_ops: int, num_stages: int, num_microbatches: int, schedule: str) -> StageCosts:
    rng = np.random.default_rng(seed)
    there, back, elements, shared = rng.integers(0, 4, (4, num_ops)).astype(float)
    work = work_of(there, back, elements, shared)
    alike = rng.integers(0, 10, (2, 1, num_ops)).astype(float)
    static, saved = prefix(rng.integers(0, 5, num_ops).astype(float)), prefix(rng.integers(0, 5, num_ops).astype(float))
    tight = float(static[-1] + 2 * saved[-1])
    limits = [tight / 2, tight, np.inf]
    groups = []
    for q in range(num_stages):
        kinds = int(rng.integers(1, 3))
        own = (
            alike * rng.uniform(0.5, 2, (2, kinds, 1))
            if rng.random() < 0.5
            else alike + rng.integers(0, 4, (2, kinds, num_ops))
        )
        groups.append(
            StageGroup(
                name=f"stage {q}",
                forward_s=prefix(own[0]),
                backward_s=prefix(own[1]),
                static_bytes=static,
                saved_bytes=saved,
                hosts=tuple(
                    Host(rank=10 * q + i, fraction=float(rng.uniform(0.2, 1)), limit_bytes=float(rng.choice(limits)))
                    for i in range(int(rng.integers(1, 3)))
                ),
                link=tuple(rng.uniform(0, 2, 2)),
                back_link=tuple(rng.uniform(0, 2, 2)),
                shared_link=tuple(rng.uniform(0, 2, 2)),
                end_s=ends_of(*rng.uniform(0, 2, 2)),
            )
        )
    return StageCosts(work=work, groups=tuple(groups), num_microbatches=num_microbatches, schedule=schedule)  # type: ignore[arg-type]


def best_by_enumeration(costs: StageCosts) -> float | None:
    times = [costs.makespan_s(starts) for starts in combinations(range(1, costs.num_ops), len(costs.groups) - 1)]
    return min((time_s for time_s in times if time_s is not None), default=None)


def check(costs: StageCosts) -> None:
    best_s = best_by_enumeration(costs)
    if best_s is None:
        with pytest.raises(InfeasibleError, match="[Nn]o pipeline"):
            best_boundaries(costs)
        return
    found = best_boundaries(costs)
    assert found.makespan_s == pytest.approx(best_s, rel=1e-9)
    assert found.lower_bound_s == pytest.approx(best_s, rel=1e-6)
    assert found.lower_bound_s <= best_s
    assert costs.makespan_s(found.starts) == found.makespan_s


@given(cases())
@settings(max_examples=400, deadline=None)
def test_equals_enumeration(costs: StageCosts) -> None:
    check(costs)


@pytest.mark.parametrize("seed", range(12))
def test_merged_ops_lose_nothing(seed: int) -> None:
    """So many ops that most boundaries are ruled out before the solver sees them."""
    rng = random.Random(seed)
    check(random_costs(seed, 100, rng.choice([2, 3]), rng.choice([1, 2, 4]), rng.choice(["1f1b", "gpipe"])))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_the_oracle_gives_the_solver_what_boundaries_cost(costs: StageCosts) -> None:
    """Costs from tables, from `StageCosts.times`, and by the solver's independent pricing agree for any boundaries."""
    if len(costs.groups) < 2:
        return
    open_costs = replace(
        costs,
        groups=tuple(replace(g, hosts=tuple(replace(h, limit_bytes=np.inf) for h in g.hosts)) for g in costs.groups),
    )
    for starts in list(combinations(range(1, costs.num_ops), len(costs.groups) - 1))[::7]:
        problem = open_costs.problem(starts)
        solution = solve_inter(problem)
        assert len(solution.stages) == len(costs.groups)
        priced = price_inter(problem, solution)
        assert priced.broken == ()
        assert priced.objective_s == pytest.approx(open_costs.makespan_s(starts))


def test_hundreds_of_ops_are_proven() -> None:
    """A deep model of equal layers on stages of unequal speed."""
    rng = np.random.default_rng(0)
    layer = rng.uniform(0.1, 1, 40)
    forward = np.tile(layer, 20)
    zero = np.zeros(len(forward))
    groups = tuple(
        StageGroup(
            name=f"stage {q}",
            forward_s=prefix(forward[None] * slow),
            backward_s=prefix(2 * forward[None] * slow),
            static_bytes=prefix(zero),
            saved_bytes=prefix(zero),
            hosts=(Host(rank=q, fraction=1.0, limit_bytes=np.inf),),
            link=(0.1, 0.01),
            back_link=(0.1, 0.01),
            shared_link=(0.1, 0.01),
            end_s=ends_of(0.1, 0.01),
        )
        for q, slow in enumerate((1.0, 1.0, 2.0, 2.0))
    )
    costs = StageCosts(work=work_of(zero + 1, zero + 1, zero + 1), groups=groups, num_microbatches=16, schedule="1f1b")
    found = best_boundaries(costs)
    assert found.lower_bound_s == pytest.approx(found.makespan_s, rel=1e-6)
    sizes = np.diff([0, *found.starts, len(forward)])
    assert sizes[:2].sum() > 1.8 * sizes[2:].sum()


def test_more_stages_than_ops_is_infeasible() -> None:
    costs = random_costs(0, 3, 2, 1, "1f1b")
    with pytest.raises(InfeasibleError, match="4 stages for 3 ops"):
        best_boundaries(replace(costs, groups=costs.groups * 2))


@given(cases(), st.sampled_from([0.5, 1.0, 1.01, 2.0]))
@settings(max_examples=200, deadline=None)
def test_only_what_is_below_the_worth_has_to_be_found(costs: StageCosts, factor: float) -> None:
    """Below it, the optimum is found and proven; otherwise it is proven that none is below."""
    best_s = best_by_enumeration(costs)
    if best_s is None or best_s == 0:
        return
    worth_s = factor * best_s
    try:
        found = best_boundaries(costs, worth_s)
    except InfeasibleError as error:
        assert worth_s <= best_s and "less than" in str(error)
        return
    assert found.makespan_s == costs.makespan_s(found.starts)
    assert min(worth_s, best_s) * (1 - 1e-6) <= found.lower_bound_s <= best_s
    if factor > 1:
        assert found.makespan_s == pytest.approx(best_s, rel=1e-9)

"""The recurrence's own values are those of the definition, in the dense and in the blockwise form."""

from __future__ import annotations

import numpy as np
import pytest

from partita.planner.placement import chains, price_placement, read_placement
from partita.planner.placement.chains import ChainSearch, cpu_relief
from partita.planner.placement.groups import both_orders, contract_colors
from partita.planner.placement.ideals import all_ideals
from tests.planner.placement_cases import best_placement, placement_file


@pytest.mark.parametrize("dense", [True, False])
def test_values_are_prices_and_bounds_are_exclusive(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_DENSE", 2500 if dense else 0)
    monkeypatch.setattr(chains, "_BLOCK", 4)
    solved = 0
    for seed in range(80):
        problem = read_placement(placement_file(seed))
        if problem.num_devices ** len(problem.operators) > 3000:
            continue
        orders = both_orders(contract_colors(problem))
        if len(orders) > 1:
            continue
        groups = orders[0][1]
        ideals = all_ideals(groups.num_groups, groups.before, 1000)
        assert ideals is not None
        search = ChainSearch(groups=groups, ideals=ideals)
        chain = search.solve(np.inf)
        optima = best_placement(problem)
        if chain is None:
            assert optima is None or optima[1] == np.inf
            continue
        solved += 1
        priced = price_placement(problem, groups.devices_of_operators(chain.devices))
        assert priced.broken == ()
        assert priced.contiguous
        assert chain.objective == pytest.approx(priced.objective, abs=1e-9)
        assert optima is not None and chain.objective == pytest.approx(optima[1], abs=1e-9)
        again = search.solve(chain.objective * 1.001 + 1e-6)
        assert again is not None and again.objective == pytest.approx(chain.objective, abs=1e-9)
        assert search.solve(chain.objective * 0.999 - 1e-9) is None
    assert solved > 20


def test_a_cpu_takes_over_what_is_cheapest_for_it_first() -> None:
    node = {"supportedOnFpga": 1, "isBackwardNode": 0, "size": 0}
    nodes = [node | {"id": i, "fpgaLatency": p, "cpuLatency": q} for i, (p, q) in enumerate([(1, 10), (3, 6), (2, 0)])]
    data = {"maxFPGAs": 1, "maxCPUs": 1, "maxSizePerFPGA": 1, "nodes": nodes, "edges": []}
    groups = contract_colors(read_placement(data))
    assert cpu_relief(groups, 6.0) == pytest.approx(2 + 3)
    assert cpu_relief(groups, 11.0) == pytest.approx(2 + 3 + 0.5)

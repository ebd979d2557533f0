"""Loads, contiguity, rounds and broken constraints of assignments, checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from partita.planner.placement import PlacementProblem, price_placement, read_placement


def problem(edges: list[tuple[int, int, float]], backward: Sequence[int] = (), **limits: Any) -> PlacementProblem:
    """Nodes 0 .. n-1 of accelerator latency 2^i, CPU latency 100, size 1."""
    count = max(max(edge[:2]) for edge in edges) + 1
    nodes = [
        {"id": i, "supportedOnFpga": 1, "cpuLatency": 100, "fpgaLatency": 2.0**i, "size": 1}
        | {"isBackwardNode": i in backward}
        for i in range(count)
    ]
    return read_placement(
        {
            "maxFPGAs": 2,
            "maxCPUs": 1,
            "maxSizePerFPGA": 10,
            "nodes": [node | limits.get(f"node{node['id']}", {}) for node in nodes],
            "edges": [{"sourceId": a, "destId": b, "cost": cost} for a, b, cost in edges],
        }
    )


def test_an_output_costs_each_side_once_however_many_read_it() -> None:
    fork = problem([(0, 1, 0.5), (0, 2, 0.5), (0, 3, 0.5)])
    assert price_placement(fork, [0, 1, 1, 0]).loads == (1 + 8 + 0.5, 2 + 4 + 0.5, 0.0)
    assert price_placement(fork, [0, 0, 0, 0]).loads == (15.0, 0.0, 0.0)


def test_cpu_cores_pay_no_transfers_but_accelerators_do() -> None:
    chain = problem([(0, 1, 0.5), (1, 2, 0.25)])
    assert price_placement(chain, [0, 2, 1]).loads == (1.5, 4.25, 100.0)


def test_a_path_that_leaves_and_comes_back_is_not_contiguous() -> None:
    chain = problem([(0, 1, 0), (1, 2, 0)])
    assert not price_placement(chain, [0, 1, 0]).contiguous
    assert not price_placement(chain, [0, 2, 0]).contiguous
    assert price_placement(chain, [2, 0, 2]).contiguous, "CPU cores need not be convex"
    assert price_placement(chain, [0, 0, 1]).contiguous
    assert price_placement(chain, [0, 1, 0]).rounds == 3


def test_forward_and_backward_operators_are_judged_apart() -> None:
    there_and_back = problem([(0, 1, 0), (1, 2, 0), (2, 3, 0)], backward=[2, 3])
    assert price_placement(there_and_back, [0, 1, 1, 0]).contiguous
    longer = problem([(0, 1, 0), (1, 2, 0), (2, 3, 0), (3, 4, 0)], backward=[2, 3, 4])
    assert not price_placement(longer, [0, 1, 1, 0, 1]).contiguous


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"node0": {"size": 11}}, [0, 1], "accelerator 0 holds 11 bytes"),
        ({"node0": {"supportedOnFpga": False}}, [0, 1], "does not support"),
        ({"node0": {"colorClass": 5}, "node1": {"colorClass": 5}}, [0, 1], "colour class 5"),
    ],
)
def test_broken_constraints_are_named(changes: dict[str, Any], devices: list[int], message: str) -> None:
    pair = problem([(0, 1, 0)], **changes)
    assert message in price_placement(pair, devices).broken[0]
    assert price_placement(pair, [2, 2]).broken == ()

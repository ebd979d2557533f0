"""Contraction: colours, leaves, expensive nets, cycles of the order graph; nets cost what the definition says."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planner.placement import price_placement, read_placement
from partita.planner.placement.groups import both_orders, contract_colors, merge_expensive, strong_components
from tests.planner.placement_cases import placement_file

SEEDS = st.integers(0, 10**6)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_nets_cost_what_the_definition_says(seed: int) -> None:
    problem = read_placement(placement_file(seed))
    groups = contract_colors(problem)
    draw = random.Random(seed)
    devices = [draw.randrange(problem.num_devices) for _ in range(groups.num_groups)]
    loads = np.zeros(problem.num_devices)
    for group, device in enumerate(devices):
        on_accelerator = device < problem.num_accelerators
        loads[device] += (groups.accelerator_latency if on_accelerator else groups.cpu_latency)[group]
    for pins, cost in zip(groups.pins, groups.costs, strict=True):
        held = {devices[pin] for pin in pins}
        for device in held if len(held) > 1 else ():
            loads[device] += cost if device < problem.num_accelerators else 0.0
    np.testing.assert_allclose(loads, price_placement(problem, groups.devices_of_operators(devices)).loads)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_the_order_graph_has_no_cycle(seed: int) -> None:
    for _, groups in both_orders(contract_colors(read_placement(placement_file(seed)))):
        components = strong_components(groups.num_groups, groups.before)
        assert len(set(components)) == groups.num_groups


def chain(costs: list[float], **changes: object) -> dict[str, object]:
    nodes = [
        {"id": i, "supportedOnFpga": 1, "cpuLatency": 9, "fpgaLatency": 2, "isBackwardNode": 0, "size": 1}
        for i in range(len(costs) + 1)
    ]
    edges = [{"sourceId": i, "destId": i + 1, "cost": cost} for i, cost in enumerate(costs)]
    return {"maxFPGAs": 2, "maxCPUs": 1, "maxSizePerFPGA": 100, "nodes": nodes, "edges": edges} | changes


def test_a_free_leaf_joins_its_neighbour_and_a_working_one_does_not() -> None:
    data = chain([1.0, 1.0])
    data["nodes"][0] |= {"fpgaLatency": 0.5, "cpuLatency": 0}  # type: ignore[index]
    assert contract_colors(read_placement(data)).num_groups == 2
    data["maxSizePerFPGA"] = 2  # moving its size may now do harm
    assert contract_colors(read_placement(data)).num_groups == 3


def test_expensive_nets_are_not_cut_unless_between_cpu_cores() -> None:
    groups = contract_colors(read_placement(chain([50.0, 1.0])))
    assert merge_expensive(groups, 10.0).num_groups == 2
    assert merge_expensive(groups, 60.0).num_groups == 3
    two_cores = contract_colors(read_placement(chain([50.0, 1.0], maxCPUs=2)))
    assert merge_expensive(two_cores, 10.0).num_groups == 3


def test_strong_components_of_two_rings_and_a_bridge() -> None:
    components = strong_components(6, [(0, 1), (1, 2), (2, 0), (2, 3), (3, 4), (4, 3), (4, 5)])
    assert components[0] == components[1] == components[2]
    assert components[3] == components[4]
    assert len(set(components)) == 3

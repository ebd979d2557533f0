"""Reading placement files: what must be there, and what overrides change."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from partita.errors import InputError
from partita.planner.placement import read_placement

NODE = {"supportedOnFpga": 1, "cpuLatency": 5, "fpgaLatency": 1, "isBackwardNode": 0, "size": 1}
FILE: dict[str, Any] = {
    "maxSizePerFPGA": 10.0,
    "maxFPGAs": 2,
    "maxCPUs": 1,
    "nodes": [
        NODE | {"id": 7},
        NODE | {"id": 3, "supportedOnFpga": 0, "colorClass": 4},
    ],
    "edges": [{"sourceId": 7, "destId": 3, "cost": 0.5}, {"sourceId": 7, "destId": 3, "cost": 0.5}],
}


def test_ids_become_positions_and_missing_colours_are_their_own() -> None:
    problem = read_placement(FILE)
    assert [operator.id for operator in problem.operators] == [7, 3]
    assert [operator.color for operator in problem.operators] == [None, 4]
    assert problem.edges == ((0, 1),)
    assert problem.operators[0].transfer_latency == 0.5
    assert problem.operators[1].accelerator_latency == float("inf")


def test_overrides_replace_limits_and_nothing_else() -> None:
    assert read_placement(FILE, {"maxFPGAs": 5}).num_accelerators == 5
    with pytest.raises(InputError, match="overrides must be of"):
        read_placement(FILE, {"bandwidth": 5})


def broken(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(FILE) | changes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({key: FILE[key] for key in FILE if key != "maxFPGAs"}, "must have the key `maxFPGAs`"),
        ({key: FILE[key] for key in FILE if key != "edges"}, "must have the key `edges`"),
        (broken(nodes=[{"id": 1}], edges=[]), "must have the key `supportedOnFpga`"),
        (broken(nodes=[FILE["nodes"][0] | {"id": 3}, FILE["nodes"][1]]), "ids must differ"),
        (broken(edges=[{"sourceId": 7, "destId": 99, "cost": 1}]), "names 99"),
        (broken(edges=[{"sourceId": a, "destId": b, "cost": 1} for a, b in ((7, 3), (3, 7))]), "no cycle"),
        (broken(edges=[{"sourceId": 7, "destId": 7, "cost": 1}]), "no cycle"),
        (broken(edges=[{"sourceId": 7, "destId": 3, "cost": c} for c in (1, 2)]), "must have one cost"),
        (broken(maxFPGAs=1.5), "whole number"),
        (broken(maxSizePerFPGA=-1), "at least 0"),
        (broken(nodes=[FILE["nodes"][0] | {"cpuLatency": "fast"}, FILE["nodes"][1]]), "finite number"),
        (broken(nodes=[], edges=[]), "at least one node"),
        (broken(nodes=[3]), "must be an object"),
        (broken(nodes={}), "must be a list"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_placement(data)

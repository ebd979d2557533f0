"""Reading Piper's files: what must be there, and what overrides change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from partita.errors import InputError
from partita.planner.placement import read_piper

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "data" / "piper" / "bert32a100.json"


def way(name: str, **changes: Any) -> dict[str, Any]:
    numbers = {"timePerSample": 1, "parameterSize": 2, "memoryUsageA": 3, "memoryUsageB": 4}
    return {"id": name, "syncTimeFw": {}, "syncTimeBw": {}} | numbers | changes


FILE: dict[str, Any] = {
    "maxMemoryPerDevice": 10,
    "maxDevices": 2,
    "bandwidth": 5,
    "mbsInBatch": 4,
    "nodes": [
        {"id": 8, "TMPCs": {"1": [way("a", syncTimeBw={"2": 6}), way("b", syncTimeBw={"2": 7})]}},
        {"id": 2, "TMPCs": {"1": [way("a", syncTimeFw={"8": 5})], "2": [way("a", syncTimeFw={"8": 4})]}},
    ],
    "edges": [{"sourceId": 8, "destId": 2, "communicationCost": 9}],
}


def test_ids_become_positions() -> None:
    problem = read_piper(FILE, {"maxDevices": 3})
    assert problem.num_devices == 3
    assert problem.edges == ((0, 1, 9.0),)
    assert problem.layers[0].ways[1][1].sync_out_bytes == {1: 7.0}
    assert problem.layers[1].ways[2][0].sync_in_bytes == {0: 4.0}


def test_the_published_file_has_37_layers() -> None:
    problem = read_piper(json.loads(PUBLISHED.read_text()))
    assert (len(problem.layers), problem.num_devices) == (37, 10)
    assert all(sorted(layer.ways) == [1, 2, 4, 8] for layer in problem.layers)


def broken(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(FILE) | changes


def with_node(node: dict[str, Any]) -> dict[str, Any]:
    return broken(nodes=[node, FILE["nodes"][1]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({key: FILE[key] for key in FILE if key != "bandwidth"}, "must have the key `bandwidth`"),
        (broken(bandwidth=0), "above 0"),
        (broken(mbsInBatch=0), "at least 1"),
        (broken(nodes=[], edges=[]), "at least one node"),
        (broken(edges=[{"sourceId": 8, "destId": 1, "communicationCost": 9}]), "names 1"),
        (broken(edges=[{"sourceId": 8, "destId": 2}]), "must have the key `communicationCost`"),
        (with_node({"id": 8, "TMPCs": {}}), "at least one way"),
        (with_node({"id": 8, "TMPCs": {"x": []}}), "whole numbers"),
        (with_node({"id": 8, "TMPCs": {"1": [way("a")]}}), "must have the key `2`"),
        (with_node({"id": 8, "TMPCs": {"1": [way("a", syncTimeBw={"2": 1})] * 2}}), "must differ"),
        (with_node({"id": 2, "TMPCs": {"1": [way("a")]}}), "ids must differ"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_piper(data)


def test_unknown_overrides_are_refused() -> None:
    with pytest.raises(InputError, match="overrides must be of"):
        read_piper(FILE, {"maxFPGAs": 1})

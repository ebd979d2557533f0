"""The list that the placement benchmark writes, read by a scorer of its own, and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import placement
from benchmarks.placement import DATA, PIPER_LIMITS, main, misses, parse_overrides, published_figure
from partita.errors import InputError

BERT = DATA / "placement" / "bert24_inference.json"
PIPER = DATA / "piper" / "bert32a100.json"


def largest_load(data: dict[str, Any], assignment: dict[str, int]) -> float:
    """The definition once more, from the file and the written assignment alone."""
    device = {int(node): place for node, place in assignment.items()}
    loads = [0.0] * (data["maxFPGAs"] + data["maxCPUs"])
    size = [0.0] * data["maxFPGAs"]
    for node in data["nodes"]:
        place = device[node["id"]]
        on_cpu = place >= data["maxFPGAs"]
        loads[place] += node["cpuLatency"] if on_cpu else node["fpgaLatency"]
        if not on_cpu:
            assert node["supportedOnFpga"]
            size[place] += node["size"]
    assert max(size) <= data["maxSizePerFPGA"]
    paid = {(e["sourceId"], device[e["destId"]], e["cost"]) for e in data["edges"]}
    paid = {entry for entry in paid if entry[1] != device[entry[0]]}
    paid |= {(source, device[source], cost) for source, _, cost in paid}
    for _, place, cost in paid:
        if place < data["maxFPGAs"]:
            loads[place] += cost
    return max(loads)


def test_the_list_holds_what_a_scorer_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "out.json"
    assert main([str(BERT), str(BERT), "--json", str(path), "--time-limit", "1"]) == 0
    first, second = json.loads(path.read_text())
    data = json.loads(BERT.read_text())
    assert first["kind"] == "placement" and first["overrides"] is None and second["file"] == str(BERT)
    assert first["objective"] == pytest.approx(largest_load(data, first["assignment"]))
    assert first["lower_bound"] <= first["objective"]
    assert first["lower_bound_space"] == "all assignments"
    pipeline = first["pipeline"]
    assert pipeline["objective"] == pytest.approx(largest_load(data, pipeline["assignment"]))
    assert "bert24_inference.json" in capsys.readouterr().out


def test_stages_name_nodes_degrees_and_ways(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    limits = [argument for key, value in PIPER_LIMITS.items() for argument in ("--set", f"{key}={value}")]
    assert main([str(PIPER), *limits, "--json", str(path)]) == 0
    (entry,) = json.loads(path.read_text())
    assert entry["kind"] == "piper" and entry["overrides"] == PIPER_LIMITS
    ways = {node["id"]: node["TMPCs"] for node in json.loads(PIPER.read_text())["nodes"]}
    assert sorted(node for stage in entry["stages"] for node in stage["nodes"]) == sorted(ways)
    for stage in entry["stages"]:
        for node in stage["nodes"]:
            assert stage["tmpcs"][str(node)] in {way["id"] for way in ways[node][str(stage["t"])]}
    assert sum(stage["d"] * stage["t"] for stage in entry["stages"]) <= 512


def test_check_knows_published_figures_and_the_time() -> None:
    row = {"file": "x", "kind": "placement", "objective": 2.0, "published": 2.0, "seconds": 1.0}
    assert misses(row) == []
    assert "must be at most" in misses(row | {"objective": 2.1})[0]
    assert "must take at most" in misses(row | {"seconds": 5.1})[0]
    assert misses(row | {"published": None, "objective": 9.9}) == []
    assert published_figure(BERT, "placement", None) == 17.78990625
    assert published_figure(BERT, "placement", {"maxFPGAs": 9}) is None
    assert published_figure(PIPER, "piper", None) is None
    assert published_figure(PIPER, "piper", PIPER_LIMITS) == 0.00256113


def test_a_miss_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(placement.PUBLISHED, "bert24_inference", 1.0)
    assert main([str(BERT), "--time-limit", "0.5"]) == 0
    assert main([str(BERT), "--time-limit", "0.5", "--check"]) == 1


def test_overrides_are_numbers() -> None:
    assert parse_overrides(["a=3", "b=2.5e3", "c=0.5"]) == {"a": 3, "b": 2500, "c": 0.5}
    for wrong in ("a", "a=", "=3", "a=b"):
        with pytest.raises(InputError, match="--set must be key=number"):
            parse_overrides([wrong])


@pytest.mark.parametrize("content", ["", "[]", '{"maxFPGAs": 1}', '{"nodes": []}'])
def test_a_bad_file_is_an_error_message(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main([str(path)]) == 2
    assert "must" in capsys.readouterr().err

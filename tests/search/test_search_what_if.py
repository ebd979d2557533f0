"""What would be best with other resources, and the report of a search, from made-up candidates of real networks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from partita import InputError
from partita.cluster import Cluster
from partita.connections import Static
from partita.search.candidates import Candidate
from partita.search.resources import resources
from partita.search.trials import SearchTrial
from partita.search.what_if import what_if
from tests.search.made_up import build, candidate, result


def static(trial: SearchTrial) -> Static:
    return Static(density=0.5)


def test_resources_in_words() -> None:
    here = Cluster.detect()
    machines = resources("1, 2,4 machines at 100 Mbit/s", here)
    assert [len(one.machines) for one in machines.values()] == [1, 2, 4]
    assert machines["2 machines"].network.bytes_per_s == 12.5e6
    assert [len(one.processes) for one in machines.values()] == [1, 2, 4]
    assert resources("1 cores", here)["1 core"].num_cores == 1
    for wrong in ("many machines", "1,2", "0 machines", "9999 cores", "2 machines at 3 bananas"):
        with pytest.raises(InputError, match="resources must be"):
            resources(wrong, here)


@pytest.mark.slow
def test_with_slow_networks_nothing_is_gained_and_what_is_measured_corrects_what_is_predicted() -> None:
    fast, better = candidate(0, 16, 0.05, 1e-3), candidate(1, 256, 0.0, 4e-3)
    found = what_if(result(fast, better), resources("1,2 machines at 1 kbit/s", Cluster.detect()))
    one, two = found.outcomes["1 machine"], found.outcomes["2 machines"]
    assert {row.candidate for row in one} == {0, 1} and not found.left_out
    by_number = {row.candidate: row for row in one}
    for row in two:
        alone_s = by_number[row.candidate].step_time_s  # ops are measured in between, beside whatever else runs
        assert alone_s / 4 < row.step_time_s < alone_s * 4, "an exchange over this network would take a thousand steps"
    # A step here is measured to take so long; other plans of this machine are in proportion.
    doubled = what_if(
        result(dataclasses.replace(fast, step_time_s=2e-3, samples_per_s=32_000.0), better),
        resources("1 machines", Cluster.detect()),
    )
    assert found.ratios[0] < doubled.ratios[0] < 4 * found.ratios[0]
    assert one[0].candidate == 1 and one[0].score >= one[1].score
    assert "Measured: learning curves" in str(found) and "2 machines" in str(found)


def test_the_report_tells_what_mattered_and_what_to_try_next() -> None:
    made = [candidate(i, 16 * (i + 1), 0.03 * i, 1e-3) for i in range(12)]
    made[0] = dataclasses.replace(made[0], params={"width": 8, "learning_rate": 0.01})
    made += [Candidate(number=20 + i, state="rejected", why="it is too large") for i in range(8)]
    found = result(*made[:12])
    found = dataclasses.replace(found, trials=tuple(made))
    text = found.explain()
    assert sum(found.importance.values()) == pytest.approx(1)
    assert "8 rejected" in text and "the last one as it is too large" in text
    assert "500 ms before the deadline" in text
    assert "candidate 0: width 8" in text
    if found.importance["width"] > 0.1:
        assert "values of width below 8" in text


def test_the_front_has_whom_nobody_beats() -> None:
    small, large = candidate(0, 16, 0.05, 1e-3), candidate(1, 64, 0.0, 4e-3)
    beaten = dataclasses.replace(candidate(2, 64, 0.2, 5e-3), num_parameters=10**6)
    found = dataclasses.replace(result(small, large, beaten), score=0.9)
    assert {one.number for one in found.pareto} == {0, 1}
    assert found.importance == {}, "three candidates tell nothing"


def test_the_network_is_exported_as_plain_files(tmp_path: Path) -> None:
    made = result(candidate(0, 24, 0.05, 1e-3))
    torch.manual_seed(0)
    model = build(SearchTrial(0, {"width": 24})).eval()
    save_file(model.state_dict(), tmp_path / "w")
    made = dataclasses.replace(made, weights=tmp_path / "w")
    folder = made.export(tmp_path / "found")
    assert not (folder / "masks.safetensors").exists()
    x = torch.randn(3, 16)
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys, torch
from model import load
torch.save(load().eval()(torch.load(sys.argv[1])), sys.argv[2])
print(sorted({"partita", "optuna"} & set(sys.modules)))"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env={"PATH": ""})
    assert done.stdout.strip() == "[]"
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x))
    sparse = dataclasses.replace(made, task=dataclasses.replace(made.task, connections=static))
    with torch.no_grad():
        sparse.model[0].weight[::2] = 0
    masks = load_file(sparse.export(tmp_path / "sparse") / "masks.safetensors")
    assert masks["0.weight"].sum() == 12 * 16 and set(masks) == {"0.weight"}

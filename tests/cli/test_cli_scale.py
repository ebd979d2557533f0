"""Plans for described GPUs on the command line: plan, show, diff, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from partita.cli import main
from partita.export import layout_of_plan, read_deepspeed, read_megatron, read_torchtitan
from partita.plan import Plan

SCRIPT = """
import torch
from torch import nn


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def task():
    with torch.device("meta"):
        blocks = [nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)]
        model = nn.Sequential(*blocks)
        return model, loss_fn, (torch.zeros(32, 256), torch.zeros(32, 256))


def small():
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    return model, loss_fn, (torch.zeros(16, 64), torch.zeros(16, 64))
"""
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256,
}  # fmt: skip
GPUS = ["--cluster", "1x8xH100"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_configuration_file_is_planned_and_exported(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--config", "config.json", "--global-batch", "16", "--seq", "32", *GPUS]
    assert main([*base, "--zero-stage", "0", "--pipeline", "1", "--tensor", "1", "--recompute",
                 "none", "--out", "p.json", "--json"]) == 0  # fmt: skip
    plan = Plan.from_json(capsys.readouterr().out.encode())
    assert plan == Plan.load("p.json") and plan.axes["pipeline"] == 1
    layout = layout_of_plan(plan)
    assert layout.num_layers == (4,)
    assert main(["export", "p.json", "--to", "megatron", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert read_megatron(found["configuration"], num_devices=found["num_devices"]) == layout
    assert main(["export", "p.json", "--to", "torchtitan", "--out", "sub/t.toml"]) == 0
    assert "saved to" in capsys.readouterr().out
    assert read_torchtitan(Path("sub/t.toml").read_text()) == layout
    assert main(["export", "p.json", "--to", "deepspeed"]) == 0
    text = capsys.readouterr().out
    assert read_deepspeed(text, num_devices=layout.num_devices, num_layers=4) == layout


def test_show_tells_why_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train.py:task", *GPUS, "--tensor", "2", "--out", "a.json"]) == 0
    assert main(["plan", "train.py:task", *GPUS, "--tensor", "4", "--out", "b.json"]) == 0
    capsys.readouterr()
    assert main(["show", "a.json", "--why", "0"]) == 0
    assert "exchanges: " in capsys.readouterr().out
    model = ["--target", "train.py:task", *GPUS, "--json"]
    assert main(["show", "a.json", "--why", "0.0.weight", *model]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["others"] and found["placements"]
    assert main(["show", "a.json", "--what-helps", *model]) == 0
    assert any("memory" in one["change"] for one in json.loads(capsys.readouterr().out))
    assert main(["diff", "a.json", "b.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["same"] and len(found["predicted_step_time_s"]) == 2
    assert main(["diff", "a.json", "a.json"]) == 0
    assert "equal" in capsys.readouterr().out


def test_why_and_what_helps_of_a_plan_for_processors(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--cluster", "2x1xcpu-2"]
    options = ["--data", "2", "--tensor", "2", "--pipeline", "1", "--num-microbatches", "1", "--compiled", "False"]
    assert main(["plan", "train.py:small", *where, *options, "--out", "c.json"]) == 0
    capsys.readouterr()
    model = ["--target", "train.py:small", *where, "--json"]
    assert main(["show", "c.json", "--why", "0.weight", *model]) == 0
    found = json.loads(capsys.readouterr().out)
    gradient = next(item for item in found["exchanges"] if item["axis"] == "data")
    cut = "tensor" in found["placements"]["0.weight"]
    assert gradient["num_bytes"] == 4 * 64 * 256 / (2 if cut else 1) and found["others"]
    assert main(["show", "c.json", "--what-helps", *model]) == 0
    assert all(one["saved_s"] >= 0 for one in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", *GPUS], "got neither"),
        (["plan", "train.py:task", "--config", "config.json", *GPUS], "got both"),
        (["plan", "train.py:task", "--seq", "3", *GPUS], "belong to --config"),
        (["plan", "--config", "config.json", *GPUS], "--global-batch"),
        (["plan", "--config", "config.json", "--global-batch", "8", "--seq", "999", *GPUS], "256 positions"),
        (["plan", "--config", "absent.json", "--global-batch", "8", *GPUS], "readable"),
        (["plan", "--config", "train.py", "--global-batch", "8", *GPUS], "no JSON"),
        (["plan", "--config", "odd.json", "--global-batch", "8", *GPUS], "model_type"),
        (["plan", "--config", "new.json", "--global-batch", "8", *GPUS], "transformers"),
        (["plan", "train.py:task", "--zero-stage", "1", "--cluster", "1x1xcpu-2"], "described cluster of GPUs"),
        (["export", "cpu.json", "--to", "megatron"], "described cluster of GPUs"),
        (["show", "cpu.json", "--why", "x"], "--target"),
        (["show", "cpu.json", "--what-helps"], "--target"),
        (["show", "cpu.json", "--what-helps", "--why", "x"], "one of"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "odd.json").write_text("{}")
    (place / "new.json").write_text('{"model_type": "no_such_model"}')
    if "cpu.json" in arguments:
        options = ["--num-workers", "1", "--compiled", "False", "--cluster", "1x1xcpu-2"]
        assert main(["plan", "train.py:small", *options, "--out", "cpu.json"]) == 0
        capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("partita: ") and message in error and "Traceback" not in error

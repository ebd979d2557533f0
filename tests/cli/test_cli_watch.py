"""Lines and metrics from events."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest

from partita.cli import watch
from partita.cli.watch import Lines, Live, Metrics, describe, watching
from partita.plan import Plan, Worker
from partita.training.events import (
    CandidateMeasured,
    Checkpointed,
    Event,
    PlanChosen,
    StepFinished,
    SyncChosen,
    WarningRaised,
    emit,
)
from partita.training.sync import DiLoCo, Exact
from partita.training.sync.choice import Estimate, decide

PLAN = Plan(
    mode="block",
    graph_fingerprint="",
    cluster_fingerprint="c",
    axes={"pipeline": 1, "data": 1},
    workers=(Worker(index=0, process=0, machine=0, cores=(0,), stage=0, data=0),),
    threads_per_worker=1,
)
CHOICE = decide(
    [
        Estimate(method=Exact(), plan="two", step_time_s=1.0, sent_bytes=8.0, steps_factor=1.0),
        Estimate(method=DiLoCo(every=50), plan="one", step_time_s=0.5, sent_bytes=1.0, steps_factor=1.5),
    ],
    "equivalent-loss",
)
EVENTS: list[Event] = [
    PlanChosen(plan=PLAN, time_s=2.0),
    CandidateMeasured(description="two", plan=PLAN, predicted_step_time_s=1.0, step_time_s=0.5),
    CandidateMeasured(description="two", plan=PLAN, predicted_step_time_s=1.0, step_time_s=None, failed="too big"),
    WarningRaised(subject="capture", message="one block"),
    Checkpointed(action="saved", path="c/1", step=3, num_bytes=1024, time_s=0.1),
    SyncChosen(choice=CHOICE),
]


def _step(number: int, loss: float = 0.5) -> StepFinished:
    return StepFinished(step=number, loss=loss, step_time_s=0.25, num_samples=32, bytes_sent=2048)


def test_every_event_has_its_line() -> None:
    texts = [describe(event) for event in EVENTS]
    assert "plain PyTorch" in texts[0]
    assert "measured 500 ms" in texts[1] and "too big" in texts[2]
    assert "one block" in texts[3] and "c/1" in texts[4]
    assert "diloco: predicted to reach a loss in 75%" in texts[5]
    observed = dataclasses.replace(_step(7), exposed_time_s=0.01, skew=0.25, sent_to={1: 1024, 2: 1024})
    assert describe(observed).endswith("2.0 KiB sent (1.0 KiB to 1, 1.0 KiB to 2)  10 ms waiting  skew 25%")
    scaled = dataclasses.replace(_step(7), loss_scale=32768.0, skipped=True)
    assert describe(scaled).endswith("2.0 KiB sent  scale 32768  skipped")
    assert describe(_step(7)) == "step 7  loss 0.5  128.0 samples/s  250 ms a step  2.0 KiB sent"


def test_of_steps_one_line_per_interval_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = Lines(stream, interval_s=10)
    for number in range(1, 26):
        lines(_step(number))
        now[0] += 1
    lines(EVENTS[3])  # a warning is never held back
    lines.close()
    lines.close()
    shown = stream.getvalue().splitlines()
    assert [text.split()[1] for text in shown] == ["1", "11", "21", "capture:", "25"]


def test_metrics_are_whole_lines_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "m.jsonl"
    metrics = Metrics(path)
    for event in (*EVENTS, _step(1, loss=float("nan"))):
        metrics(event)
    kinds = [json.loads(line)["event"] for line in path.read_text().splitlines()]  # before it is closed
    metrics.close()
    assert kinds == ["plan_chosen", "candidate_measured", "candidate_measured", "warning_raised", "checkpointed",
                     "sync_chosen", "step_finished"]  # fmt: skip
    *_, choice, last = (json.loads(line) for line in path.read_text().splitlines())
    assert choice["method"] == "DiLoCo(every=50)" and choice["estimates"][0]["step_time_s"] == 0.5
    assert last["loss"] is None and last["samples_per_s"] == 128.0


def test_watching_ends_with_its_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        watching("train", tmp_path, interval_s=1) as first,
        watching("train", tmp_path, interval_s=1, quiet=True) as second,
    ):
        emit(_step(1))
    emit(_step(2))
    assert first != second
    for path in (first, second):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    assert capsys.readouterr().err.count("step 1") == 1


def test_the_live_line_takes_every_event() -> None:
    live = Live()
    for event in (*EVENTS, _step(1)):
        live(event)
    live.close()

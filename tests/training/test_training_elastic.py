"""Processes that come, go and crash while they train: losses and weights stay those of plain PyTorch."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import elastic_job
from elastic_job import plain

import partita
from partita import Elastic
from partita.errors import InputError
from partita.training.dealing import Dealer, deal, ready_s

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'partita[elastic]'")
from partita.training import membership

ROOT = Path(__file__).parents[2]


class Job:
    """A lighthouse, and processes of `elastic_job.py`."""

    def __init__(self, folder: Path, *, min_replicas: int = 1, method: str = "exact") -> None:
        self._folder, self._min_replicas, self._method = folder, min_replicas, method
        self._lighthouse = membership.lighthouse("127.0.0.1", 0, min_replicas)
        self._address = f"http://127.0.0.1:{self._lighthouse.address().rsplit(':', 1)[1]}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [str(self._folder), name, self._address, str(self._min_replicas), self._method]
        command = [sys.executable, elastic_job.__file__, *arguments]
        with self._output(name).open("a") as output:  # a pipe that nobody reads would hold the job up
            self.processes[name] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def _output(self, name: str) -> Path:
        return self._folder / f"{name}.txt"

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / f"{name}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last one may be incomplete

    def num(self, name: str) -> int:
        """How many processes took part in the last step of one; 0 before its first."""
        lines = self.lines(name)
        return int(lines[-1]["num"]) if lines else 0

    def until(self, ready: Callable[[], bool], limit_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + limit_s
        while not ready():
            failed = {name: self._output(name).read_text()[-3000:]
                      for name, p in self.processes.items() if (p.poll() or 0) > 0}  # fmt: skip
            assert not failed, failed
            assert time.monotonic() < deadline_s, {name: self.lines(name)[-1:] for name in self.processes}
            time.sleep(0.02)

    def ends(self, *names: str) -> list[list[list[float]]]:
        """The final weights of processes, which end some steps later."""
        steps = [self.lines(name)[-1]["step"] for name in names if self.lines(name)]
        self.last_step = -(-max(steps, default=0) // 5) * 5 + 20
        (self._folder / "end").write_text(str(self.last_step))
        for name in names:
            self.processes[name].wait(timeout=300)
            assert self.processes[name].returncode == 0, self._output(name).read_text()[-3000:]
        return [json.loads((self._folder / f"{name}.json").read_text())["weights"] for name in names]

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self._lighthouse.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.close()


def check(job: Job, weights: list[list[list[float]]]) -> None:
    """Whoever made a step found the loss of plain PyTorch, and all end with its weights."""
    losses, reference = plain(job.last_step)
    for name in job.processes:
        lines = job.lines(name)
        assert [line["loss"] for line in lines] == pytest.approx([losses[line["step"] - 1] for line in lines], abs=1e-4)
        for before, line in itertools.pairwise([{"step": 0}, *lines]):
            assert line["given"] in (0, before["step"])  # 0: started anew
            assert line["step"] > line["given"]  # further on: it has looked on while it received the state
    for found in weights:
        for value, wanted in zip(found, reference.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted.detach(), rtol=1e-3, atol=1e-4)


def test_one_that_is_killed_is_done_without_and_may_come_back(job: Job) -> None:
    for name in ("a", "b", "c"):
        job.start(name)
    job.until(lambda: any(line["num"] == 3 for line in job.lines("a")))
    job.processes["b"].send_signal(signal.SIGKILL)
    killed_s = time.time()
    last = job.lines("b")[-1]["step"]
    job.processes["b"].wait()
    job.until(lambda: job.lines("a")[-1]["end_s"] > killed_s and job.num("a") == 2)
    job.start("b")
    job.until(lambda: job.num("a") == 3)
    check(job, job.ends("a", "b", "c"))
    again = [line for line in job.lines("b") if line["start_s"] > killed_s]
    assert again and again[0]["step"] > last  # it received the others' state


def test_one_that_comes_late_receives_the_state(job: Job) -> None:
    job.start("a")
    job.until(lambda: len(job.lines("a")) >= 5)
    job.start("late")
    job.until(lambda: job.num("a") == 2)
    check(job, job.ends("a", "late"))
    first = job.lines("late")[0]
    assert first["given"] == 0 and first["step"] > 5


def test_one_that_stands_still_is_left_out_and_comes_back(job: Job) -> None:
    for name in ("a", "b"):
        job.start(name)
    job.until(lambda: any(line["num"] == 2 for line in job.lines("a")))
    job.processes["b"].send_signal(signal.SIGSTOP)
    stopped_s = time.time()
    job.until(lambda: job.num("a") == 1 and job.lines("a")[-1]["end_s"] > stopped_s)
    job.processes["b"].send_signal(signal.SIGCONT)
    job.until(lambda: job.num("a") == 2)
    check(job, job.ends("a", "b"))


def test_below_min_replicas_training_waits(tmp_path: Path) -> None:
    job = Job(tmp_path, min_replicas=2)
    try:
        job.start("a")
        time.sleep(5.0)
        assert not job.lines("a")
        job.start("b")
        job.until(lambda: bool(job.lines("a")))
        check(job, job.ends("a", "b"))
        assert all(line["num"] >= 1 for line in job.lines("a"))
    finally:
        job.close()


# In one process ----------------------------------------------------------------------------------------------------


def test_alone_with_a_lighthouse_training_is_plain(tmp_path: Path) -> None:
    server = membership.lighthouse("127.0.0.1", 0)
    try:
        address = f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
        model, optimizer = elastic_job.build()
        options: dict[str, Any] = {"plan": elastic_job.PLAN, "elastic": Elastic(lighthouse=address, timeout_s=5.0)}
        batch = elastic_job.batch_of(0)
        with partita.parallelize(model, optimizer, elastic_job.loss_fn, batch, **options) as step:
            losses = [step(elastic_job.batch_of(number)).loss for number in range(4)]
            assert step.num_steps == 4
            step.save(tmp_path)
            with pytest.raises(partita.NonFiniteLossError):
                step((batch[0] * float("nan"), batch[1]))
            assert step.num_steps == 4
            losses.append(step(elastic_job.batch_of(4)).loss)
            with pytest.raises(InputError, match="must have 24 rows"):
                step(tuple(value[:7] for value in batch))
            with pytest.raises(InputError, match="must update"):
                step(batch, update=False)
        assert losses == pytest.approx(plain(5)[0], abs=1e-5)
        other, other_optimizer = elastic_job.build(3)
        options["checkpoints"] = tmp_path
        with partita.parallelize(other, other_optimizer, elastic_job.loss_fn, batch, **options) as step:
            assert step.num_steps == 4
            assert step(elastic_job.batch_of(4)).loss == pytest.approx(losses[4], abs=1e-5)
            assert step.num_steps == 5
    finally:
        server.shutdown()


def test_gradients_are_clipped_by_the_norm_over_all_pieces() -> None:
    limit, wanted, found = 0.1, [], []
    reference, _ = elastic_job.build()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    for number in range(3):
        optimizer.zero_grad()
        elastic_job.loss_fn(reference, elastic_job.batch_of(number)).backward()  # type: ignore[no-untyped-call]
        wanted.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), limit)))
        optimizer.step()
    assert min(wanted) > limit
    server = membership.lighthouse("127.0.0.1", 0)
    try:
        elastic = Elastic(lighthouse=f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}", timeout_s=5.0)
        model, _ = elastic_job.build()
        own = torch.optim.SGD(model.parameters(), lr=0.5)
        batch, plan = elastic_job.batch_of(0), elastic_job.PLAN
        with partita.parallelize(
            model, own, elastic_job.loss_fn, batch, plan=plan, elastic=elastic, clip_grad_norm=limit
        ) as step:
            found = [step(elastic_job.batch_of(number)).grad_norm for number in range(3)]
    finally:
        server.shutdown()
    assert found == pytest.approx(wanted, rel=1e-4)
    for value, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def test_the_state_is_told_to_the_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    monkeypatch.setenv("PARTITA_JOB_TOKEN", "secret")
    transport = membership._transport_class()("127.0.0.1", timedelta(seconds=1))
    try:
        later = threading.Timer(0.3, transport.send_checkpoint, ([1], 7, {"x": torch.ones(2), "step": 7}, None))
        later.start()
        found = transport.recv_checkpoint(0, transport.metadata(), 7, timedelta(seconds=5))
        assert found["x"].tolist() == [1.0, 1.0] and found["step"] == 7
        for path in ("/", "/checkpoint/7", "/" + "0" * 32 + "/7", membership.path_of(6)):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(transport.metadata() + path, timeout=5)
        mine = membership.path_of(7)
        monkeypatch.setenv("PARTITA_JOB_TOKEN", "another")
        assert membership.path_of(7) != mine
        for _ in range(membership.KEPT_STEPS + 1):
            transport.disallow_checkpoint()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(transport.metadata() + mine, timeout=5)
    finally:
        transport.shutdown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"elastic": 3}, "must be partita.Elastic"),
        ({"elastic": Elastic(), "sync": "int8"}, "elastic training is exact, or by replicas"),
        ({"elastic": Elastic(), "sync": "auto"}, "a method that is known beforehand"),
        ({"elastic": Elastic(), "sync": partita.sync.LocalSGD(after=3)}, "leave after out"),
        (
            {"elastic": Elastic(), "sync": partita.sync.DiLoCo(compress=partita.sync.PowerSGD())},
            "must keep nothing that all have alike",
        ),
        ({"elastic": Elastic(), "sync": "streaming_diloco"}, "pass delay=0"),
        ({"elastic": Elastic()}, "lighthouse must be an address"),
        ({"elastic": Elastic(lighthouse="http://127.0.0.1:9", pieces=5)}, "multiple of pieces=5"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    model, optimizer = elastic_job.build()
    with pytest.raises(InputError, match=words):
        partita.parallelize(
            model, optimizer, elastic_job.loss_fn, elastic_job.batch_of(0), plan=elastic_job.PLAN, **options
        )


def test_a_lighthouse_that_is_not_there_is_named() -> None:
    model, optimizer = elastic_job.build()
    elastic = Elastic(lighthouse="http://127.0.0.1:9", timeout_s=1.0)
    with (
        pytest.raises(partita.StepError, match=r"the lighthouse at http://127.0.0.1:9 must"),
        partita.parallelize(
            model, optimizer, elastic_job.loss_fn, elastic_job.batch_of(0), plan=elastic_job.PLAN, elastic=elastic
        ) as step,
    ):
        step(elastic_job.batch_of(0))


@pytest.mark.parametrize(
    "options",
    [{"min_replicas": 0}, {"pieces": True}, {"timeout_s": 0}, {"timeout_s": "5"}, {"wait_s": -1}, {"lighthouse": 5}],
)
def test_settings_of_a_wrong_kind_are_refused(options: Any) -> None:
    with pytest.raises(InputError):
        Elastic(**options)


# Dealing -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4))
def test_no_other_deal_is_ready_sooner(num_pieces: int, times_s: list[float]) -> None:
    found = deal(num_pieces, times_s)
    assert sum(found) == num_pieces

    def every(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for count in range(left + 1):
            for rest in every(left - count, places - 1):
                yield (count, *rest)

    best = min(ready_s(counts, times_s) for counts in every(num_pieces, len(times_s)))
    assert ready_s(found, times_s) == pytest.approx(best)


def test_a_dealer_follows_speeds_but_not_noise() -> None:
    dealer = Dealer(12)
    dealer.start(3)
    assert dealer.counts == (4, 4, 4)
    for _ in range(5):
        dealer.learn([1.0, 1.02, 0.98])
    assert dealer.counts == (4, 4, 4)
    for _ in range(20):
        dealer.learn([1.0, 1.0, 4.0])
    assert dealer.counts == (6, 5, 1) and dealer.slowness[2] == pytest.approx(4, rel=0.1)
    for _ in range(20):
        dealer.learn([1.0, 1.0, 0.0])  # it had nothing to do
    assert dealer.counts == (6, 5, 1)
    for _ in range(20):
        dealer.learn([1.0, 1.0, 20.0])
    assert dealer.counts == (6, 6, 0)
    dealer.start(2)
    assert dealer.counts == (6, 6) and dealer.slowness == ()

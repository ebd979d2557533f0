"""Replicas that come, go and crash while they train apart and agree now and then."""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import elastic_job
from elastic_job import EVERY, METHODS, batch_of, build, loss_fn

import partita
from partita import Elastic
from partita.program.wire import ring_bytes
from partita.training.sync.fragments import fragments_of
from partita.training.sync.method import Part, Peers

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'partita[elastic]'")
from test_training_elastic import Job

from partita.training import membership


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, method="diloco")
    yield made
    made.close()


def plain(num_replicas: int, num_windows: int) -> list[torch.Tensor]:
    """What replicas of plain PyTorch agree on, each of which trains on an equal part of every batch."""
    model, _ = build()
    agreed = [value.detach().clone() for value in model.parameters()]
    velocity = [torch.zeros_like(value) for value in agreed]
    replicas = []
    for _ in range(num_replicas):
        own = copy.deepcopy(model)
        replicas.append((own, torch.optim.AdamW(own.parameters(), lr=1e-2)))
    for window in range(num_windows):
        for place, (own, optimizer) in enumerate(replicas):
            with torch.no_grad():
                for value, y in zip(own.parameters(), agreed, strict=True):
                    value.copy_(y)
            for number in range(window * EVERY, (window + 1) * EVERY):
                x, y = (part.chunk(num_replicas)[place] for part in batch_of(number))
                optimizer.zero_grad()
                loss_fn(own, (x, y)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            for i, y in enumerate(agreed):
                mean = sum(y - list(own.parameters())[i] for own, _ in replicas) / num_replicas
                velocity[i] = 0.5 * velocity[i] + mean
                y -= 0.8 * (mean + 0.5 * velocity[i])
    return agreed


def same(weights: list[list[list[float]]]) -> bool:
    return all(found == weights[0] for found in weights)


def test_undisturbed_replicas_agree_as_those_of_plain_pytorch(tmp_path: Path) -> None:
    job = Job(tmp_path, min_replicas=2, method="diloco")
    try:
        (tmp_path / "end").write_text(str(2 * EVERY))
        for name in ("a", "b"):
            job.start(name)
        for name in ("a", "b"):
            job.processes[name].wait(timeout=300)
        lines = job.lines("a")
        assert [line["step"] for line in lines] == list(range(1, 2 * EVERY + 1)) and lines[-1]["num"] == 2
        job.last_step = 2 * EVERY
        weights = [elastic_job.json.loads((tmp_path / f"{name}.json").read_text())["weights"] for name in ("a", "b")]
    finally:
        job.close()
    assert same(weights)
    for value, wanted in zip(weights[0], plain(2, 2), strict=True):
        torch.testing.assert_close(torch.tensor(value), wanted, rtol=1e-3, atol=1e-4)


def test_one_that_is_killed_loses_its_window_and_receives_what_was_agreed(job: Job) -> None:
    for name in ("a", "b", "c"):
        job.start(name)
    job.until(lambda: any(line["num"] == 3 for line in job.lines("a")))
    job.processes["b"].send_signal(signal.SIGKILL)
    killed_s = time.time()
    job.processes["b"].wait()
    job.until(lambda: job.num("a") == 2)
    steps = [line["step"] for line in job.lines("a")]
    assert steps == list(range(steps[0], steps[0] + len(steps)))  # the others lost nothing, whoever came first
    job.start("b")
    job.until(lambda: job.num("a") == 3)
    weights = job.ends("a", "b", "c")
    assert same(weights)
    again = [line for line in job.lines("b") if line["start_s"] > killed_s]
    assert again[0]["given"] == 0 and again[0]["step"] % EVERY == 0 and again[0]["step"] > 0
    assert again[1]["given"] == again[0]["step"] and again[1]["step"] == again[0]["step"] + 1


def test_one_that_stands_still_is_left_out_and_comes_back(job: Job) -> None:
    for name in ("a", "b"):
        job.start(name)
    job.until(lambda: any(line["num"] == 2 for line in job.lines("a")))
    job.processes["b"].send_signal(signal.SIGSTOP)
    stopped_s = time.time()
    job.until(lambda: job.num("a") == 1 and job.lines("a")[-1]["end_s"] > stopped_s)
    job.processes["b"].send_signal(signal.SIGCONT)
    job.until(lambda: job.num("a") == 2)
    assert same(job.ends("a", "b"))


def agree(job: Job, *names: str) -> int:
    """How many steps several processes have made, after each of which they had the same bits."""
    found: dict[int, list[str]] = {}
    for name in names:
        for line in job.lines(name):
            found.setdefault(line["step"], []).append(line["agreed"])
    assert all(len(set(own)) == 1 for own in found.values())
    return sum(len(own) > 1 for own in found.values())


def judge(weights: list[Any]) -> float:
    """The loss of weights on batches that no training sees."""
    model, _ = build()
    with torch.no_grad():
        for value, found in zip(model.parameters(), weights, strict=True):
            value.copy_(torch.as_tensor(found))
        return sum(float(loss_fn(model, batch_of(10**6 + number))) for number in range(20)) / 20


def sent_bytes(method: str, num: int, place: int, step: int) -> int:
    """What a replica sends in an agreement after that step: facts, a fragment by the method's formula, the end."""
    peers = Peers(tuple(range(num)), place)
    parts = [Part(name, tuple(value.shape)) for name, value in build()[0].named_parameters()]
    compress, fragments = METHODS[method].compress, [parts]  # type: ignore[attr-defined]
    if method == "streaming":
        fragments = [[piece.part for piece in own] for own in fragments_of(parts, 2)]
    own = fragments[step // EVERY % len(fragments)]
    return int(compress.sent_bytes(own, peers)) + ring_bytes(4 * (3 + num), num) + ring_bytes(4, num)


@pytest.mark.parametrize("method", ["int8", "streaming"])
def test_compressed_replicas_go_on_without_one_that_dies_within_an_exchange(tmp_path: Path, method: str) -> None:
    job = Job(tmp_path, min_replicas=2, method=method)
    try:
        for name in ("a", "b", "mortal"):
            job.start(name)
        job.until(lambda: job.processes["mortal"].poll() is not None and job.num("a") == 2, 180.0)
        assert job.processes["mortal"].returncode == -signal.SIGKILL
        del job.processes["mortal"]
        job.start("late")
        job.until(lambda: job.num("a") == 3)
        weights = job.ends("a", "b", "late")
        lines = {name: job.lines(name) for name in ("a", "b", "late", "mortal")}
        assert lines["mortal"]
        assert agree(job, *lines) > 10 * EVERY
    finally:
        job.close()
    assert lines["late"][0]["given"] == 0 and lines["late"][0]["step"] > 2 * EVERY
    if method == "int8":
        assert same(weights)  # of streaming replicas they differ but for the fragment that was exchanged last
    steps = {line["step"] for name in ("a", "b") for line in lines[name]}
    assert steps == set(range(1, max(steps) + 1))  # those that lived have lost nothing
    exchanges = [line for own in lines.values() for line in own if line["sent"]]
    assert {line["num"] for line in exchanges} == {2, 3}
    seldom = 0  # sums that were tried twice, or with somebody who was behind
    for line in exchanges:
        assert line["sent"] == line["sent_to"]
        behind = line["place"] is None
        seldom += behind or line["sent"] != sent_bytes(method, line["num"], line["place"], line["step"])
    assert seldom < len(exchanges) / 2
    last = lines["a"][-1]["step"]
    undisturbed = judge(plain(3, last // EVERY))
    assert undisturbed < 0.5 * judge(list(build()[0].parameters()))
    if method == "int8":
        assert judge(weights[0]) < 1.5 * undisturbed


def test_alone_it_trains_agrees_with_itself_and_resumes_from_what_was_agreed(tmp_path: Path) -> None:
    server = membership.lighthouse("127.0.0.1", 0)
    try:
        address = f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
        options: dict[str, Any] = {
            "plan": elastic_job.PLAN,
            "sync": METHODS["diloco"],
            "elastic": Elastic(lighthouse=address, timeout_s=5.0),
        }
        model, optimizer = build()
        merged, _ = build(9)
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), **options) as step:
            for number in range(EVERY + 2):
                result = step(batch_of(number))
                assert result.step == step.num_steps == number + 1
            own = [value.detach().clone() for value in model.parameters()]
            step.sync_to(merged)
            path = step.save(tmp_path)
            assert path.endswith(f"{EVERY}")
            for value, before in zip(model.parameters(), own, strict=True):
                assert torch.equal(value, before)  # training goes on from the replica's own
        wanted = plain(1, 1)
        for value, agreed in zip(merged.parameters(), wanted, strict=True):
            torch.testing.assert_close(value.detach(), agreed, rtol=1e-3, atol=1e-4)
        other, other_optimizer = build(3)
        with partita.parallelize(other, other_optimizer, loss_fn, batch_of(0), checkpoints=tmp_path, **options) as step:
            assert step.num_steps == EVERY
            for value, agreed in zip(other.parameters(), wanted, strict=True):
                torch.testing.assert_close(value.detach(), agreed, rtol=1e-3, atol=1e-4)
            for number in range(EVERY, 2 * EVERY):
                step(batch_of(number))
            assert step.num_steps == 2 * EVERY
    finally:
        server.shutdown()


def test_what_is_fed_back_is_in_checkpoints_and_brought_by_the_one_that_resumes(tmp_path: Path) -> None:
    server = membership.lighthouse("127.0.0.1", 0)
    try:
        address = f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
        options: dict[str, Any] = {
            "plan": elastic_job.PLAN,
            "sync": METHODS["int8"],
            "elastic": Elastic(lighthouse=address, timeout_s=5.0),
        }
        model, optimizer = build()
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), **options) as step:
            (missing,) = step._fragments.all[0].own().values()  # type: ignore[attr-defined]
            missing.fill_(0.25)
            step.save(tmp_path)
        other, other_optimizer = build()
        with partita.parallelize(other, other_optimizer, loss_fn, batch_of(0), checkpoints=tmp_path, **options) as step:
            fragment = step._fragments.all[0]  # type: ignore[attr-defined]
            assert all((value == 0.25).all() for value in fragment.own().values())
            before = [value.clone() for value in fragment.outer.agreed]
            for number in range(EVERY):
                step(batch_of(number))
            assert not any(value.any() for value in fragment.own().values())
            moved = [y - x for y, x in zip(before, fragment.outer.agreed, strict=True)]
        exact_model, exact_optimizer = build()
        options["sync"] = METHODS["diloco"]
        with partita.parallelize(exact_model, exact_optimizer, loss_fn, batch_of(0), **options) as step:
            for number in range(EVERY):
                step(batch_of(number))
            exact = step._fragments.all[0].outer.agreed  # type: ignore[attr-defined]
            for x, y, found in zip(before, exact, moved, strict=True):
                torch.testing.assert_close(found, x - y + 1.5 * 0.8 * 0.25, rtol=1e-3, atol=1e-4)
    finally:
        server.shutdown()

"""Compiled code on disk and in the background: the same results, never another request's, and no wait at the end."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from partita.runtime import compiling
from partita.runtime.compiling import Background, BackgroundError, Request, compile_or_load, kept_path, load_kept, serve

CPU = torch.device("cpu")
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
LAYOUTS = [((4, 6), (6, 1), torch.float32)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def wave(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(x) * 2 + x, x.sum(1)


def request(factor: float = 1.0, *, num_threads: int = 1) -> Request:
    module = make_fx(lambda x: wave(x * factor), tracing_mode="fake")(torch.randn(4, 6))
    return Request.of(module, LAYOUTS, device=CPU, num_threads=num_threads)


class Written(str):
    """Stands for compiled code."""

    def save(self, path: str) -> None:
        Path(path).write_text(self)


def kept_by_hand(request: Request, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keeps something without a compiler; what is loaded is the content of the file."""
    monkeypatch.setattr(compiling, "load_compiled", lambda path: Path(path).read_text())
    compiling.keep(request, Written("compiled code"))  # type: ignore[arg-type]
    return ["compiled code"]


def test_only_an_equal_request_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    one = request()
    kept_by_hand(one, monkeypatch)
    assert load_kept(one) == load_kept(request()) == "compiled code"
    for other in (request(2.0), request(num_threads=2)):
        assert kept_path(other) != kept_path(one) and load_kept(other) is None
        shutil.copy(kept_path(one), kept_path(other))  # as if the hashes were equal
        assert load_kept(other) is None
    compiling._surroundings.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert load_kept(one) is None
    compiling._surroundings.cache_clear()


@pytest.mark.parametrize("length", [0, 3, 9, 40, -1])
def test_a_damaged_file_is_none(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = request()
    kept_by_hand(one, monkeypatch)
    content = kept_path(one).read_bytes()
    kept_path(one).write_bytes(content[:length])
    assert load_kept(one) is None
    kept_path(one).write_bytes(b"\xff" * 40)
    assert load_kept(one) is None


def test_a_broken_artifact_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_fx(wave, tracing_mode="fake")(torch.randn(4, 6))
    kept_by_hand(request(), monkeypatch)
    monkeypatch.setattr(compiling, "compile_graph", lambda *_, **__: Written("fresh"))

    def broken(path: str) -> Any:
        raise RuntimeError("no such library")

    monkeypatch.setattr(compiling, "load_compiled", broken)
    assert compile_or_load(module, LAYOUTS, device=CPU, num_threads=1) == "fresh"  # type: ignore[comparison-overlap]


def test_the_helper_answers_every_request_and_says_why_not() -> None:
    asked: list[int] = []

    def compiler(request: Request) -> None:
        asked.append(request.num_threads)
        if request.num_threads == 2:
            raise ValueError("two is too many\nmore")

    reading, writing = io.BytesIO(), io.BytesIO()
    for count in (1, 2, 3):
        compiling._write(reading, pickle.dumps(request(num_threads=count)))
    reading.seek(0)
    serve(reading, writing, compiler)
    writing.seek(0)
    answers = [compiling._read(writing).decode() for _ in range(3)]
    assert asked == [1, 2, 3] and answers == ["", "ValueError: two is too many", ""]


def test_a_helper_that_dies_fails_its_segment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.sys, "executable", shutil.which("false"))
    with Background(1) as background:
        futures = [background.submit(request(factor)) for factor in (1.0, 2.0)]
        for future in futures:
            with pytest.raises(BackgroundError, match="ended with"):
                future.result(60)


def test_closing_does_not_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(sleeper))
    background = Background(1)
    futures = [background.submit(request(factor)) for factor in (1.0, 2.0)]
    deadline_s = time.monotonic() + 30
    while not background._helpers and time.monotonic() < deadline_s:
        time.sleep(0.01)
    (helper,) = background._helpers
    background.close()
    assert all(future.done() for future in futures)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    assert helper.poll() is not None and not any(thread.is_alive() for thread in background._threads)


@needs_compiler
@pytest.mark.slow
def test_compiled_in_the_background_and_loaded_again() -> None:
    """By a process of low priority, whose code is then that of this process, and of later ones."""
    with Background(1) as background:
        future = background.submit(request())
        while not background._helpers and not future.done():
            time.sleep(0.01)
        if background._helpers and hasattr(os, "getpriority"):
            deadline_s = time.monotonic() + 120
            while time.monotonic() < deadline_s and not future.done():
                if os.getpriority(os.PRIO_PROCESS, background._helpers[0].pid) >= compiling.NICENESS:
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("the helper never lowered its priority")
        compiled = future.result(400)
    again = load_kept(request())
    assert again is not None
    x = torch.randn(4, 6)
    for call in (compiled, again):
        for made, wanted in zip(call(x), wave(x), strict=True):
            torch.testing.assert_close(made, wanted)

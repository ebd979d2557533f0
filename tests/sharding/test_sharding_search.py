"""Rules found by experiment: the right ones, no wrong ones, crashes survived, results kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import partita.sharding.helper as helpers
from partita.sharding.calls import OpCall
from partita.sharding.experiment import rule_holds
from partita.sharding.found import RuleBook, is_searched, shipped_rules
from partita.sharding.helper import Found, Helper, Request, in_fork
from partita.sharding.regenerate import call_of, examples
from partita.sharding.rules import REPLICATE, Blocks, Rule, parse_rule
from partita.sharding.scaling import signature, twin

aten = torch.ops.aten


def real(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.fixture(scope="module")
def helper() -> Iterator[Helper]:
    with Helper() as one:
        yield one


index_add = call_of(aten.index_add.default, real(30, 50), 0, whole(70), real(70, 50))
SEARCHED: list[tuple[OpCall, set[str]]] = [
    (index_add, {"P R P -> P", "S1 R S1 -> S1", "P S0 S0 -> P"}),
    (
        call_of(aten.scatter_reduce.two, real(8, 5), 0, whole(8, 5), real(8, 5), "sum"),
        {"P R P -> P", "P S0 S0 -> P", "S1 S1 S1 -> S1"},
    ),
    (call_of(aten.scatter_reduce.two, real(8, 5), 0, whole(8, 5), real(8, 5), "amax"), {"S1 S1 S1 -> S1"}),
    (call_of(aten._fft_r2c.default, real(8, 12, 16), [2], 0, True), {"P -> P", "S0 -> S0", "S1 -> S1"}),
    (call_of(aten.im2col.default, real(8, 3, 9, 9), [3, 3], [1, 1], [0, 0], [1, 1]), {"S0 -> S0", "S1 -> S1*9"}),
    (call_of(aten.cumprod.default, real(8, 7), 1), {"S0 -> S0"}),
    (call_of(aten.linalg_cholesky_ex.default, real(8, 5, 5)), {"S0 -> S0 S0"}),
    (call_of(aten._linalg_solve_ex.default, real(8, 5, 5), real(8, 5, 3)), {"S0 S0 -> S0 S0 S0 S0"}),
    (call_of(aten.reflection_pad2d.default, real(8, 3, 9, 9), [1] * 4), {"P -> P", "S0 -> S0", "S1 -> S1"}),
    (call_of(aten.any.default, torch.empty(64, dtype=torch.bool)), set()),
    (call_of(aten.clamp.default, real(8, 7), -1e4, 1e4), {"S0 -> S0", "S1 -> S1"}),
    (call_of(aten.linalg_matrix_exp.default, real(5, 5)), set()),
]


@pytest.mark.parametrize("case", SEARCHED, ids=lambda case: str(case[0].target))
def test_finds_exactly_what_holds(helper: Helper, case: tuple[OpCall, set[str]]) -> None:
    call, expected = case
    small = twin(call)
    assert small is not None
    (found,) = helper.find([small], limit_s=120.0)
    assert found is not None and found.ran
    got = set(found.rules)
    assert expected <= got if call.base_name == "im2col" else got == expected
    for text in got:
        rule = parse_rule(text, call)
        assert rule is not None
        assert rule_holds(call, rule, Blocks((rule.extent - 1, 1) if rule.extent else (1, 1)), seed=9), text


def test_a_guess_that_corrupts_memory_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel writes where it must not brings the process down later, in a guess that is right."""
    small = twin(index_add)
    assert small is not None
    real_start = subprocess.Popen

    def dying(args: list[str], **options: Any) -> subprocess.Popen[bytes]:
        script = (
            "import os, partita.sharding.helper as helper, partita.sharding.search as search\n"
            "true, corrupt = search._Trial._tried, []\n"
            "def tried(trial, rule, blocks):\n"
            "    if corrupt: os.abort()\n"
            "    if rule.text().startswith('S1 S1 S1 ->'): corrupt.append(rule)\n"
            "    return true(trial, rule, blocks)\n"
            "search._Trial._tried = tried\n"
            "helper.serve()\n"
        )
        return real_start([args[0], "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    with Helper() as one:
        (found,) = one.find([small], limit_s=120.0)
    assert found is not None and set(found.rules) == {"P R P -> P", "S1 R S1 -> S1", "P S0 S0 -> P"}


def test_a_fork_that_dies_or_hangs_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "FORK_LIMIT_S", 1)
    rule = Rule((REPLICATE,), (REPLICATE,))
    assert in_fork(lambda: rule) == rule
    assert in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL)) is None
    assert in_fork(lambda: time.sleep(60)) is None


def test_out_of_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    book = RuleBook(shipped={}, cache_name="rules.json", limit_s=0.0)
    with pytest.warns(UserWarning, match="not found within"):
        assert book.find([index_add]) == [()]
    assert not (tmp_path / "rules.json").exists()


def test_what_was_found_is_kept_for_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    monkeypatch.setattr(Helper, "find", lambda self, calls, limit_s: [Found(True, ("S1 R S1 -> S1",))] * len(calls))
    assert RuleBook(shipped={}, cache_name="rules.json", limit_s=9.0).find([index_add]) == [("S1 R S1 -> S1",)]
    monkeypatch.setattr(Helper, "find", lambda self, calls, limit_s: pytest.fail("searched again"))
    other = call_of(aten.index_add.default, real(31, 5), 0, whole(9), real(9, 5))
    assert RuleBook(shipped={}, cache_name="rules.json", limit_s=9.0).find([other]) == [("S1 R S1 -> S1",)]


def test_twins() -> None:
    small = twin(index_add)
    assert small is not None
    assert signature(small) == "aten.index_add.default(float32[4,6], 0, int64[10], float32[10,6])"
    assert small.outputs[0] is not None and small.outputs[0].shape == (4, 6)
    patches = twin(call_of(aten.col2im.default, real(8, 27, 49), [9, 9], [3, 3], [1, 1], [0, 0], [1, 1]))
    assert patches is not None and patches.inputs[0].shape == (4, 27, 49)  # fixed by the other arguments
    norm = call_of(aten.native_layer_norm.default, real(32, 64), [64], real(64), real(64), 1e-5)
    scaled = twin(norm)
    assert scaled is not None and scaled.args[1] == [6] and scaled.inputs[0].shape == (4, 6)


def test_never_searched() -> None:
    assert not is_searched(call_of(aten.view.default, real(4, 6), [24]))
    assert not is_searched(call_of(aten.bernoulli.default, real(4, 6)))
    assert not is_searched(call_of(aten.zeros.default, [4]))
    assert not is_searched(call_of(aten.add_.Tensor, real(4), real(4)))
    assert is_searched(index_add)


def test_shipped_rules_hold() -> None:
    """Every shipped rule of some of the examples, in this process, on shapes that were not searched."""
    shipped = shipped_rules()
    checked = 0
    for call in list(examples())[::7]:
        small = twin(call)
        if small is None or call.base_name.startswith("_fused") or "cholesky" in call.base_name:
            continue
        for text in shipped.get(signature(small)) or ():
            rule = parse_rule(text, call)
            if rule is not None and all(spec.dtype.is_floating_point for spec in call.inputs):
                assert rule_holds(call, rule, Blocks((rule.extent - 1, 1) if rule.extent else (1, 1))), (call, text)
                checked += 1
    assert checked > 20


def test_user_ops_are_not_known_to_the_helper() -> None:
    request = Request("nowhere::op.default", (), {}, (), (), False)
    assert request.call() is None

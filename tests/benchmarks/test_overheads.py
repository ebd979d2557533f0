"""The overheads benchmark measures what it says it does."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import pytest
import torch

from benchmarks import overheads
from benchmarks.processes import Group, free_port
from partita.runtime.local import Channel

CORES = (sorted(os.sched_getaffinity(0)) * 2)[:2]


@pytest.mark.parametrize("num_elements", [1, 2, 7, 50_000])
def test_the_raw_exchange_gives_both_the_sum(num_elements: int) -> None:
    ends = socket.socketpair()
    own = [torch.arange(num_elements, dtype=torch.float32) * (rank + 1) for rank in range(2)]
    other = [torch.empty(num_elements) for _ in range(2)]
    threads = [
        threading.Thread(target=overheads._raw_sum, args=(ends[rank], own[rank], other[rank], rank))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for end in ends:
        end.close()
    assert torch.equal(other[0], own[0] + own[1]) and torch.equal(other[1], own[0] + own[1])


def test_the_limit_of_a_sum_writes_the_whole_sum() -> None:
    values = [torch.full((1001,), float(index)) for index in range(2)]
    made: list[torch.Tensor] = []
    original = torch.empty_like

    def remembered(like: torch.Tensor) -> torch.Tensor:
        made.append(original(like))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", remembered)
        add = overheads._adding(values, CORES, 3)
    assert add() > 0 and torch.equal(made[0], values[0] + values[1])


def test_a_slower_hand_over_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Channel.put

    def put(self: Any, value: Any) -> None:
        time.sleep(0.002)
        honest(self, value)

    monkeypatch.setattr(overheads, "NUM_TURNS", 2)
    monkeypatch.setattr(Channel, "put", put)
    turns = overheads._in_turns(lambda: overheads._lock_handover_s(CORES, 20), lambda: 0.0, 2)
    assert all(0 < limit < 0.002 for limit, _ in turns)
    assert all(ours > 0.002 for _, ours in overheads.handover_turns(CORES, 20))


def test_a_collective_takes_at_least_the_time_of_its_sum() -> None:
    (limit, ours), *_ = overheads.local_turns(1 << 20, CORES)
    assert 0 < limit < ours < 1.0


def test_two_processes_are_measured() -> None:
    with Group("benchmarks.overheads", "two", num_processes=2) as group:
        message = {"what": "all-reduce across processes", "cores": CORES, "bytes": 4096, "port": free_port()}
        replies = group.ask(message, 60.0)
    for reply in replies:
        assert all(limit > 0 and ours > 0 for limit, ours in reply["turns"]), reply


def test_rows_are_medians_of_turns() -> None:
    row = overheads.row_of("x", 8, [(1e-6, 2e-6), (1e-6, 8e-6), (2e-6, 6e-6)])
    assert row["limit_us"] == 1.0 and row["ours_us"] == pytest.approx(6.0) and row["ratio"] == pytest.approx(3.0)
    assert row["ours_gb_per_s"] == pytest.approx(8 / 6e-6 / 1e9)

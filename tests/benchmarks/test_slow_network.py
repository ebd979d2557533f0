"""Emulated machines: what they are, that nothing of them is left, and what the benchmark concludes from rows."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.slow_field import what_failed
from benchmarks.slow_machines import HEADER_BYTES, Machines, Traffic, why_not
from benchmarks.slow_network import bytes_error, judge, misses_of, step_times, summarise

REASON = why_not()
needs_root = pytest.mark.skipif(REASON is not None, reason=REASON or "")
MBIT = 125_000.0

_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=20) as link:
    link.sendall(bytes(int(sys.argv[2])))
    link.shutdown(socket.SHUT_WR)
    link.recv(1)
"""
_RECEIVE = """
import socket
with socket.create_server(("", 7000)) as server:
    print("ready", flush=True)
    link, _ = server.accept()
    total = 0
    while piece := link.recv(1 << 16):
        total += len(piece)
    print(total, flush=True)
"""


def names() -> str:
    done = [subprocess.run(command, capture_output=True, text=True) for command in (["ip", "netns"], ["ip", "link"])]
    return "".join(one.stdout for one in done)


@needs_root
@pytest.mark.parametrize("num_machines", [2, 3])
def test_machines_send_what_is_asked_at_their_rate_and_leave_nothing(num_machines: int) -> None:
    num_bytes, rate = 1_000_000, 20 * MBIT
    with Machines((rate,) * num_machines) as machines:
        assert machines.name(0) in names()
        server = subprocess.Popen(
            [*machines.prefix(1), sys.executable, "-c", _RECEIVE], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        before, start_s = machines.traffic(), time.perf_counter()
        command = [*machines.prefix(0), sys.executable, "-c", _SEND, machines.address(1), str(num_bytes)]
        subprocess.run(command, check=True, timeout=60)
        took_s = time.perf_counter() - start_s
        assert server.stdout.readline() == f"{num_bytes}\n"
        server.wait(20)
        server.stdout.close()
        sent = [after.payload_since(first) for after, first in zip(machines.traffic(), before, strict=True)]
        host = subprocess.run([*machines.prefix(1), "hostname"], capture_output=True, text=True).stdout.strip()
        left = machines.name(0)
    assert took_s > 0.9 * num_bytes / rate  # never faster than the link; how much slower is the machine's affair
    assert sent[0] == pytest.approx(num_bytes, rel=0.01) and sent[1] < 0.01 * num_bytes
    assert host == left.replace("m0", "m1")
    assert left not in names() and left[:-2] not in names()


@needs_root
def test_what_a_killed_process_leaves_is_removed_by_the_next() -> None:
    script = (
        "import os; from benchmarks.slow_machines import Machines; "
        "machines = Machines((1e6, 1e6, 1e6)); print(machines.name(0)); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    left = done.stdout.strip()
    assert done.returncode == 9 and left in names()
    with Machines((1e6, 1e6)):
        assert left not in names() and left[:-2] not in names()


def test_payload_is_what_is_left_without_headers() -> None:
    before = Traffic(1000, 5)
    assert Traffic(1000 + 3 * HEADER_BYTES + 2800, 8).payload_since(before) == 2800
    assert Traffic(1000 + 4 * HEADER_BYTES, 9).payload_since(before) == 0  # acknowledgements


def test_a_step_takes_as_long_as_on_its_slowest_machine() -> None:
    assert step_times([{"times_s": [1.0, 4.0]}, {"times_s": [3.0, 2.0]}]) == [3.0, 4.0]


def test_inexact_peers_do_not_count() -> None:
    row = judge({"ddp": 4.0, "plain": 3.0, "ddp fp16": 0.5, "partita": 2.0, "partita data": 1.0})
    assert row["best_peer"] == "plain" and row["ratio"] == pytest.approx(2 / 3) and row["gain_over_ddp"] == 2.0


def test_bytes_are_compared_where_there_are_any() -> None:
    assert bytes_error(100_000, [100_000], [104_000]) == pytest.approx(1 - 100 / 104)
    assert bytes_error(0, [0], [500]) is None
    assert bytes_error(1_000_000, [0], [500]) == float("inf")


def test_every_limit_that_is_missed_is_told() -> None:
    row = {"network": "2 x 100 Mbit/s", "model": "mlp", "ratio": 1.0, "best_peer": "plain", "gain_over_ddp": 3.0}
    assert summarise([row])[1] == []
    plans = {"partita data": {"predicted_bytes_sent": 1e6}}
    told = {"plans": plans, "bytes_sent": {"partita data": 2e6}, "wire_bytes": {"partita data": 2e6}}
    worse = {**row, "ratio": 1.2, "gain_over_ddp": 1.5, "bytes_error": 0.5, "errors": {"ddp": "lost"}, **told}
    assert len(misses_of(worse, must_gain=True)) == 4
    assert len(misses_of(worse, must_gain=False)) == 3
    assert len(misses_of({"network": "", "model": ""}, must_gain=False)) == 1


@pytest.mark.parametrize(
    ("types", "told"),
    [
        (["KeyError"], "KeyError: 0"),
        (["PeerLostError", "StepError", "KeyError"], "KeyError: 2 (of PeerLostError, StepError, KeyError)"),
        (["WaitTimeoutError", "StepError"], "StepError: 1 (of WaitTimeoutError, StepError)"),
        (["PeerLostError", "PeerLostError"], "PeerLostError: 0 (of PeerLostError, PeerLostError)"),
    ],
)
def test_of_the_errors_of_a_job_the_cause_is_told(types: list[str], told: str) -> None:
    assert what_failed([{"error_type": kind, "error": f"{rank}\nmore"} for rank, kind in enumerate(types)]) == told

"""Strangers that send anything to every port of a job, its store's included: nothing crashes, hangs or changes."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzzed_job
from clipping_job import batch_of, build, loss_fn
from test_training_processes import run_job


class Stranger(threading.Thread):
    """Finds what the children of this process listen at, and sends random bytes there."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_over, self.num_messages, self.ports = False, 0, set[int]()
        self._chance = random.Random(11)

    def run(self) -> None:
        kept = []
        while not self.is_over:
            for port in self._listening():
                with contextlib.suppress(OSError):
                    caller = socket.create_connection(("127.0.0.1", port), 0.5)
                    caller.sendall(self._chance.randbytes(self._chance.randrange(1, 300)))
                    self.num_messages += 1
                    self.ports.add(port)
                    if self._chance.random() < 0.8:
                        caller.close()
                    else:
                        kept.append(caller)  # says no more
            time.sleep(0.01)
        for caller in kept:
            caller.close()

    def _listening(self) -> list[int]:
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                found += [one.laddr.port for one in child.net_connections() if one.status == psutil.CONN_LISTEN]
        return found


def test_messages_of_strangers_change_nothing(tmp_path: Path) -> None:
    stranger = Stranger()
    stranger.start()
    try:
        one, other = run_job("", tmp_path, Path(fuzzed_job.__file__))
    finally:
        stranger.is_over = True
        stranger.join(10)
    model, optimizer = build()
    wanted = []
    for number in range(fuzzed_job.NUM_STEPS):
        loss = loss_fn(model, batch_of(number % 5))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert one == other and one["losses"] == pytest.approx(wanted, abs=1e-3)
    assert stranger.num_messages > 50 and len(stranger.ports) >= 3  # the store's, and of both processes

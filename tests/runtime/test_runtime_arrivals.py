"""Who waits for others before an exchange: without a limit for one at work, and with one for all others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from partita.runtime import arrivals
from partita.runtime.arrivals import Arrivals

LIMIT_S = 0.2


@dataclass
class Signs:
    """What a process knows of the others."""

    works: Callable[[], bool] = lambda: False
    lost: Any = None
    works_alone: bool = True

    def others_work_alone(self) -> bool:
        return self.works()


@pytest.fixture
def come(monkeypatch: pytest.MonkeyPatch) -> Callable[[Signs], Arrivals]:
    """The arrivals of another process of two."""
    monkeypatch.setattr(arrivals, "BEAT_TIME_S", 0.0)
    store = torch.distributed.HashStore()
    return lambda signs: Arrivals(store, signs, 2, LIMIT_S)  # type: ignore[arg-type]


def test_processes_go_on_together_again_and_again(come: Callable[[Signs], Arrivals]) -> None:
    here, there = come(Signs()), come(Signs())
    for _ in range(5):
        other = threading.Thread(target=there.wait)
        other.start()
        here.wait()
        other.join()
    assert here._store.num_keys() <= 3  # those of the last turn alone, and one that a store may keep for itself


def test_one_that_works_alone_is_waited_for_beyond_the_limit(come: Callable[[Signs], Arrivals]) -> None:
    asked: list[float] = []

    def works() -> bool:  # asked each time that the limit has passed
        asked.append(time.monotonic())
        if len(asked) == 3:
            threading.Thread(target=there.wait).start()
        return len(asked) < 4

    signs, there = Signs(works), come(Signs())
    come(signs).wait()
    assert len(asked) == 3 and not signs.works_alone


def test_where_nobody_works_alone_the_limit_counts(come: Callable[[Signs], Arrivals]) -> None:
    with pytest.raises(RuntimeError, match="timed out"):
        come(Signs()).wait()


def test_one_that_is_lost_is_not_waited_for(come: Callable[[Signs], Arrivals]) -> None:
    signs = Signs(lambda: True)
    threading.Timer(3 * LIMIT_S, lambda: setattr(signs, "lost", "rank 1")).start()
    with pytest.raises(RuntimeError, match="lost"):
        come(signs).wait()

"""Meetings and channels among threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from partita.errors import WaitTimeoutError
from partita.runtime.failure import Failure, Stopped, Waiter
from partita.runtime.local import Channel, Meeting, Party


def parties(count: int, *, timeout_s: float = 20.0) -> tuple[Failure, list[Party]]:
    failure = Failure()
    return failure, [Party(index, Waiter(failure), timeout_s) for index in range(count)]


def in_threads(count: int, body: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count

    def call(index: int) -> None:
        results[index] = body(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_round_everybody_sees_what_all_brought(count: int) -> None:
    _, members = parties(count)
    meeting = Meeting(members)
    results = in_threads(count, lambda me: [meeting.gather(me, (me, turn)) for turn in range(200)])
    for seen in results:
        assert seen == [[(member, turn) for member in range(count)] for turn in range(200)]
    assert not meeting._rounds  # nothing is kept alive after the last has left


def test_a_fast_member_may_enter_the_next_round_before_a_slow_one_has_left() -> None:
    _, members = parties(2)
    meeting = Meeting(members)

    def body(me: int) -> list[list[int]]:
        if me == 0:
            return [meeting.gather(0, turn) for turn in range(3)]
        first = meeting.bring(1, 10)  # does not leave yet
        meeting.leave(1)
        return [first, meeting.gather(1, 11), meeting.gather(1, 12)]

    assert in_threads(2, body)[1] == [[0, 10], [1, 11], [2, 12]]


def test_a_missing_member_is_named() -> None:
    failure, members = parties(3, timeout_s=0.05)
    meeting = Meeting(members)
    members[0].labels, members[0].position = ("AllReduce k",), 0
    members[2].labels, members[2].position = ("Run a", "Run b"), 1

    def body(me: int) -> None:
        if me < 2:
            with pytest.raises(Stopped):
                meeting.gather(me, None)

    in_threads(3, body)
    assert isinstance(failure.error, WaitTimeoutError)
    assert "worker(s) 2 did not come: worker 2 is at instruction 1 (Run b)" in str(failure.error)


def test_channels_hand_over_in_order_and_by_reference() -> None:
    _, (sender, receiver) = parties(2)
    channel = Channel(sender, receiver)
    values = [object() for _ in range(300)]

    def body(me: int) -> list[object]:
        if me == 0:
            for value in values:
                channel.put(value)
            return []
        return [channel.take() for _ in values]

    taken = in_threads(2, body)[1]
    assert all(a is b for a, b in zip(taken, values, strict=True))

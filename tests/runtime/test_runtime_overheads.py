"""What the runtime takes for itself, measured here: in plausible bounds, and nothing is left over."""

from __future__ import annotations

import os
import threading

import pytest

from partita.runtime.overheads import COURIER_BYTES, measure_overheads


@pytest.mark.parametrize("num_cores", [1, 2])
def test_overheads_are_small_and_above_nothing(num_cores: int) -> None:
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    before = threading.active_count()
    found = measure_overheads(cores)
    assert threading.active_count() <= before, "workers and couriers have ended"
    assert set(found.step_s) == {1, len(cores)}
    times_s = [*found.step_s.values(), found.meeting_s, found.handover_s, found.courier_s]
    assert all(0 < time_s < 0.1 for time_s in times_s)
    large_s = found.courier_s + COURIER_BYTES[1] * found.courier_s_per_byte
    assert found.courier_s <= large_s < 0.1

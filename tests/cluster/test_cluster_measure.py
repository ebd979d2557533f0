"""Measurements: what they compute from times, what they keep, and that detection finds it. No claims about speed."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.cache import read_json, write_json
from partita.cluster import Link, Machine
from partita.cluster import measure as measuring
from partita.cluster.detect import look, profile_name
from partita.cluster.hardware import affinity
from partita.cluster.links import LARGE_BYTES, decode, encode, measure_process_link, rate_of, slowest, undisturbed
from partita.cluster.measure import Profile, measure_handover_s, measure_rates, measure_sum, of_host, rate


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "WINDOW_S", 0.002)


def test_a_rate_follows_from_large_messages() -> None:
    latency_s, large_s = 1e-4, 2e-4 + LARGE_BYTES / 1e9
    assert rate_of(LARGE_BYTES, [large_s] * 9 + [large_s + 1.0], latency_s) == pytest.approx(1e9)
    assert rate_of(LARGE_BYTES, [1e-3], 1.0) > 0  # disturbed latency: never a negative rate


def test_the_slowest_of_links() -> None:
    one, two = Link(bytes_per_s=1.0, latency_s=1.0), Link(bytes_per_s=2.0, latency_s=3.0)
    assert slowest([one, two]) == Link(bytes_per_s=1.0, latency_s=3.0)
    assert slowest([]) is None
    assert decode(encode(two)) == two and decode(encode(None)) is None


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_undisturbed_times_are_among_the_lowest_tenth(times_s: list[float]) -> None:
    assert sum(time_s < undisturbed(times_s) for time_s in times_s) <= len(times_s) // 10


def _profile(flops: float, num_bytes: float) -> Profile:
    return Profile(
        flops_per_s_per_core=flops,
        flops_per_s_one_core=flops,
        memory_bytes_per_s=num_bytes,
        memory_bytes_per_s_one_core=num_bytes,
        handover_s=1e-5,
        all_reduce=(),
    )


def test_bound_processes_add_up_to_their_host() -> None:
    host = of_host([_profile(2.0, 10.0), _profile(4.0, 20.0)])
    assert (host.flops_per_s_per_core, host.memory_bytes_per_s, host.num_cores) == (3.0, 30.0, 2)


def test_rates_count_the_work_of_all_threads() -> None:
    names: set[str] = set()

    def make() -> measuring.Callable[[], int]:
        names.add(threading.current_thread().name)
        return lambda: 1_000_000_000_000

    cores = affinity()[:1] * 3
    assert rate(cores, make) > 1e12
    assert len(names) == 3


def test_an_exception_in_a_measuring_thread_ends_all() -> None:
    calls = iter([None, ValueError("broken")])

    def make() -> measuring.Callable[[], int]:
        failure = next(calls)
        if failure:
            raise failure
        return lambda: 1

    with pytest.raises(ValueError, match="broken"):
        rate(affinity()[:1] * 2, make)


def test_rates_of_this_machine_are_positive_and_leave_the_thread_alone() -> None:
    before = affinity()
    machine = Machine(name="a", cores=before[:2], memory_bytes=2**28)
    found = measure_rates(machine)
    assert min(found.flops_per_s_per_core, found.memory_bytes_per_s, found.handover_s) > 0
    assert affinity() == before
    assert measure_handover_s(before) > 0
    assert measure_sum(before[:1] * 3, 4096).num_workers == 3


def test_the_profile_is_kept_and_detection_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([Link(bytes_per_s=3.0, latency_s=0.5), Link(bytes_per_s=4.0, latency_s=0.25)])
    monkeypatch.setattr(measuring, "measure_process_link", lambda *, timeout_s: next(turns))
    first = measuring.profile()
    seen = look(0)
    assert seen.process_link == first.process_link == Link(bytes_per_s=3.0, latency_s=0.5)
    assert seen.machine.flops_per_s_per_core == first.flops_per_s_per_core
    assert seen.machine.memory_bytes_per_s == first.memory_bytes_per_s
    assert measuring.profile() == first  # from the cache
    network = Link(bytes_per_s=7.0, latency_s=0.1)
    write_json(profile_name(seen.machine), msgspec.to_builtins(msgspec.structs.replace(first, network=network)))
    again = measuring.profile(again=True)  # measures anew, but keeps the network that only a job can measure
    assert again.process_link == Link(bytes_per_s=4.0, latency_s=0.25)
    assert again.network == look(0).network == network


def test_another_version_of_torch_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure_process_link", lambda *, timeout_s: Link(bytes_per_s=1.0))
    name = profile_name(look(0).machine)
    write_json(name, msgspec.to_builtins(msgspec.structs.replace(_profile(1.0, 1.0), torch_version="1.0")))
    assert measuring.profile().flops_per_s_per_core != 1.0
    assert (read_json(name) or {})["torch_version"] != "1.0"


def test_two_processes_measure_their_link() -> None:
    link = measure_process_link(timeout_s=60)
    assert link.bytes_per_s > 1e6 and 0 < link.latency_s < 10


def test_a_busy_machine_is_told() -> None:
    quiet = msgspec.structs.replace(_profile(1.0, 1.0), num_cores=8, busy_cores=1.0)
    assert not quiet.is_disturbed
    assert msgspec.structs.replace(quiet, busy_cores=3.0).is_disturbed

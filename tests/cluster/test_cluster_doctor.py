"""The doctor's findings about made-up scenes."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from partita.cluster import Machine, doctor
from partita.cluster.doctor import Finding, Scene, diagnose, examine


def _scene(root: Path = Path("/nowhere"), *, num_cores: int = 4, **environment: str) -> Scene:
    cores = tuple(range(num_cores))
    machine = Machine(name="a", cores=cores, memory_bytes=2**34, numa_nodes=(cores,))
    return Scene(machine=machine, allowed=cores, root=root, environment=environment)


def _put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _one(check: Callable[[Scene], list[Finding]], scene: Scene) -> Finding:
    found = check(scene)
    assert len(found) == 1
    assert (found[0].status == "OK") == (found[0].cure == "")  # every problem has a cure
    return found[0]


def test_this_machine_has_no_broken_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    findings = diagnose()
    assert {"versions", "cores", "memory", "job", "gloo", "measurements"} <= {finding.subject for finding in findings}
    assert not [finding for finding in findings if "check itself failed" in finding.detail]
    measured = next(finding for finding in findings if finding.subject == "measurements")
    assert measured.status == "WARN" and "partita profile" in measured.cure


def test_a_broken_check_is_a_finding_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def _check_odd_thing(scene: Scene) -> list[Finding]:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(doctor, "_CHECKS", (_check_odd_thing, doctor._check_spinning))
    findings = examine(_scene())
    assert [finding.subject for finding in findings] == ["odd thing", "waiting threads"]
    assert "ZeroDivisionError: boom" in findings[0].detail


@pytest.mark.parametrize(
    ("environment", "status"),
    [({}, "WARN"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "OK"), ({"GOMP_SPINCOUNT": "0"}, "OK"),
     ({"OMP_WAIT_POLICY": "active"}, "WARN")],
)  # fmt: skip
def test_spinning(environment: dict[str, str], status: str) -> None:
    assert _one(doctor._check_spinning, _scene(**environment)).status == status


@pytest.mark.parametrize(
    ("environment", "status", "cure"),
    [
        ({}, "OK", ""),
        ({"OMP_NUM_THREADS": "4"}, "OK", ""),
        ({"OMP_NUM_THREADS": "8"}, "WARN", "OMP_NUM_THREADS=4"),
        ({"OMP_NUM_THREADS": "many"}, "FAIL", "positive"),
        ({"OMP_NUM_THREADS": "4", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
         "WARN", "OMP_NUM_THREADS=2"),
    ],
)  # fmt: skip
def test_oversubscription(environment: dict[str, str], status: str, cure: str) -> None:
    finding = _one(doctor._check_threads, _scene(**environment))
    assert finding.status == status and cure in finding.cure


def test_a_fraction_of_a_core(tmp_path: Path) -> None:
    _put(tmp_path, "proc/self/cgroup", "0::/\n")
    _put(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000")
    finding = _one(doctor._check_cores, _scene(tmp_path))
    assert finding.status == "WARN" and "1.5 cores" in finding.detail
    _put(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")
    assert _one(doctor._check_cores, _scene(tmp_path)).status == "OK"


def test_huge_pages_and_governor(tmp_path: Path) -> None:
    assert doctor._check_huge_pages(_scene(tmp_path)) == []
    _put(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    assert _one(doctor._check_huge_pages, _scene(tmp_path)).status == "WARN"
    _put(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    assert _one(doctor._check_huge_pages, _scene(tmp_path)).status == "OK"
    assert doctor._check_governor(_scene(tmp_path)) == []
    _put(tmp_path, "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave")
    assert _one(doctor._check_governor, _scene(tmp_path)).status == "WARN"


def test_small_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    usage = shutil._ntuple_diskusage(2**26, 0, 2**26)  # docker's default of 64 MiB
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "shm-size" in _one(doctor._check_shared_memory, _scene(tmp_path)).cure


def test_busy_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "busy_cores", lambda cores, *, sample_s: 2.0)
    assert _one(doctor._check_load, _scene()).status == "WARN"
    assert _one(doctor._check_load, _scene(num_cores=64)).status == "OK"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "g++" in _one(doctor._check_compiler, _scene()).cure
    assert "'/x/c++'" in _one(doctor._check_compiler, _scene(CXX="/x/c++")).detail


def test_interfaces() -> None:
    finding = _one(doctor._check_interface, _scene(GLOO_SOCKET_IFNAME="nothere0"))
    assert finding.status == "FAIL" and "nothere0" in finding.detail


def test_jobs() -> None:
    assert _one(doctor._check_job, _scene()).detail.startswith("none")
    assert _one(doctor._check_job, _scene(RANK="1")).status == "FAIL"
    lost = _one(doctor._check_job, _scene(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2"))
    assert lost.status == "FAIL" and "MASTER_ADDR" in lost.cure


def test_the_master_is_reachable_if_it_listens_or_refuses() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
        job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
        assert _one(doctor._check_job, _scene(MASTER_ADDR="127.0.0.1", **job)).status == "OK"
        server.listen()
        assert _one(doctor._check_job, _scene(MASTER_ADDR="127.0.0.1", **job)).status == "OK"
        lost = _one(doctor._check_job, _scene(MASTER_ADDR="no-such-host.invalid", **job))
        assert lost.status == "FAIL" and "resolve" in lost.detail


def test_more_processes_than_cores() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    found = doctor._check_job(_scene(num_cores=1, MASTER_ADDR="127.0.0.1", **environment))
    assert [finding.status for finding in found] == ["OK", "WARN"]


def test_a_driver_without_torch_support(tmp_path: Path) -> None:
    assert _one(doctor._check_gpus, _scene(tmp_path)).status == "OK"
    _put(tmp_path, "dev/nvidia0", "")
    assert _one(doctor._check_gpus, _scene(tmp_path)).status == "WARN"

"""Detection from made-up /proc trees and environments, TOML files, presets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.cluster import Cluster, Link, Machine
from partita.cluster.detect import Sighting, assemble, detect
from partita.cluster.files import default_processes, parse, split_cores, to_toml
from partita.cluster.hardware import cpu_quota, memory_bytes, parse_list, physical_cores, read_machine
from partita.cluster.job import bound_alone, current_job
from partita.errors import ClusterError

GOOD = """
[network]
bytes_per_s = 1e9
[process_link]
bytes_per_s = 2e9
[[machines]]
name = "a"
cores = [0, 1]
memory_bytes = 1024
"""


def _put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_machine_of_a_fake_tree(tmp_path: Path) -> None:
    for core in range(8):  # 4 physical cores of 2 hardware threads, 2 NUMA nodes, 2 sockets
        topology = f"sys/devices/system/cpu/cpu{core}/topology"
        _put(tmp_path, f"{topology}/core_cpus_list", f"{core % 4},{core % 4 + 4}\n")
        _put(tmp_path, f"{topology}/physical_package_id", str(core % 4 // 2))
    _put(tmp_path, "sys/devices/system/node/node0/cpulist", "0-1,4-5")
    _put(tmp_path, "sys/devices/system/node/node1/cpulist", "2-3,6-7")
    _put(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\n")
    _put(tmp_path, "proc/self/cgroup", "0::/job\n")
    _put(tmp_path, "sys/fs/cgroup/job/memory.max", "512000")
    machine = read_machine(root=tmp_path, allowed=range(8), name="m", gpus=False)
    assert machine.cores == (0, 1, 2, 3)
    assert machine.numa_nodes == ((0, 1), (2, 3))
    assert (machine.num_sockets, machine.memory_bytes) == (2, 512_000)
    assert physical_cores((1, 5), tmp_path) == (1, 5)  # one physical core alone: its threads count


def test_quota_is_the_tightest_of_the_groups_around(tmp_path: Path) -> None:
    _put(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    _put(tmp_path, "sys/fs/cgroup/a/cpu.max", "250000 100000")
    _put(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert cpu_quota(tmp_path) == 2.5
    assert read_machine(root=tmp_path, allowed=range(6), gpus=False).cores == (0, 1)


def test_version_1_groups(tmp_path: Path) -> None:
    _put(tmp_path, "proc/self/cgroup", "4:memory:/x\n1:cpu,cpuacct:/x\n")
    _put(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\n")
    _put(tmp_path, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", "4096")
    _put(tmp_path, "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "150000")
    _put(tmp_path, "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000")
    assert (memory_bytes(tmp_path), cpu_quota(tmp_path)) == (4096, 1.5)


def test_kernel_lists() -> None:
    assert parse_list("0-2,8\n") == (0, 1, 2, 8)
    assert parse_list("") == ()


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0"}
MPI = {f"OMPI_COMM_WORLD_{key}": value for key, value in
       {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()} | {"MASTER_ADDR": "n0"}  # fmt: skip
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n0"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[0-1]"}  # fmt: skip


@pytest.mark.parametrize("environment", [TORCHRUN, MPI, PMI, SRUN], ids=["torchrun", "openmpi", "mpich", "srun"])
def test_jobs_of_every_launcher(environment: dict[str, str]) -> None:
    job = current_job(environment)
    assert job is not None
    assert (job.rank, job.world_size, job.local_rank, job.local_world_size) == (3, 4, 1, 2)
    assert job.master_address == "n0"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("gpu[003-005,9],login", "gpu003"),
        ("login,gpu[003-005]", "login"),
        ("r[2-4]n[1,7]", "r2n1"),
        ("a[08,10-12]-ib,b[1-2]", "a08-ib"),
        ("10.0.0.5", "10.0.0.5"),
    ],
)
def test_rank_0_of_a_slurm_job_runs_on_its_first_host(nodes: str, first: str) -> None:
    step = current_job(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert step is not None and step.master_address == first
    without = {name: value for name, value in MPI.items() if name != "MASTER_ADDR"}
    inside = current_job(without | {"SLURM_JOB_NODELIST": nodes})  # mpirun in a batch script
    assert inside is not None and inside.master_address == first
    outside = current_job(without)
    assert outside is not None and outside.master_address is None


def test_runs_on_one_host_get_ports_of_their_own() -> None:
    def port(environment: dict[str, str]) -> int:
        job = current_job(environment)
        assert job is not None
        return job.master_port

    steps = [SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (71, 72) for step in (0, 1)]
    runs = [MPI | {"PMIX_NAMESPACE": name} for name in ("461897729", "461963265")]
    ports = [port(environment) for environment in (*steps, *runs)]
    assert len(set(ports)) == len(ports) and all(1024 < one < 32_768 for one in ports)
    assert [port(environment | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) for environment in steps] == ports[:4]
    assert port(runs[0] | {"MASTER_PORT": "4711"}) == 4711


def test_srun_that_speaks_pmi_tells_where_its_tasks_are() -> None:
    job = current_job(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"})
    assert job is not None and (job.launcher, job.local_world_size) == ("srun", 2)
    hydra = current_job(SRUN | PMI)  # MPICH's mpirun starts its helpers by srun
    assert hydra is not None and hydra.launcher == "MPICH"


def test_a_process_that_open_mpi_has_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_bound_at_launch": "1"}
    assert bound_alone(bound) and not bound_alone(bound | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert not bound_alone({}) and not bound_alone({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    for name, value in bound.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="mpirun --bind-to none"):
        detect()


def test_no_job_alone_or_in_a_batch_script() -> None:
    assert current_job({}) is None
    assert current_job({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert current_job({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}]
)
def test_contradictory_environments(environment: dict[str, str]) -> None:
    with pytest.raises(ClusterError):
        current_job(environment)


def _sighting(rank: int, host: str, cores: tuple[int, ...]) -> Sighting:
    machine = Machine(name=host, cores=cores, memory_bytes=1000, numa_nodes=(cores,))
    return Sighting(
        rank=rank, host=host, machine=machine, network=Link(bytes_per_s=1.0 + rank), process_link=Link(bytes_per_s=1)
    )


def test_processes_of_a_host_share_or_keep_their_cores() -> None:
    shared = assemble(tuple(_sighting(rank, "ab"[rank // 2], (0, 1, 2, 3)) for rank in range(4)))
    assert [(p.machine, p.cores, p.memory_bytes) for p in shared.processes] == [
        (0, (0, 1), 500), (0, (2, 3), 500), (1, (0, 1), 500), (1, (2, 3), 500)]  # fmt: skip
    assert shared.is_here and shared.network.bytes_per_s == 1.0
    bound = assemble((_sighting(0, "a", (0, 2)), _sighting(1, "a", (1, 3))))
    assert [p.cores for p in bound.processes] == [(0, 2), (1, 3)]
    assert bound.machines[0].cores == (0, 1, 2, 3)
    with pytest.raises(ClusterError, match="bind-to none"):
        assemble((_sighting(0, "a", (0, 1)), _sighting(1, "a", (1, 2))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_bytes", "memory_byte"), r"unknown key 'machines\[0\].memory_byte'. Did you mean 'memory_bytes'"),
        (("[network]", "[netwrok]"), "unknown key 'netwrok'. Did you mean 'network'"),
        (("[0, 1]", '"all"'), r"machines\[0\].cores"),
        (("[0, 1]", "[1, 1]"), "distinct"),
        (("= 1024", "= 0"), r"machines\[0\].memory_bytes: must be > 0"),
        (("1e9", "-1.0"), "network.bytes_per_s"),
        (("[network]", "[network"), "must be TOML"),
    ],
)
def test_wrong_files_name_the_place(change: tuple[str, str], message: str) -> None:
    assert parse(GOOD).processes[0].cores == (0, 1)
    with pytest.raises(ClusterError, match=message):
        parse(GOOD.replace(*change))


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    positive = st.floats(1e-9, 1e18)
    links = st.builds(Link, bytes_per_s=positive, latency_s=st.floats(0, 10))
    machines = st.builds(
        Machine,
        name=st.text(max_size=8),
        cores=st.lists(st.integers(0, 500), min_size=1, max_size=9, unique=True).map(tuple),
        memory_bytes=st.integers(1, 2**50),
        cpu=st.text(max_size=8),
        num_sockets=st.integers(1, 8),
        cache_bytes=st.dictionaries(st.sampled_from(["L1d", "L2", "L3"]), st.integers(1, 2**30)),
        flops_per_s_per_core=positive,
        memory_bytes_per_s=positive,
        gpu_link=st.none() | links,
    )
    built = tuple(draw(st.lists(machines, min_size=1, max_size=3)))
    return Cluster(machines=built, processes=default_processes(built), network=draw(links), process_link=draw(links))


@given(clusters())
def test_files_round_trip(cluster: Cluster) -> None:
    again = parse(to_toml(cluster))
    assert again == cluster
    assert again.fingerprint == cluster.fingerprint


def test_save_and_load(tmp_path: Path) -> None:
    cluster = Cluster.detect()
    assert cluster.is_here
    cluster.save(tmp_path / "c.toml")
    assert Cluster.load(tmp_path / "c.toml") == msgspec.structs.replace(cluster, is_here=False)
    with pytest.raises(ClusterError, match="readable"):
        Cluster.load(tmp_path / "absent.toml")


def test_more_processes_than_cores_take_turns() -> None:
    machine = Machine(name="a", cores=(0, 1), memory_bytes=1)
    assert split_cores(machine, 3) == ((0,), (1,), (0,))


def test_presets() -> None:
    cluster = Cluster.preset("4x8xH100")
    assert (len(cluster.machines), len(cluster.processes)) == (4, 32)
    assert cluster.processes[9].gpus == (1,) and cluster.processes[9].machine == 1
    assert Cluster.preset("2x1xcpu-16").num_cores == 32
    for name in ("T4", "V100", "V100-32", "A100-40GB", "A100", "H200", "B200", "GB200"):
        assert parse(to_toml(Cluster.preset(f"1x2x{name}"))) == Cluster.preset(f"2x{name}")


@pytest.mark.parametrize("name", ["4x8xH10", "H1000x2", "0x1xcpu-2", "1x4xcpu-2", "", "2x"])
def test_unknown_presets(name: str) -> None:
    with pytest.raises(ClusterError, match=r"preset|process"):
        Cluster.preset(name)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ClusterError, match=r"'H100'.*MACHINESx"):
        Cluster.preset("4x8xH10")

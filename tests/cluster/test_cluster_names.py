"""GPUs as people write them."""

from __future__ import annotations

import pytest

from partita.cluster import Cluster
from partita.cluster.names import gpu_from_text
from partita.cluster.presets import GPU_KINDS
from partita.errors import ClusterError


@pytest.mark.parametrize(
    ("text", "name", "per_machine", "network_gb_per_s"),
    [
        ("A100", "A100-80", 8, 200),
        ("A100-80GB (Selene)", "A100-80", 8, 200),
        ("a100_40gb", "A100-40", 8, 200),
        ("NVIDIA A100-SXM4-40GB", "A100-40", 8, 200),
        ("A100-PCIE-80GB", "A100-PCIE", 8, 25),
        ("V100-16GB (p3.16xlarge, 25Gbps)", "V100-16", 8, 3.125),
        ("V100 (DGX-2)", "V100-16", 16, 100),
        ("Tesla V100-32GB", "V100-32", 8, 12.5),
        ("H100 (DGX-H100)", "H100", 8, 400),
        ("h100_80gb", "H100", 8, 400),
        ("H100-80GB 700W RoCE 400Gb/s", "H100", 8, 400),
        ("DGX-GB200", "GB200", 72, 200),
        ("DGX-B300", "B300", 8, 800),
        ("Titan X (1 per node, 40Gbps InfiniBand)", "TITANX", 1, 5),
        ("A10G", "A10G", 8, 12.5),
        ("A10", "A10", 8, 12.5),
        ("T4", "T4", 8, 3.125),
        ("MI300X", "MI300X", 8, 400),
        ("RTX 3090 24GB", "RTX3090", 8, 3.125),
    ],
)
def test_names(text: str, name: str, per_machine: int, network_gb_per_s: float) -> None:
    kind = gpu_from_text(text)
    assert (kind.gpu.name, kind.gpus_per_machine) == (name, per_machine)
    assert kind.network.bytes_per_s / 1e9 == pytest.approx(network_gb_per_s)


@pytest.mark.parametrize("name", sorted(GPU_KINDS))
def test_every_kind_is_found_by_its_own_name(name: str) -> None:
    assert gpu_from_text(name).gpu.name.split("-")[0] == name.split("-")[0]


def test_memory_and_power_of_the_text() -> None:
    kind = gpu_from_text("H100-96GB HBM2e 500W (Grand Teton, 400Gb/s/GPU RDMA)")
    assert kind.gpu.memory_bytes == 95 * 2**30 and kind.gpu.memory_bytes_per_s == 2.4e12
    assert kind.gpu.flops_per_s["bfloat16"] == pytest.approx(989.5e12 * (500 / 700) ** (1 / 3))


@pytest.mark.parametrize("text", ["", "TPU v4", "GPU"])
def test_unknown(text: str) -> None:
    with pytest.raises(ClusterError, match="must be one of"):
        gpu_from_text(text)


def test_processors_by_name() -> None:
    cluster = Cluster.preset("2x1xEPYC-7763")
    assert cluster.num_cores == 128 and cluster.machines[0].memory_bytes_per_s == 204.8e9
    assert cluster.machines[0].flops_per_s_per_core == pytest.approx(78.4e9)
    with pytest.raises(ClusterError, match="every process must have a core"):
        Cluster.preset("1x100xGRACE")

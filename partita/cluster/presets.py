"""Clusters by name: ``"4x8xH100"`` is 4 machines x 8 GPUs x kind H100; ``"2x1xcpu-16"`` 2 machines x 1 process x 16
cores.
Figures are the vendors' own, dense (without structured sparsity), of the boards that data centres use; the source
stands beside each kind. Rates that a vendor does not give are left out, not guessed. Memory is what torch reports as
usable, in whole GiB rounded down (a little less than the vendor's figure), because plans have to fit into it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partita.errors import ClusterError
from partita.units import split_evenly

if TYPE_CHECKING:
    from partita.cluster.model import Cluster

from partita.cluster.model import Gpu, Link, Machine, Process

GRAMMAR = (
    "MACHINESxPROCESSESxKIND, e.g. '4x8xH100' (4 machines with 8 GPUs, one process a GPU) or '2x1xcpu-16' (2 machines "
    "with 16 cores, one process each); a leading '1x' may be left out"
)


@dataclass(frozen=True, kw_only=True)
class GpuKind:
    """A kind of GPU and the machine it is usually sold in.

    `link` joins the GPUs of one machine, per GPU and direction; `network` is what one machine has to the others.
    `gpus_per_machine` counts those that `link` joins (a whole NVL72 rack). `generation` groups
    kinds of one architecture, `num_processors` counts streaming multiprocessors (compute units), `power_w` is the
    board's limit.
    """

    gpu: Gpu
    link: Link
    network: Link
    cores_per_gpu: int
    host_memory_bytes_per_gpu: int
    generation: str = "unknown"
    num_processors: int = 100
    gpus_per_machine: int = 8
    gpus_per_network: int = 8  # those that share `network` (a rack of trays has one for each tray)
    power_w: float = 0.0


def _kind(
    name: str,
    *,
    memory_gib: int,
    tflops: dict[str, float],
    memory_gb_per_s: float,
    link_gb_per_s: float,
    network_gbit_per_s: float,
    cores: int,
    host_gib: int,
    generation: str = "unknown",
    processors: int = 100,
    per_machine: int = 8,
    per_network: int = 0,
    power_w: float = 0.0,
) -> GpuKind:
    # Latencies: NVLink and PCIe peer copies take microseconds (NCCL's own tuning table, `src/graph/tuning.cc`, says
    # 4-15 us for a small ring step); InfiniBand or RoCE with NCCL about 10-20 us; plain Ethernet (T4, V100 cloud hosts)
    # about 50 us.
    return GpuKind(
        gpu=Gpu(
            name=name,
            memory_bytes=memory_gib * 2**30,
            flops_per_s={dtype: rate * 1e12 for dtype, rate in tflops.items()},
            memory_bytes_per_s=memory_gb_per_s * 1e9,
        ),
        link=Link(bytes_per_s=link_gb_per_s * 1e9, latency_s=5e-6),
        network=Link(bytes_per_s=network_gbit_per_s * 1e9 / 8, latency_s=1.5e-5 if network_gbit_per_s >= 200 else 5e-5),
        cores_per_gpu=cores,
        host_memory_bytes_per_gpu=host_gib * 2**30,
        generation=generation,
        num_processors=processors,
        gpus_per_machine=per_machine,
        gpus_per_network=per_network or per_machine,
        power_w=power_w,
    )


# "tfloat32" is what float32 matrix products reach when torch.backends.cuda.matmul.allow_tf32 permits it.
GPU_KINDS: dict[str, GpuKind] = {
    # NVIDIA T4 datasheet (2018): 8.1 TF FP32, 65 TF FP16, 16 GB GDDR6 at 300 GB/s (320 in later editions), PCIe 3.0
    # x16.
    "T4": _kind("T4", memory_gib=14, tflops={"float32": 8.1, "float16": 65}, memory_gb_per_s=300,
                link_gb_per_s=15.75, network_gbit_per_s=25, cores=8, host_gib=32,
                generation="turing", processors=40, power_w=70),
    # NVIDIA V100 datasheet (SXM2): 15.7 TF FP32, 7.8 FP64, 125 FP16 tensor, 900 GB/s, NVLink 2: 300 GB/s both
    # directions.
    "V100-16": _kind("V100-16", memory_gib=15, tflops={"float64": 7.8, "float32": 15.7, "float16": 125},
                     memory_gb_per_s=900, link_gb_per_s=150, network_gbit_per_s=100, cores=5, host_gib=64,
                     generation="volta", processors=80, power_w=300),
    "V100-32": _kind("V100-32", memory_gib=31, tflops={"float64": 7.8, "float32": 15.7, "float16": 125},
                     memory_gb_per_s=900, link_gb_per_s=150, network_gbit_per_s=100, cores=5, host_gib=96,
                     generation="volta", processors=80, power_w=300),
    # NVIDIA A100 datasheet (SXM4): 19.5 TF FP32, 156 TF32, 312 FP16/BF16; 40 GB: 1555 GB/s, 80 GB: 2039 GB/s; NVLink 3:
    # 600 GB/s both directions; DGX A100: 8 x 200 Gbit/s InfiniBand, 128 cores, 1 or 2 TB.
    "A100-40": _kind("A100-40", memory_gib=39, memory_gb_per_s=1555, link_gb_per_s=300, network_gbit_per_s=1600,
                     tflops={"float64": 9.7, "float32": 19.5, "tfloat32": 156, "float16": 312, "bfloat16": 312},
                     cores=16, host_gib=128,
                     generation="ampere", processors=108, power_w=400),
    "A100-80": _kind("A100-80", memory_gib=79, memory_gb_per_s=2039, link_gb_per_s=300, network_gbit_per_s=1600,
                     tflops={"float64": 9.7, "float32": 19.5, "tfloat32": 156, "float16": 312, "bfloat16": 312},
                     cores=16, host_gib=256,
                     generation="ampere", processors=108, power_w=400),
    # NVIDIA H100 datasheet (SXM5; given with sparsity, halved here): 67 TF FP32, 494.5 TF32, 989.5 FP16/BF16, 1979 FP8,
    # 80 GB HBM3 at 3350 GB/s, NVLink 4: 900 GB/s both directions; DGX H100: 8 x 400 Gbit/s, 112 cores, 2 TB.
    "H100": _kind("H100", memory_gib=79, memory_gb_per_s=3350, link_gb_per_s=450, network_gbit_per_s=3200,
                  tflops={"float64": 34, "float32": 67, "tfloat32": 494.5, "float16": 989.5, "bfloat16": 989.5,
                          "float8_e4m3fn": 1979},
                  cores=14, host_gib=256,
                  generation="hopper", processors=132, power_w=700),
    # NVIDIA H200 datasheet (SXM): H100's arithmetic, 141 GB HBM3e at 4800 GB/s.
    "H200": _kind("H200", memory_gib=139, memory_gb_per_s=4800, link_gb_per_s=450, network_gbit_per_s=3200,
                  tflops={"float64": 34, "float32": 67, "tfloat32": 494.5, "float16": 989.5, "bfloat16": 989.5,
                          "float8_e4m3fn": 1979},
                  cores=14, host_gib=256,
                  generation="hopper", processors=132, power_w=700),
    # NVIDIA DGX B200 datasheet (8 GPUs: 1440 GB at 64 TB/s, 36 PF FP16/BF16 dense 18, 72 PF FP8 sparse): per GPU 180
    # GB, 8 TB/s, 2250 TF BF16, 4500 FP8; HGX B200: 75 TF FP32, 37 FP64, TF32 1100; NVLink 5: 1800 GB/s both directions.
    "B200": _kind("B200", memory_gib=178, memory_gb_per_s=8000, link_gb_per_s=900, network_gbit_per_s=3200,
                  tflops={"float64": 37, "float32": 75, "tfloat32": 1100, "float16": 2250, "bfloat16": 2250,
                          "float8_e4m3fn": 4500, "float4_e2m1fn": 9000},
                  cores=14, host_gib=256,
                  generation="blackwell", processors=148, power_w=1000),
    # NVIDIA GB200 NVL72 datasheet (72 GPUs, 36 Grace CPUs of 72 cores and 480 GB): per GPU 186 GB HBM3e at 8 TB/s, 2500
    # TF BF16 dense, 5000 FP8, 80 FP32, 40 FP64, NVLink 5: 1800 GB/s both directions; one compute tray: 4 GPUs, 2 CPUs.
    "GB200": _kind("GB200", memory_gib=184, memory_gb_per_s=8000, link_gb_per_s=900, network_gbit_per_s=1600,
                   tflops={"float64": 40, "float32": 80, "tfloat32": 1250, "float16": 2500, "bfloat16": 2500,
                           "float8_e4m3fn": 5000, "float4_e2m1fn": 10000},
                   cores=36, host_gib=223,
                   generation="blackwell", processors=152, per_machine=72, per_network=4, power_w=1200),
    # NVIDIA DGX B300 datasheet (8 GPUs: 2.1 TB at 64 TB/s, 72 PF FP8 with sparsity, 108 PF FP4 dense): per GPU 2250 TF
    # BF16, 4500 FP8, 13500 FP4; 8 x 800 Gbit/s.
    "B300": _kind("B300", memory_gib=267, memory_gb_per_s=8000, link_gb_per_s=900, network_gbit_per_s=6400,
                  tflops={"float32": 75, "float16": 2250, "bfloat16": 2250, "float8_e4m3fn": 4500,
                          "float4_e2m1fn": 13500},
                  cores=16, host_gib=256, generation="blackwell_ultra", processors=148, power_w=1100),
    # NVIDIA GB300 NVL72 datasheet (72 GPUs: 20 TB at 576 TB/s, 180 PF BF16, 360 PF FP8, 1080 PF FP4 dense); one tray:
    # 4 GPUs and 4 x 800 Gbit/s.
    "GB300": _kind("GB300", memory_gib=277, memory_gb_per_s=8000, link_gb_per_s=900, network_gbit_per_s=3200,
                   tflops={"float32": 80, "float16": 2500, "bfloat16": 2500, "float8_e4m3fn": 5000,
                           "float4_e2m1fn": 15000},
                   cores=36, host_gib=223, generation="blackwell_ultra", processors=152, per_machine=72, per_network=4,
                   power_w=1400),
    # NVIDIA Tesla P100 datasheet (SXM2): 10.6 TF FP32, 21.2 FP16 (no tensor cores), 16 GB at 732 GB/s, NVLink 1: 160
    # GB/s.
    "P100": _kind("P100", memory_gib=15, tflops={"float64": 5.3, "float32": 10.6, "float16": 21.2},
                  memory_gb_per_s=732, link_gb_per_s=80, network_gbit_per_s=100, cores=5, host_gib=64,
                  generation="pascal", processors=56, power_w=300),
    # NVIDIA TITAN X (Pascal, 2016): 11 TF FP32, 12 GB at 480 GB/s, PCIe 3.0 x16; products in FP16 run at FP32's rate.
    "TITANX": _kind("TITANX", memory_gib=11, tflops={"float32": 10.97, "float16": 10.97}, memory_gb_per_s=480,
                     link_gb_per_s=15.75, network_gbit_per_s=40, cores=8, host_gib=64, generation="pascal",
                     processors=28, per_machine=1, power_w=250),
    # NVIDIA RTX 2080 Ti (Turing whitepaper): 13.4 TF FP32, 53.8 FP16 with FP32 sums, 11 GB at 616 GB/s, PCIe 3.0.
    "RTX2080TI": _kind("RTX2080TI", memory_gib=10, tflops={"float32": 13.4, "float16": 53.8}, memory_gb_per_s=616,
                       link_gb_per_s=15.75, network_gbit_per_s=25, cores=8, host_gib=32, generation="turing",
                       processors=68, power_w=250),
    # NVIDIA Ampere GA102 whitepaper: RTX 3090: 35.6 TF FP32, 71 FP16/BF16 with FP32 sums, 24 GB at 936 GB/s, PCIe 4.0.
    "RTX3090": _kind("RTX3090", memory_gib=23,
                     tflops={"float32": 35.6, "tfloat32": 35.6, "float16": 71, "bfloat16": 71},
                     memory_gb_per_s=936, link_gb_per_s=31.5, network_gbit_per_s=25, cores=8, host_gib=64,
                     generation="ampere", processors=82, power_w=350),
    # NVIDIA RTX A6000 datasheet: 38.7 TF FP32, 154.8 FP16/BF16 tensor, 48 GB at 768 GB/s, PCIe 4.0.
    "A6000": _kind("A6000", memory_gib=47, tflops={"float32": 38.7, "tfloat32": 77.4, "float16": 154.8,
                                                   "bfloat16": 154.8},
                   memory_gb_per_s=768, link_gb_per_s=31.5, network_gbit_per_s=100, cores=8, host_gib=64,
                   generation="ampere", processors=84, power_w=300),
    # NVIDIA A10 datasheet (24 GB at 600 GB/s, 125 TF FP16); the A10G of AWS g5 hosts: 70 TF.
    "A10": _kind("A10", memory_gib=22, tflops={"float32": 31.2, "tfloat32": 62.5, "float16": 125, "bfloat16": 125},
                 memory_gb_per_s=600, link_gb_per_s=31.5, network_gbit_per_s=100, cores=12, host_gib=48,
                 generation="ampere", processors=72, power_w=150),
    "A10G": _kind("A10G", memory_gib=22, tflops={"float32": 31.5, "tfloat32": 35, "float16": 70, "bfloat16": 70},
                  memory_gb_per_s=600, link_gb_per_s=31.5, network_gbit_per_s=100, cores=12, host_gib=48,
                  generation="ampere", processors=80, power_w=300),
    # NVIDIA A30 datasheet: 165 TF FP16/BF16, 24 GB at 933 GB/s, PCIe 4.0.
    "A30": _kind("A30", memory_gib=23, tflops={"float32": 10.3, "tfloat32": 82, "float16": 165, "bfloat16": 165},
                 memory_gb_per_s=933, link_gb_per_s=31.5, network_gbit_per_s=100, cores=8, host_gib=64,
                 generation="ampere", processors=56, power_w=165),
    # NVIDIA L4 datasheet (sparse figures halved): 121 TF FP16/BF16, 242 FP8, 24 GB at 300 GB/s, PCIe 4.0.
    "L4": _kind("L4", memory_gib=22, tflops={"float32": 30.3, "tfloat32": 60, "float16": 121, "bfloat16": 121,
                                             "float8_e4m3fn": 242},
                memory_gb_per_s=300, link_gb_per_s=31.5, network_gbit_per_s=100, cores=12, host_gib=48,
                generation="ada", processors=58, power_w=72),
    # NVIDIA L40S datasheet: 362 TF FP16/BF16, 733 FP8, 48 GB at 864 GB/s, PCIe 4.0.
    "L40S": _kind("L40S", memory_gib=44, tflops={"float32": 91.6, "tfloat32": 183, "float16": 362, "bfloat16": 362,
                                                 "float8_e4m3fn": 733},
                  memory_gb_per_s=864, link_gb_per_s=31.5, network_gbit_per_s=400, cores=12, host_gib=96,
                  generation="ada", processors=142, power_w=350),
    # NVIDIA Ada whitepaper: RTX 4090: 82.6 TF FP32, 165.2 FP16/BF16 with FP32 sums, 24 GB at 1008 GB/s, PCIe 4.0.
    "RTX4090": _kind("RTX4090", memory_gib=23, tflops={"float32": 82.6, "tfloat32": 82.6, "float16": 165.2,
                                                       "bfloat16": 165.2, "float8_e4m3fn": 330.3},
                     memory_gb_per_s=1008, link_gb_per_s=31.5, network_gbit_per_s=25, cores=8, host_gib=64,
                     generation="ada", processors=128, power_w=450),
    # NVIDIA A800 and H800: A100 and H100 with NVLink at 400 GB/s both directions; H20: 148 TF BF16, 96 GB at 4000 GB/s.
    "A800": _kind("A800", memory_gib=79, memory_gb_per_s=2039, link_gb_per_s=200, network_gbit_per_s=1600,
                  tflops={"float32": 19.5, "tfloat32": 156, "float16": 312, "bfloat16": 312},
                  cores=16, host_gib=256, generation="ampere", processors=108, power_w=400),
    "H800": _kind("H800", memory_gib=79, memory_gb_per_s=3350, link_gb_per_s=200, network_gbit_per_s=3200,
                  tflops={"float32": 67, "tfloat32": 494.5, "float16": 989.5, "bfloat16": 989.5,
                          "float8_e4m3fn": 1979},
                  cores=14, host_gib=256, generation="hopper", processors=132, power_w=700),
    "H20": _kind("H20", memory_gib=95, memory_gb_per_s=4000, link_gb_per_s=450, network_gbit_per_s=3200,
                 tflops={"float32": 44, "tfloat32": 74, "float16": 148, "bfloat16": 148, "float8_e4m3fn": 296},
                 cores=14, host_gib=256, generation="hopper", processors=78, power_w=400),
    # PCIe boards. A100: 1935 GB/s and 300 W (80 GB); H100: 756.5 TF BF16, 2000 GB/s, 350 W, 114 processors.
    "A100-PCIE": _kind("A100-PCIE", memory_gib=79, memory_gb_per_s=1935, link_gb_per_s=31.5, network_gbit_per_s=200,
                       tflops={"float32": 19.5, "tfloat32": 156, "float16": 312, "bfloat16": 312},
                       cores=16, host_gib=128, generation="ampere", processors=108, power_w=300),
    "H100-PCIE": _kind("H100-PCIE", memory_gib=79, memory_gb_per_s=2000, link_gb_per_s=63, network_gbit_per_s=400,
                       tflops={"float32": 51, "tfloat32": 378, "float16": 756.5, "bfloat16": 756.5,
                               "float8_e4m3fn": 1513},
                       cores=16, host_gib=128, generation="hopper", processors=114, power_w=350),
    # AMD Instinct MI250X (per board of two dies; 383 TF FP16/BF16, 128 GB at 3277 GB/s) and MI300X (1307 TF, FP8 2615,
    # 192 GB at 5300 GB/s, seven Infinity Fabric links of 64 GB/s a direction, 304 compute units).
    "MI250X": _kind("MI250X", memory_gib=127, memory_gb_per_s=3277, link_gb_per_s=200, network_gbit_per_s=800,
                    tflops={"float64": 47.9, "float32": 47.9, "float16": 383, "bfloat16": 383},
                    cores=16, host_gib=128, generation="cdna2", processors=220, per_machine=4, power_w=560),
    "MI300X": _kind("MI300X", memory_gib=191, memory_gb_per_s=5300, link_gb_per_s=448, network_gbit_per_s=3200,
                    tflops={"float32": 163.4, "tfloat32": 653.7, "float16": 1307.4, "bfloat16": 1307.4,
                            "float8_e4m3fn": 2614.9},
                    cores=24, host_gib=256, generation="cdna3", processors=304, power_w=750),
}  # fmt: skip
ALIASES = {"V100": "V100-16", "A100": "A100-80", "V100-16GB": "V100-16", "V100-32GB": "V100-32",
           "A100-40GB": "A100-40", "A100-80GB": "A100-80", "TITAN-X": "TITANX"}  # fmt: skip

# A described CPU core, until `partita profile` measured a real one: 3.0 GHz x 8 float32 lanes (AVX2) x 2 FMA units x 2
# FLOP = 96 GFLOP/s at the peak (Agner Fog, "Instruction tables": two 256-bit FMAs a cycle since Haswell and Zen 2).
# Memory: a DDR4-3200 channel gives 25.6 GB/s (JEDEC JESD79-4); servers of these generations have about one channel for
# eight cores.
CPU_FLOPS_PER_S_PER_CORE = 96e9
CPU_MEMORY_BYTES_PER_S_PER_CHANNEL = 25.6e9
CPU_CORES_PER_CHANNEL = 8
CPU_MEMORY_BYTES_PER_CORE = 4 * 2**30  # the "general purpose" ratio of cloud hosts
# Processors by name, one in each machine: cores, float32 FLOP/s of one core at base frequency (32 FLOP a cycle with two
# 256-bit FMA units or four of 128 bits, 64 with two of 512), bytes/s of all memory channels. Sources: AMD's and
# Intel's product pages, NVIDIA's Grace datasheet.
CPU_KINDS: dict[str, tuple[int, float, float]] = {
    "EPYC-7763": (64, 2.45e9 * 32, 204.8e9),  # 8 channels of DDR4-3200
    "EPYC-9654": (96, 2.4e9 * 32, 460.8e9),  # 12 channels of DDR5-4800; 512-bit operations take two cycles
    "XEON-8380": (40, 2.3e9 * 64, 204.8e9),  # 8 channels of DDR4-3200
    "XEON-8480": (56, 2.0e9 * 64, 307.2e9),  # 8480+: 8 channels of DDR5-4800
    "GRACE": (72, 3.1e9 * 32, 500e9),  # LPDDR5X
}
CPU_NETWORK = Link(bytes_per_s=10e9 / 8, latency_s=5e-5)  # 10 Gbit/s Ethernet (IEEE 802.3ae); TCP round trips of 100 us
# gloo over the loopback interface: the order of magnitude of one TCP stream, until `partita profile` measured it.
LOOPBACK = Link(bytes_per_s=2e9, latency_s=3e-5)
MAX_PROCESSES = 1_000_000


def preset(name: str) -> Cluster:
    """The cluster that `name` describes.

    Example:
        >>> preset("2x1xcpu-16").num_cores
        32

    Raises:
        ClusterError: `name` does not follow the grammar, or its kind is unknown (names the nearest kinds).
    """
    from partita.cluster.model import Cluster

    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)", name.strip())
    num_machines, num_processes, kind = (match[1] or "1", match[2], match[3]) if match else ("1", "1", name.strip())
    machine_count, process_count = int(num_machines), int(num_processes)
    if machine_count < 1 or process_count < 1 or machine_count * process_count > MAX_PROCESSES:
        raise ClusterError(
            f"a preset must have 1 to {MAX_PROCESSES:,} processes, but {name!r} has {machine_count} machines x "
            f"{process_count} processes. The grammar is {GRAMMAR}."
        )
    cpu = re.fullmatch(r"cpu-(\d+)", kind, flags=re.IGNORECASE)
    if cpu is not None:
        return _cpu_cluster(name, machine_count, process_count, int(cpu[1]))
    if kind.upper() in CPU_KINDS:
        return _cpu_cluster(name, machine_count, process_count, *CPU_KINDS[kind.upper()])
    found = find_kind(kind)
    if found is None:
        raise ClusterError(_unknown(name, kind))
    machine = Machine(
        name="",
        cores=tuple(range(found.cores_per_gpu * process_count)),
        memory_bytes=found.host_memory_bytes_per_gpu * process_count,
        numa_nodes=(tuple(range(found.cores_per_gpu * process_count)),),
        flops_per_s_per_core=CPU_FLOPS_PER_S_PER_CORE,
        memory_bytes_per_s=_memory_rate(found.cores_per_gpu * process_count),
        gpus=(found.gpu,) * process_count,
        gpu_link=found.link,
    )
    return Cluster(
        machines=_named(machine, machine_count),
        processes=_processes(machine, machine_count, process_count),
        network=found.network,
        process_link=found.link,
    )


def find_kind(name: str) -> GpuKind | None:
    """The GPU kind called `name` ("A100" and "a100-80GB" both name the 80 GB one), or None."""
    wanted = name.strip().upper()
    for key, kind in GPU_KINDS.items():
        if key.upper() == wanted:
            return kind
    alias = ALIASES.get(wanted)
    return GPU_KINDS[alias] if alias else None


def gpu_by_name(driver_name: str, memory_bytes: int) -> GpuKind | None:
    """The kind behind a driver's name such as ``"NVIDIA A100-SXM4-40GB"``; of several sizes the nearest in memory."""
    words = set(re.split(r"[^A-Z0-9]+", driver_name.upper()))
    matches = [kind for key, kind in GPU_KINDS.items() if key.split("-")[0] in words]
    return min(matches, key=lambda kind: abs(kind.gpu.memory_bytes - memory_bytes), default=None)


def _cpu_cluster(
    name: str,
    num_machines: int,
    num_processes: int,
    num_cores: int,
    flops_per_s: float = CPU_FLOPS_PER_S_PER_CORE,
    memory_bytes_per_s: float | None = None,
) -> Cluster:
    from partita.cluster.model import Cluster

    if num_cores < num_processes:
        raise ClusterError(
            f"every process must have a core, but {name!r} has {num_processes} processes on {num_cores} cores. Use "
            f"fewer processes or 'cpu-{num_processes}'."
        )
    machine = Machine(
        name="",
        cores=tuple(range(num_cores)),
        memory_bytes=num_cores * CPU_MEMORY_BYTES_PER_CORE,
        numa_nodes=(tuple(range(num_cores)),),
        flops_per_s_per_core=flops_per_s,
        memory_bytes_per_s=memory_bytes_per_s or _memory_rate(num_cores),
    )
    return Cluster(
        machines=_named(machine, num_machines),
        processes=_processes(machine, num_machines, num_processes),
        network=CPU_NETWORK,
        process_link=LOOPBACK,
    )


def _memory_rate(num_cores: int) -> float:
    return CPU_MEMORY_BYTES_PER_S_PER_CHANNEL * max(1, -(-num_cores // CPU_CORES_PER_CHANNEL))


def _named(machine: Machine, count: int) -> tuple[Machine, ...]:
    import msgspec

    return tuple(msgspec.structs.replace(machine, name=f"machine{index}") for index in range(count))


def _processes(machine: Machine, num_machines: int, per_machine: int) -> tuple[Process, ...]:
    sizes = split_evenly(len(machine.cores), per_machine)
    starts = [sum(sizes[:index]) for index in range(per_machine)]
    return tuple(
        Process(
            rank=number * per_machine + local,
            machine=number,
            cores=machine.cores[starts[local] : starts[local] + sizes[local]],
            gpus=(local,) if machine.gpus else (),
            memory_bytes=machine.memory_bytes // per_machine,
        )
        for number in range(num_machines)
        for local in range(per_machine)
    )


def _unknown(name: str, kind: str) -> str:
    known = [*GPU_KINDS, *ALIASES, *CPU_KINDS, "cpu-16"]
    upper = {key.upper(): key for key in known}
    near = difflib.get_close_matches(kind.upper(), list(upper), n=3, cutoff=0.4)
    nearest = ", ".join(repr(upper[key]) for key in near) or "none is close"
    return (
        f"unknown preset {name!r}: there is no kind {kind!r}. Nearest: {nearest}. Known kinds: {', '.join(GPU_KINDS)}, "
        f"{', '.join(CPU_KINDS)}, cpu-N. The grammar is {GRAMMAR}."
    )

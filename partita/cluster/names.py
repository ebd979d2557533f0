"""From how people write a GPU ("A100-80GB (Selene)", "h100_80gb", "V100-16GB (p3.16xlarge, 25Gbps)") to its kind.

The text names the GPU, and may say how much memory it has, the machine it sits in, its network and its power limit;
what it does not say is the kind's published figure. Machines that are known by name:

| name in the text | per machine | source |
|---|---|---|
| DGX-2 | 16 V100, 8 x 100 Gbit/s | NVIDIA DGX-2 datasheet |
| p3.16xlarge, p3dn.24xlarge | 8 V100, 25 and 100 Gbit/s | AWS instance types |
| p4d.24xlarge, p4de.24xlarge | 8 A100, 400 Gbit/s | AWS instance types |
| p5.48xlarge | 8 H100, 3200 Gbit/s | AWS instance types |
| g4dn.12xlarge, g4dn.metal, g5.48xlarge | 4 T4 at 50, 8 T4 at 100, 8 A10G at 100 Gbit/s | AWS instance types |
| NDv2, NDv4 | 8 V100 at 100, 8 A100 at 1600 Gbit/s | Azure sizes |
| DGX-1, DGX-A100, Selene, DGX-H100, DGX-B200, ... | the kind's own figures | NVIDIA datasheets |

Gbit/s "per GPU" in the text are those of one GPU; otherwise those of the machine.
"""

from __future__ import annotations

import re
from dataclasses import replace

import msgspec

from partita.cluster.model import Link
from partita.cluster.presets import GPU_KINDS, GpuKind
from partita.errors import ClusterError

# (words of the text, GPUs per machine, Gbit/s per machine)
MACHINES: tuple[tuple[str, int, float], ...] = (
    ("DGX-2", 16, 800),
    ("p3.16xlarge", 8, 25),
    ("p3dn.24xlarge", 8, 100),
    ("p4d.24xlarge", 8, 400),
    ("p4de.24xlarge", 8, 400),
    ("p5.48xlarge", 8, 3200),
    ("g4dn.12xlarge", 4, 50),
    ("g4dn.metal", 8, 100),
    ("g5.48xlarge", 8, 100),
    ("NDv2", 8, 100),
    ("NDv4", 8, 1600),
)
# Clocks follow the power limit: dynamic power goes with f V^2 and V about with f, so the rate goes with its cube root.
POWER_EXPONENT = 1 / 3
HBM2E_H100_BYTES_PER_S = 2.4e12  # torchtitan's H100 with 96 GB of HBM2e names 2.4 TB/s
ETHERNET_LATENCY_S = 5e-5
INFINIBAND_LATENCY_S = 1.5e-5


def gpu_from_text(text: str) -> GpuKind:
    """The GPU and machine that `text` names; memory, links and rates are the text's own where it gives them.

    Example:
        >>> gpu_from_text("V100-16GB (p3.16xlarge, 25Gbps)").network.bytes_per_s
        3125000000.0

    Raises:
        ClusterError: no known GPU is named.
    """
    kind = _base_kind(text)
    words, _, _ = text.partition("(")
    per_machine = kind.gpus_per_machine
    machine = next((entry for entry in MACHINES if entry[0].lower() in text.lower()), None)
    if machine is not None:
        per_machine = machine[1]
        kind = replace(kind, network=_network(machine[2], per_machine), gpus_per_network=per_machine)
    rate = re.search(r"(\d+(?:\.\d+)?)\s*(?:Gbps|Gb/s|Gbit/s)(\s*(?:/\s*GPU|RDMA per GPU|per GPU|/GPU))?", text)
    if rate is not None:
        # "400Gb/s" beside eight-GPU boards of this class is one adapter a GPU; slower ones serve the machine.
        per_gpu = bool(rate[2]) or (float(rate[1]) >= 400 and kind.link.bytes_per_s > 1e11)
        sharing = kind.gpus_per_network
        kind = replace(kind, network=_network(float(rate[1]) * (sharing if per_gpu else 1), sharing))
    kind = _with_memory(kind, words, text)
    power = re.search(r"(\d{2,4})\s*W\b", text)
    if power is not None and kind.power_w and float(power[1]) < kind.power_w:
        kind = _scaled(kind, (float(power[1]) / kind.power_w) ** POWER_EXPONENT)
    return replace(kind, gpus_per_machine=per_machine)


def _base_kind(text: str) -> GpuKind:
    plain = re.sub(r"[^A-Z0-9]", "", text.upper().partition("(")[0])
    plain = re.sub(r"^(NVIDIA|AMD|TESLA|GEFORCE|QUADRO|INSTINCT|HGX|DGX)+", "", plain)
    matches = [key for key in GPU_KINDS if re.sub(r"[^A-Z0-9]", "", key.split("-")[0].upper()) in plain]
    if not matches:
        known = ", ".join(sorted({key.split("-")[0] for key in GPU_KINDS}))
        raise ClusterError(f"the GPU must be one of {known}, but the text is {text!r}.")
    # The longest name wins (GB200 before B200, A10G before A10); of several boards of one name the memory decides.
    longest = max(len(key.split("-")[0]) for key in matches)
    candidates = [key for key in dict.fromkeys(matches) if len(key.split("-")[0]) == longest]
    pcie = [key for key in candidates if key.endswith("PCIE")]
    if len(candidates) > 1:
        candidates = pcie if "PCIE" in text.upper() and pcie else [key for key in candidates if key not in pcie]
    size = re.search(r"(\d+)\s*G(?:I?B)\b", text, flags=re.IGNORECASE)
    if size is None:
        fallback = f"{candidates[0].split('-')[0]}-80"
        return GPU_KINDS[fallback if fallback in candidates else candidates[0]]
    return GPU_KINDS[min(candidates, key=lambda key: abs(GPU_KINDS[key].gpu.memory_bytes / 2**30 - int(size[1])))]


def _with_memory(kind: GpuKind, words: str, text: str) -> GpuKind:
    size = re.search(r"(\d+)\s*G(?:I?B)\b", words, flags=re.IGNORECASE)
    gpu = kind.gpu
    if size is not None and abs(int(size[1]) - gpu.memory_bytes / 2**30) > 8:
        gpu = msgspec.structs.replace(gpu, memory_bytes=(int(size[1]) - 1) * 2**30)
    if "HBM2e" in text and gpu.name == "H100":
        gpu = msgspec.structs.replace(gpu, memory_bytes_per_s=HBM2E_H100_BYTES_PER_S)
    return replace(kind, gpu=gpu)


def _scaled(kind: GpuKind, share: float) -> GpuKind:
    rates = {dtype: rate * share for dtype, rate in kind.gpu.flops_per_s.items()}
    return replace(kind, gpu=msgspec.structs.replace(kind.gpu, flops_per_s=rates))


def _network(gbit_per_s: float, gpus_per_machine: int) -> Link:
    fast = gbit_per_s >= 200 or gbit_per_s / gpus_per_machine >= 25
    return Link(bytes_per_s=gbit_per_s * 1e9 / 8, latency_s=INFINIBAND_LATENCY_S if fast else ETHERNET_LATENCY_S)

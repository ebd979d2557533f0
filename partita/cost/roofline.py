"""Roofline estimates for ops that were not measured, or for devices that are not here.

    time = launch + max(flops / (efficiency * peak), bytes / bandwidth)

`peak` and `bandwidth` are those of the device (cores of a machine, or a GPU); bandwidth is shared by the workers that
are active on the machine. Source: Williams, Waterman and Patterson, "Roofline" (2009); the launch term is the fixed
price of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.cluster.model import Machine
from partita.cost.model import Place

# Used where a description is silent. A core of a server CPU with 256-bit FMA at 2.5 GHz does 2*8*2*2.5e9 = 8e10
# float32 FLOP/s;
# one socket with eight channels of DDR4 moves about 1.2e11 bytes a second, one core alone about 1e10.
DEFAULT_FLOPS_PER_S_PER_CORE = 8e10
DEFAULT_MEMORY_BYTES_PER_S = 1.2e11
DEFAULT_CORE_BYTES_PER_S = 1e10
DEFAULT_GPU_FLOPS_PER_S = 2e13
DEFAULT_GPU_BYTES_PER_S = 1e12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device does. `machine_bytes_per_s` is shared by all workers of the machine (infinity on a GPU of its
    own)."""

    flops_per_s: float
    bytes_per_s: float
    machine_bytes_per_s: float
    launch_s: float
    efficiency: float = 0.6


def rates_of(machine: Machine, place: Place, *, launch_s: float) -> Rates:
    """Rates of the place's cores or GPU from the machine's description."""
    if place.gpu is not None and place.gpu < len(machine.gpus):
        gpu = machine.gpus[place.gpu]
        peak = gpu.flops_per_s.get("float32") or max(gpu.flops_per_s.values(), default=0.0)
        bandwidth = gpu.memory_bytes_per_s or DEFAULT_GPU_BYTES_PER_S
        return Rates(
            flops_per_s=peak or DEFAULT_GPU_FLOPS_PER_S,
            bytes_per_s=bandwidth,
            machine_bytes_per_s=float("inf"),
            launch_s=launch_s,
        )
    num_cores = max(len(place.cores), 1)
    whole = machine.memory_bytes_per_s or DEFAULT_MEMORY_BYTES_PER_S
    return Rates(
        flops_per_s=(machine.flops_per_s_per_core or DEFAULT_FLOPS_PER_S_PER_CORE) * num_cores,
        bytes_per_s=min(whole, DEFAULT_CORE_BYTES_PER_S * num_cores),
        machine_bytes_per_s=whole,
        launch_s=launch_s,
    )


def roofline_s(rates: Rates, flops: float, num_bytes: float, *, num_active: float = 1) -> float:
    """Seconds of an op that does `flops` and moves `num_bytes`, while `num_active` workers share the memory."""
    bandwidth = min(rates.bytes_per_s, rates.machine_bytes_per_s / max(num_active, 1))
    return rates.launch_s + max(flops / (rates.flops_per_s * rates.efficiency), num_bytes / bandwidth)

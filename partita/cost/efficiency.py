"""Time of one kernel on a GPU that is described, not here.

With peak P (flop/s of the dtype), bandwidth W, S processors, and the constants of the GPU's generation:

    memory kernel        t = t0 + bytes / (memory W)
    fused attention      t = max(flops / (attention P), bytes / (memory W)) + t0
    matmul [b] m x k x n t = max(flops / (matmul P q(k) u), bytes / (memory W)) + t0

`t0` is the least time of a kernel. `q(k) = k / (k + depth)`: each tile first fills its pipeline. `u` is the use of the
processors: a product is cut into tiles of a x c, ``waves = b ceil(m/a) ceil(n/c) / S`` of them run one after the other,
and the last wave and the ragged edges are partly empty:

    u = max over tiles of  e(tile) * (b m n / (a c S)) / ceil(waves)

where small tiles load more bytes for each flop (e < 1); a library picks the best tile. Sources: tile and wave
quantisation: NVIDIA, "Matrix Multiplication Background User's Guide", sections 2 and 3; roofline: Williams, Waterman
and Patterson, 2009.

The host starts the kernels one by one (`launch_s` each): a pass takes the longer of the host's and the device's time,
softly (`both`): queues run dry here and there before the sums are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from partita.cluster.presets import GpuKind
from partita.cost.calibration import Constants
from partita.cost.kernels import Kernel
from partita.errors import ClusterError

# (a, c, share of the large tile's rate). Shares: bytes loaded for each flop against the 256 x 128 tile's.
TILES: tuple[tuple[int, int, float], ...] = ((256, 128, 1.0), (128, 128, 0.96), (128, 64, 0.85), (64, 64, 0.7))
LOW_PRECISION = ("float8_e4m3fn", "float4_e2m1fn")
SOFTNESS = 6.0  # exponent of `both`


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A GPU with its generation's constants.

    Example:
        >>> from partita.cluster.presets import GPU_KINDS
        >>> speed = Speed.of(GPU_KINDS["A100-80"], Constants())
        >>> speed.kernel_s(Kernel(kind="memory", num_bytes=1.5e9)) < 1.5e-3
        True
    """

    name: str
    peaks: dict[str, float]
    bytes_per_s: float
    num_processors: int
    constants: Constants

    @staticmethod
    def of(kind: GpuKind, constants: Constants) -> Speed:
        return Speed(
            name=kind.gpu.name,
            peaks=kind.gpu.flops_per_s,
            bytes_per_s=kind.gpu.memory_bytes_per_s,
            num_processors=kind.num_processors,
            constants=constants,
        )

    def peak(self, dtype: str) -> float:
        """Peak arithmetic of `dtype`, flop/s.

        Raises:
            ClusterError: the GPU does not compute in `dtype`.
        """
        found = self.peaks.get(dtype)
        if found is None:
            raise ClusterError(f"a {self.name} must compute in one of {', '.join(self.peaks)}, but got {dtype}.")
        return found

    def kernel_s(self, kernel: Kernel) -> float:
        """Device seconds of all `count` runs of the kernel."""
        constants = self.constants
        memory_s = kernel.num_bytes / (constants.memory * self.bytes_per_s)
        floor_s = kernel.num_launches * constants.kernel_s
        if kernel.kind == "memory":
            return kernel.count * (floor_s + memory_s)
        peak = self.peak(kernel.dtype)
        if kernel.kind == "attention":
            compute_s = kernel.flops / (constants.attention * peak)
        else:
            share = constants.matmul_low if kernel.dtype in LOW_PRECISION else constants.matmul
            depth_share = kernel.k / (kernel.k + constants.depth)
            compute_s = kernel.flops / (share * peak * depth_share * self.use(kernel.batch, kernel.m, kernel.n))
        return kernel.count * (floor_s + max(compute_s, memory_s))

    def use(self, batch: int, m: int, n: int) -> float:
        """Share of the processors that a product of `batch` results of m x n keeps busy, 0 to 1."""
        best = 0.0
        for rows, columns, share in TILES:
            waves = math.ceil(batch * math.ceil(m / rows) * math.ceil(n / columns) / self.num_processors)
            best = max(best, share * batch * m * n / (rows * columns * self.num_processors * waves))
        return best


def both(first_s: float, second_s: float) -> float:
    """A soft maximum of two times that run beside each other.

    >>> both(2.0, 0.0)
    2.0
    """
    larger, smaller = max(first_s, second_s), min(first_s, second_s)
    if larger == 0:
        return 0.0
    return float(larger * (1 + (smaller / larger) ** SOFTNESS) ** (1 / SOFTNESS))

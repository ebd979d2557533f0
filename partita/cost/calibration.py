"""The few constants that turn vendors' figures into times: one set for each generation of GPUs.

They are fitted once to published runs (`fit`, least squares of the logarithm of predicted/measured step time, each
constant held near its prior), never to one row or source, and shipped here. `partita profile --from-runs FILE` fits
them again to one's own runs. Kinds whose generation nobody has published enough runs of take the constants of the
nearest generation (`NEAREST`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a generation reaches of its peaks, and what it takes for itself.

    Attributes:
        matmul: share of the peak arithmetic that a large matrix product reaches.
        matmul_low: the same for eight-bit and four-bit products (their scaling and casts are kernels of their own).
        depth: the depth k at which a product reaches half of that (filling and draining a tile).
        memory: share of the memory bandwidth that element-wise kernels reach.
        attention: share of the peak arithmetic that fused ("flash") attention reaches.
        launch_s: host seconds to start one kernel from Python without a compiler.
        kernel_s: device seconds that a kernel takes at least.
        exchange_s: device seconds that a collective takes beside its transfer (streams wait for each other).
        link, network: share of the published bandwidth that collectives reach in a machine and between machines.
        latency: factor on the latencies of links.
        overlap: share of an overlapped exchange that does hide behind compute, while there is compute to hide it.
    """

    matmul: float = 0.80
    matmul_low: float = 0.65
    depth: float = 150.0
    memory: float = 0.75
    attention: float = 0.45
    launch_s: float = 12e-6
    kernel_s: float = 3e-6
    exchange_s: float = 15e-6
    link: float = 0.75
    network: float = 0.75
    latency: float = 1.0
    overlap: float = 0.8


GENERATIONS: Mapping[str, Constants] = {
    "volta": Constants(),
    "ampere": Constants(),
    "hopper": Constants(),
    "blackwell": Constants(),
}
NEAREST: Mapping[str, str] = {
    "pascal": "volta",
    "turing": "volta",
    "ada": "ampere",
    "cdna2": "ampere",
    "cdna3": "hopper",
    "unknown": "ampere",
}
CONSTANT_NAMES = tuple(field.name for field in fields(Constants))
# Relative uncertainty of each constant before anything was measured (what vendors' and others' benchmarks leave open).
PRIOR_SPREADS: Mapping[str, float] = {
    "matmul": 0.1,
    "matmul_low": 0.2,
    "depth": 0.5,
    "memory": 0.15,
    "attention": 0.3,
    "launch_s": 0.7,
    "kernel_s": 0.4,
    "exchange_s": 0.7,
    "link": 0.15,
    "network": 0.2,
    "latency": 0.6,
    "overlap": 0.2,
}
LIMITS: Mapping[str, tuple[float, float]] = {
    **{name: (0.05, 0.95) for name in ("matmul", "matmul_low", "memory", "attention", "link", "network")},
    "overlap": (0.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The constants of all generations.

    Example:
        >>> Calibration().of("turing") == Calibration().of("volta")
        True
    """

    generations: Mapping[str, Constants] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.generations is None:
            object.__setattr__(self, "generations", GENERATIONS)

    def of(self, generation: str) -> Constants:
        """The constants of `generation`, or of the one nearest to it."""
        return self.generations[self.name_of(generation)]

    def name_of(self, generation: str) -> str:
        """The generation whose constants `generation` takes."""
        return generation if generation in self.generations else NEAREST.get(generation, NEAREST["unknown"])

    def with_constants(self, generation: str, **values: float) -> Calibration:
        """The same with some constants of one generation replaced."""
        changed = replace(self.of(generation), **values)
        return Calibration(generations={**self.generations, generation: changed})

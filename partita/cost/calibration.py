"""The few constants that turn vendors' figures into times: one set for each generation of GPUs.

They are fitted once to published runs (`fit`, least squares of the logarithm of predicted/measured step time, each
constant held near its prior), never to one row or source, and shipped here. `partita profile --from-runs FILE` fits
them again to one's own runs. Kinds whose generation nobody has published enough runs of take the constants of the
nearest generation (`NEAREST`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from partita.cache import cache_dir
from partita.errors import InputError

CACHE_NAME = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a generation reaches of its peaks, and what it takes for itself.

    Attributes:
        matmul: share of the peak arithmetic that a large matrix product reaches.
        matmul_low: the same for eight-bit and four-bit products (their scaling and casts are kernels of their own).
        depth: the depth k at which a product reaches half of that (filling and draining a tile).
        memory: share of the memory bandwidth that element-wise kernels reach.
        attention: share of the peak arithmetic that fused ("flash") attention reaches.
        launch_s: host seconds to start one kernel from Python without a compiler (the processors that hosts of the
            generation have).
        kernel_s: device seconds that a kernel takes at least.
        exchange_s: device seconds that a collective takes beside its transfer: streams wait for each other, and small
            tensors do not reach the full rate (nccl-tests on a DGX A100, 2 to 8 GPUs: 45 to 95 us for 1 MiB).
        skew_s: what each further rank adds to that: it starts when the last rank has reached it.
        link, network: share of the published bandwidth that collectives reach in a machine and between machines.
        latency: factor on the latencies of links.
        overlap: share of an overlapped exchange that does hide behind compute, while there is compute to hide it.
    """

    matmul: float = 0.78
    matmul_low: float = 0.70
    depth: float = 150.0
    memory: float = 0.75
    attention: float = 0.50
    launch_s: float = 30e-6
    kernel_s: float = 3e-6
    exchange_s: float = 60e-6
    skew_s: float = 10e-6
    link: float = 0.75
    network: float = 0.75
    latency: float = 1.0
    overlap: float = 0.8


# fmt: off
GENERATIONS: Mapping[str, Constants] = {
    # T4: the board's 70 W hold long products well below the peak (Jia et al., "Dissecting the NVidia Turing T4 GPU via
    # Microbenchmarking", 2019: 41 of 65 TF in the best case). Not fitted: no published run.
    "turing": Constants(matmul=0.55, launch_s=4e-5),
    # Set by hand to Megatron-LM's published V100 rates (72 TF on one GPU, recomputation counted): no complete row.
    "volta": Constants(matmul=0.85, memory=0.8, launch_s=4e-5),
    "ampere": Constants(
        matmul=0.813, matmul_low=0.7, depth=141, memory=0.804, attention=0.578,
        launch_s=4.62e-05, kernel_s=2.95e-06, exchange_s=7.96e-05, skew_s=6.91e-06, link=0.77, network=0.747,
        latency=1.03, overlap=0.676,
    ),
    "hopper": Constants(
        matmul=0.715, matmul_low=0.95, depth=169, memory=0.639, attention=0.33,
        launch_s=2e-05, kernel_s=3.14e-06, exchange_s=1.14e-05, skew_s=3.06e-06, link=0.921, network=0.896,
        latency=1.11, overlap=0.569,
    ),
    "blackwell": Constants(
        matmul=0.779, matmul_low=0.814, depth=150, memory=0.699, attention=0.236,
        launch_s=2.41e-05, kernel_s=3.06e-06, exchange_s=5.29e-05, skew_s=4.2e-06, link=0.82, network=0.943,
        latency=0.884, overlap=0.667,
    ),
    "blackwell_ultra": Constants(
        matmul=0.783, matmul_low=0.941, depth=145, memory=0.732, attention=0.345,
        launch_s=2.73e-05, kernel_s=2.95e-06, exchange_s=4.56e-05, skew_s=1.04e-05, link=0.831, network=0.753,
        latency=1.03, overlap=0.781,
    ),
}
# fmt: on
NEAREST: Mapping[str, str] = {
    "pascal": "volta",
    "ada": "ampere",
    "cdna2": "ampere",
    "cdna3": "hopper",
    "unknown": "ampere",
}
CONSTANT_NAMES = tuple(one.name for one in fields(Constants))
# Relative uncertainty of each constant before anything was measured (what vendors' and others' benchmarks leave open).
PRIOR_SPREADS: Mapping[str, float] = {
    "matmul": 0.1,
    "matmul_low": 0.2,
    "depth": 0.5,
    "memory": 0.15,
    "attention": 0.3,
    "launch_s": 0.4,
    "kernel_s": 0.4,
    "exchange_s": 1.5,
    "skew_s": 1.5,
    "link": 0.15,
    "network": 0.2,
    "latency": 0.6,
    "overlap": 0.2,
}
# Constants that were measured by themselves: values and relative uncertainty. A100: all-reduces of 1 MiB take 44,
# 51 and 93 us among 2, 4 and 8 GPUs of a machine (nccl-tests, tables published with vTrain, Bang et al., MICRO 2024:
# trace/a100), less 5 to 9 us of transfer; in a step two events order the two streams, and the kernel
# behind each of them starts about 20 us later.
KNOWN: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "ampere": {"exchange_s": (85e-6, 0.3), "skew_s": (7e-6, 0.3)},
}
LIMITS: Mapping[str, tuple[float, float]] = {
    **{name: (0.05, 0.95) for name in ("matmul", "matmul_low", "memory", "attention", "link", "network")},
    "overlap": (0.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The constants of all generations.

    Example:
        >>> Calibration().of("pascal") == Calibration().of("volta")
        True
    """

    generations: Mapping[str, Constants] = field(default_factory=lambda: GENERATIONS)

    @staticmethod
    def prior() -> Calibration:
        """What was believed before any run was looked at: where cross-validation starts."""
        kept = {name: GENERATIONS[name] for name in ("turing", "volta")}
        known = {
            name: replace(Constants(), **{constant: value for constant, (value, _) in values.items()})
            for name, values in KNOWN.items()
        }
        return Calibration(generations={**{name: Constants() for name in GENERATIONS}, **known, **kept})

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

    def save(self, path: Path | None = None) -> Path:
        """Write the constants as JSON (generation to constant to value) to `path`, or to the cache; tells where."""
        path = path or cache_dir() / CACHE_NAME
        values = {name: asdict(constants) for name, constants in self.generations.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n")
        return path

    @staticmethod
    def cached() -> Calibration:
        """The constants that `partita profile --from-runs` left in the cache, or the shipped ones."""
        path = cache_dir() / CACHE_NAME
        return Calibration.load(path) if path.exists() else Calibration()

    @staticmethod
    def load(path: Path) -> Calibration:
        """The constants of a file that `save` wrote, over the shipped ones.

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        try:
            values = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} must be a readable JSON file, but: {error}.") from error
        found = Calibration()
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold generations of GPUs with their constants, but holds {values!r:.80}.")
        for generation, constants in values.items():
            known = isinstance(constants, dict) and set(constants) <= set(CONSTANT_NAMES)
            if not known or not all(isinstance(v, (int, float)) and v > 0 for v in constants.values()):
                raise InputError(
                    f"{path}: {generation!r} must hold positive numbers called {', '.join(CONSTANT_NAMES)}, but holds "
                    f"{constants!r:.200}."
                )
            found = found.with_constants(generation, **{name: float(value) for name, value in constants.items()})
        return found

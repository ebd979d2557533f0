"""(signature first; the mathematics follows) Predicted time and memory of one training step at scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from partita.cost.kernels import LayerWork
from partita.cost.networks import Fabric

Remat = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
Chunk = Sequence[tuple[LayerWork, int]]  # layers and how many of each, in model order


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways each axis splits. Ranks are ordered tensor (fastest), context, data, pipeline (slowest)."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # chunks of layers that each pipeline stage holds
    context: int = 1
    expert: int = 1  # a part of data x context

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    step_time_s: float
    memory_bytes: tuple[float, ...]  # peak of one device of each pipeline stage
    parts: dict[str, float]  # seconds: "compute", "exchange", "bubble", "data_exchange", "optimizer"

    @property
    def peak_memory_bytes(self) -> float:
        return max(self.memory_bytes)


def predict_step(
    chunks: Sequence[Chunk],  # pipeline * virtual of them, in model order; chunk c lives on stage c % pipeline
    degrees: Degrees,
    fabric: Fabric,
    *,
    num_microbatches: int,
    schedule: Schedule = "1f1b",
    remat: Remat = "none",
    zero: int = 0,  # 0-3: what is sharded over the data axis (1 optimizer state, 2 + gradients, 3 + parameters)
) -> StepPrediction:
    """Predicted step time (s) and peak memory (bytes) of each stage."""
    raise NotImplementedError

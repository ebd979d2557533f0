"""The shared form of work for cost models at scale: what one device computes and exchanges for one microbatch.

A described transformer and a captured graph both become `LayerWork`s; `partita.planner.scale.step` prices them. All
shapes are local, that is after sharding over the tensor, context and expert axes; the data and pipeline axes are the
business of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from partita.cost.model import CollectiveKind

KernelKind = Literal["matmul", "attention", "memory"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One op on one device.

    `flops` counts a multiply and an add as two; `num_bytes` are read and written in device memory. A matmul is
    ``[batch] m x k @ k x n``. `count` is how often the op runs, `num_launches` how many device kernels one run starts.

    Example:
        >>> Kernel(kind="matmul", flops=2 * 8 * 8 * 8, num_bytes=384, m=8, n=8, k=8).count
        1
    """

    kind: KernelKind
    flops: float = 0.0
    num_bytes: float = 0.0
    batch: int = 1
    m: int = 0
    n: int = 0
    k: int = 0
    dtype: str = "bfloat16"
    count: int = 1
    num_launches: int = 1


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One collective along one mesh axis.

    `num_bytes` are those of the whole tensor, all ranks together (the gathered or reduced size). `axis` is "tensor",
    "context", "expert" or "data". An `overlapped` exchange may hide behind the layer's compute.
    """

    kind: CollectiveKind
    num_bytes: float
    axis: str
    count: int = 1
    overlapped: bool = False


Item = Kernel | Exchange


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One repeated block (or the embedding, or the head) for one microbatch on one device.

    Attributes:
        parameter_elements: on this device, before ZeRO or FSDP over the data axis.
        expert_elements: those of them that are sharded over the expert axis (their data axis is smaller).
        saved_bytes: activations kept per microbatch without recomputation.
        selective_bytes: ... with selective recomputation (the attention core runs again).
        boundary_bytes: the block's input: kept with full recomputation, and sent between stages.
        selective: what selective recomputation runs again in the backward pass.
        temporary_bytes: what exists only while the layer runs (logits, attention scores, ...).
    """

    name: str
    forward: tuple[Item, ...]
    backward: tuple[Item, ...]
    parameter_elements: float
    expert_elements: float = 0.0
    saved_bytes: float
    selective_bytes: float
    boundary_bytes: float
    selective: tuple[Item, ...] = ()
    temporary_bytes: float = 0.0

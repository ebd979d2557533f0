"""Hooks of torch's own for DistributedDataParallel, which change how it adds gradients."""

from __future__ import annotations

from typing import Any


def register_hook(wrapped: Any, name: str, rank: int) -> None:
    """Registers "bf16", "fp16" or "powersgd" of the given rank; "" leaves DDP as it is.

    PowerSGD's hook starts collectives of several buckets from callbacks, in an order that may differ between processes,
    which gloo does not survive: give DDP one bucket. Gloo refuses the hook for bf16.
    """
    if name in ("bf16", "fp16"):
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        wrapped.register_comm_hook(None, getattr(default_hooks, f"{name}_compress_hook"))
    elif name == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

        state = power.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, power.powerSGD_hook)

"""How long the updates of whole parameters take, measured: who owns them is decided by it.

An update's time is not told by the number of elements: Newton-Schulz of an (m, n) matrix takes m n min(m, n)
multiplications, an inverse root m^3, and another group of the same optimizer may be element-wise. So the user's own
optimizer updates a parameter of each distinct shape and group, on made-up values and one thread, as a worker does. Of
shapes of more than `LARGEST` elements two smaller ones of the same proportions are measured, and t = a s^p in the scale
s goes on from them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from partita.cluster import Cluster
from partita.program.ownership import UpdateCosts
from partita.training.job import Team
from partita.training.masters import HALF
from partita.training.torch_adapter import clone_optimizer, options_of

LARGEST = 2**16  # elements of what is measured as it is
NUM_TIMED, BUDGET_S = 3, 0.2  # updates of a shape, after one that makes the state; no further one after so long
_TIMES_S: dict[tuple[object, ...], float | None] = {}


def agreed_costs(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    cluster: Cluster,
    team: Team,
    *,
    masters: bool,
) -> UpdateCosts:
    """The costs that all processes of a job go by, as rank 0 measures them: programs must be equal."""
    told = list(update_times_s(optimizer, parameters, masters=masters).items()) if team.rank == 0 else []
    times = tuple((str(name), float(time_s)) for name, time_s in team.from_first(told, "the costs of updates"))
    if len(cluster.processes) < 2:
        return UpdateCosts(time_s=times)
    across = len({process.machine for process in cluster.processes}) > 1
    link = cluster.network if across else cluster.process_link
    return UpdateCosts(time_s=times, message_s=link.latency_s, bytes_per_s=link.bytes_per_s)


def update_times_s(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], *, masters: bool = False
) -> dict[str, float]:
    """Seconds of the update of each parameter (or its master), on one thread; measured once per class, options of the
    group, shape and type. None at all if the optimizer cannot update made-up values. The random state stays as it was.

    Example:
        >>> update_times_s(torch.optim.Muon([weight], lr=0.02), {"weight": weight})
        {'weight': 0.00021}
    """
    name_of = {id(value): name for name, value in parameters.items()}
    found = dict.fromkeys(parameters, 0.0)  # what the optimizer does not hold, is not updated
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            for group in optimizer.param_groups:
                for item in group["params"]:
                    dtype = torch.float32 if masters and item.dtype in HALF else item.dtype
                    time_s = _known_time_s(optimizer, group, tuple(item.shape), dtype)
                    if time_s is None:
                        return {}
                    found[name_of[id(item)]] = time_s
    finally:
        torch.set_num_threads(num_threads)
    return found


def _known_time_s(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> float | None:
    options = options_of(group)
    told = sorted((name, repr(value)) for name, value in options.items() if name not in ("lr", "initial_lr"))
    key = (type(optimizer), *told, shape, dtype)
    if key not in _TIMES_S:
        _TIMES_S[key] = _time_s(optimizer, options, shape, dtype)
    return _TIMES_S[key]


def _time_s(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
) -> float | None:
    scale = 1
    while math.prod(_scaled(shape, scale)) > LARGEST:
        scale *= 2
    try:
        first_s = _measured_s(optimizer, options, _scaled(shape, scale), dtype)
        if scale == 1:
            return first_s
        second_s = _measured_s(optimizer, options, _scaled(shape, 2 * scale), dtype)
    except Exception:  # whatever a user's class raises on other tensors than its own
        return None
    power = max(math.log2(first_s / second_s), 0.0)
    return float(first_s * scale**power)


def _scaled(shape: Sequence[int], scale: int) -> tuple[int, ...]:
    return tuple(-(-extent // scale) for extent in shape)


def _measured_s(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
) -> float:
    parameter = nn.Parameter(torch.randn(*shape).to(dtype))
    parameter.grad = torch.randn(*shape).to(dtype)
    clone = clone_optimizer(optimizer, [{**options, "params": [parameter]}])
    clone.step()
    times_s: list[float] = []
    while len(times_s) < NUM_TIMED and sum(times_s) < BUDGET_S:
        start_s = time.perf_counter()
        clone.step()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)

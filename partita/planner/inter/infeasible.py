"""Why no pipeline fits, and the smallest change that would help.

need(stage) = max over its devices of (static + saved x microbatches in flight) / memory limit. The least, over all
pipelines of one chunk a group, of the largest need is a shortest path over (j, p, down-set) in (max, min), as in
`pipeline` but with one number: by that factor all limits together would have to grow.
"""

from __future__ import annotations

import numpy as np

from partita.errors import InfeasibleError
from partita.planner.inter.labels import Array
from partita.planner.inter.pipeline import Setting
from partita.planner.inter.tables import Tables
from partita.units import format_bytes

_LARGE = 2e9


def explain_infeasible(tables: Tables) -> InfeasibleError:
    problem = tables.problem
    if not np.isfinite([device.memory_bytes for device in problem.devices]).any():
        return InfeasibleError(
            f"Stages must have options on the candidate sub-meshes (stage_sizes {problem.stage_sizes}), but no "
            "pipeline of the orders and sizes has one for every stage. Offer more sizes or options."
        )
    found, exact = least_memory_factor(tables)
    if found is None:
        return InfeasibleError(
            f"No pipeline has an option for every stage with stage_sizes {problem.stage_sizes} on the "
            f"{len(problem.orders)} given order(s), whatever the memory. Offer more sizes or options."
        )
    factor, device, setting = found
    limit = problem.devices[device].memory_bytes
    many = f"{setting.num_microbatches} microbatches, {setting.schedule}"
    least = "The smallest change" if exact else "A change that would help"
    return InfeasibleError(
        f"No pipeline fits the memory of the devices: even the thriftiest ({many}, at most {setting.num_devices} "
        f"devices) needs {format_bytes(factor * limit)} on {problem.devices[device].name}, which has "
        f"{format_bytes(limit)}. "
        f"{least}: {factor:.3g} times the memory on every device ({format_bytes((factor - 1) * limit)} more there), "
        "or more devices, options with recomputation, or a smaller batch."
    )


def least_memory_factor(tables: Tables) -> tuple[tuple[float, int, Setting] | None, bool]:
    """(factor of all limits with which a pipeline fits, the device that needs it, its setting), and whether no smaller
    one would do (known where no schedule has several chunks a group)."""
    problem = tables.problem
    best: tuple[float, int, Setting] | None = None
    exact = True
    schedules = [s for s in problem.schedules if s != "interleaved"] or ["1f1b"]
    exact = "interleaved" not in problem.schedules
    for m in problem.microbatch_counts:
        for schedule in schedules:
            for order in problem.orders:
                stages = min(len(order) // min(problem.stage_sizes), problem.num_ops)
                if float(stages * len(order) * len(problem.stage_sizes)) * len(tables.family) ** 2 > _LARGE:
                    stages, exact = min(stages, 4), False
                wanted = range(1, stages + 1) if schedule == "zero_bubble" else (None,)
                for num_stages in wanted:
                    setting = Setting(order=order, schedule=schedule, num_microbatches=m, num_stages=num_stages)
                    found = _least_need(tables, setting, num_stages or stages)
                    if found is not None and (best is None or found[0] < best[0]):
                        best = (*found, setting)
    return best, exact


def _least_need(tables: Tables, setting: Setting, stages: int) -> tuple[float, int] | None:
    """(largest need, device) of the thriftiest pipeline on a beginning of the order."""
    family, count = tables.family, setting.num_devices
    end = np.full(len(family), np.inf)
    end[-1] = 0.0
    ends = (count,) if tables.problem.uses_all else range(1, count + 1)
    behind = {place: (end, np.full(len(family), -1)) for place in ends}
    best: tuple[float, int] | None = None
    for from_end in range(1, stages + 1):
        cells: dict[int, tuple[Array, np.ndarray]] = {}
        for place in range(count):
            value, device = np.full(len(family), np.inf), np.full(len(family), -1)
            for d in tables.sizes(count - place):
                if place + d not in behind:
                    continue
                needs, whose = _needs(tables, setting, setting.order[place : place + d], from_end)
                after, after_device = behind[place + d]
                both = np.maximum(needs, after[None, :])
                high = both.argmin(axis=1)
                rows = np.arange(len(family))
                better = both[rows, high] < value
                value = np.where(better, both[rows, high], value)
                own = needs[rows, high] >= after[high]
                device = np.where(better, np.where(own, whose[rows, high], after_device[high]), device)
            cells[place] = (value, device)
        whole, device = cells[0]
        right = setting.num_stages in (None, from_end)
        if right and np.isfinite(whole[0]) and (best is None or whole[0] < best[0]):
            best = (float(whole[0]), int(device[0]))
        behind = cells
    return best


def _needs(tables: Tables, setting: Setting, devices: tuple[int, ...], from_end: int) -> tuple[Array, np.ndarray]:
    """For every pair of down-sets the least need over the options, and the device that has it."""
    num_in_flight = setting.group_order(from_end).in_flight
    shape = tables.family.inside.shape
    least, whose = np.full(shape, np.inf), np.full(shape, devices[0])
    for table in tables.of(devices, setting.num_microbatches):
        need, device = np.zeros(shape), np.full(shape, devices[0])
        for g, static, saved in zip(devices, table.static_bytes, table.saved_bytes, strict=True):
            one = (static + num_in_flight * saved) / tables.problem.devices[g].memory_bytes
            device = np.where(one > need, g, device)
            need = np.maximum(need, one)
        need = np.where(tables.family.inside & np.isfinite(table.forward_s), need, np.inf)
        whose = np.where(need < least, device, whose)
        least = np.minimum(least, need)
    return least, whose

"""Assignments without order: simulated annealing over moves and swaps of groups.

Objective    sum over devices of (load + excess of memory)^8, whose minimum has a small largest load and, unlike the
             largest load itself, changes with almost every move; the best largest load seen is what is returned.
Moves        a group to a random device, or to that of a group with which it shares a net, or two groups swap devices.
A move changes the loads of two devices by the group's latency and by the nets of its pins alone: a net costs an
accelerator its c exactly if that holds some but not all of the pins (see `groups`).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from partita.planner.placement.groups import Groups

_POWER = 8
_TINY = 1e-200  # where all loads are 0


class Annealing:
    """The state of one search: devices of groups, loads, and for each net the number of its pins by device."""

    def __init__(self, groups: Groups, devices: Sequence[int], seed: int) -> None:
        problem = groups.problem
        self._random = random.Random(seed)
        self._num_accelerators = problem.num_accelerators
        self._num_devices = problem.num_devices
        self._latency = (groups.accelerator_latency.tolist(), groups.cpu_latency.tolist())
        self._size = groups.size_bytes.tolist()
        self._limit = problem.limit_bytes if sum(self._size) > problem.limit_bytes else math.inf
        self._costs = groups.costs.tolist()
        self._num_pins = [len(pins) for pins in groups.pins]
        self._nets: list[list[int]] = [[] for _ in range(groups.num_groups)]
        self._near: list[list[int]] = [[] for _ in range(groups.num_groups)]
        for net, pins in enumerate(groups.pins):
            for pin in pins:
                self._nets[pin].append(net)
                if len(pins) <= 16:
                    self._near[pin] += [other for other in pins if other != pin]
        self._start(list(devices))

    def _start(self, devices: list[int]) -> None:
        self.devices = devices
        self.loads = [0.0] * self._num_devices
        self.sizes = [0.0] * self._num_devices
        self._held = [[0] * self._num_devices for _ in self._costs]
        for group, device in enumerate(devices):
            self.loads[device] += self._latency[device >= self._num_accelerators][group]
            self.sizes[device] += self._size[group]
            for net in self._nets[group]:
                self._held[net][device] += 1
        for net, held in enumerate(self._held):
            for device in range(self._num_accelerators):
                if 0 < held[device] < self._num_pins[net]:
                    self.loads[device] += self._costs[net]

    def _change(self, group: int, old: int, new: int) -> tuple[float, float]:
        """What the move adds to the loads of both devices."""
        num_accelerators = self._num_accelerators
        from_old = -self._latency[old >= num_accelerators][group]
        to_new = self._latency[new >= num_accelerators][group]
        for net in self._nets[group]:
            held, cost, pins = self._held[net], self._costs[net], self._num_pins[net]
            if old < num_accelerators:
                count = held[old]
                if count == pins:
                    from_old += cost
                elif count == 1:
                    from_old -= cost
            if new < num_accelerators:
                count = held[new]
                if count == 0:
                    to_new += cost
                elif count == pins - 1:
                    to_new -= cost
        return from_old, to_new

    def _move(self, group: int, new: int, change: tuple[float, float]) -> None:
        old = self.devices[group]
        self.devices[group] = new
        self.loads[old] += change[0]
        self.loads[new] += change[1]
        self.sizes[old] -= self._size[group]
        self.sizes[new] += self._size[group]
        for net in self._nets[group]:
            self._held[net][old] -= 1
            self._held[net][new] += 1

    def _fits(self, device: int) -> bool:
        return device >= self._num_accelerators or self.sizes[device] <= self._limit

    def _allowed(self, group: int, new: int) -> bool:
        return new >= self._num_accelerators or (
            self._latency[0][group] < math.inf and self.sizes[new] + self._size[group] <= self._limit
        )

    def _target(self, group: int) -> int:
        near = self._near[group]
        if near and self._random.random() < 0.5:
            return self.devices[near[int(self._random.random() * len(near))]]
        return int(self._random.random() * self._num_devices)

    def run(self, num_steps: int, deadline: float, enough: float, hot: float = 0.3) -> tuple[float, list[int]]:
        """The best largest load and its devices after `num_steps`; ends early at `deadline` or at `enough`."""
        best, best_devices = max(self.loads), list(self.devices)
        num_groups, draw, loads, devices = len(self._size), self._random.random, self.loads, self.devices
        scale = 1.0 / best if best > 0 else 1.0
        total = sum((load * scale) ** _POWER for load in loads) + _TINY
        cooling = math.log(hot / 1e-4)
        heat = hot
        for step in range(num_steps):
            if step % 128 == 0:
                if time.monotonic() > deadline or best <= enough:
                    break
                heat = hot * math.exp(-cooling * step / num_steps)
                total = sum((load * scale) ** _POWER for load in loads) + _TINY
            group = int(draw() * num_groups)
            old = devices[group]
            if draw() < 0.3:
                other = int(draw() * num_groups)
                gain = self._try_swap(group, other, scale, heat * total)
            else:
                new = self._target(group)
                if new == old or not self._allowed(group, new):
                    continue
                change = self._change(group, old, new)
                gain = self._gain(old, new, change, scale)
                if gain < 0 or draw() < math.exp(-gain / max(_TINY, heat * total)):
                    self._move(group, new, change)
                else:
                    gain = math.inf
            if gain < math.inf:
                total += gain
                largest = max(loads)
                if largest < best * (1 - 1e-12):
                    best, best_devices = largest, list(devices)
        self._start(best_devices)
        return max(self.loads), list(best_devices)

    def _gain(self, old: int, new: int, change: tuple[float, float], scale: float) -> float:
        before = (self.loads[old] * scale) ** _POWER + (self.loads[new] * scale) ** _POWER
        after = ((self.loads[old] + change[0]) * scale) ** _POWER + ((self.loads[new] + change[1]) * scale) ** _POWER
        return after - before

    def _try_swap(self, group: int, other: int, scale: float, heat: float) -> float:
        """Swap the devices of two groups if the criterion accepts; the change of the objective, infinite if not."""
        a, b = self.devices[group], self.devices[other]
        if a == b or not (self._supports(group, b) and self._supports(other, a)):
            return math.inf
        loads = (self.loads[a], self.loads[b])
        self._move(group, b, self._change(group, a, b))
        self._move(other, a, self._change(other, b, a))
        gain = sum((self.loads[device] * scale) ** _POWER for device in (a, b))
        gain -= sum((load * scale) ** _POWER for load in loads)
        if self._fits(a) and self._fits(b) and (gain < 0 or self._random.random() < math.exp(-gain / max(_TINY, heat))):
            return gain
        self._move(other, b, self._change(other, a, b))
        self._move(group, a, self._change(group, b, a))
        self.loads[a], self.loads[b] = loads
        return math.inf

    def _supports(self, group: int, device: int) -> bool:
        return device >= self._num_accelerators or self._latency[0][group] < math.inf

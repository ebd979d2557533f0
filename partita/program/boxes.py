"""Which part of each parameter a worker reads and a process stores."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from partita.errors import PlanError
from partita.plan import Plan, Worker
from partita.program.instructions import Box


class Boxes:
    """The parts of parameters under a plan.

    A process stores the least box that holds what its workers read or update: the whole parameter where they are all
    parts of it (its workers then have views of one storage), or only a part, where other processes have the rest.

    Args:
        shapes: of all parameters.
        cut: parameter -> worker -> the box that it reads; parameters and workers that are not named read all of it.
        users: parameter -> workers that read or update it.

    Raises:
        PlanError: the parts of a process leave a gap between them.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Mapping[str, tuple[int, ...]],
        cut: Mapping[str, Mapping[int, Box]],
        users: Mapping[str, Collection[int]],
    ) -> None:
        self._shapes, self._cut = shapes, cut
        self._storages: dict[tuple[int, str], Box] = {}
        for name in cut:
            here: dict[int, list[int]] = {}
            for index in sorted(users.get(name, ())):
                here.setdefault(plan.workers[index].process, []).append(index)
            for process, workers in here.items():
                self._storages[process, name] = self._hull(name, workers, process)

    def _hull(self, name: str, workers: Sequence[int], process: int) -> Box:
        boxes = {self._cut[name].get(worker, Box.whole(self._shapes[name])) for worker in workers}
        first, *others = boxes
        hull = first
        for box in others:
            hull = hull.hull(box)
        if sum(box.num_elements for box in boxes) != hull.num_elements:
            raise PlanError(
                f"the parts of a parameter that one process reads must form one block, but those of {name!r} in "
                f"process {process} do not; use axes whose workers fill whole processes"
            )
        return hull

    def is_cut(self, name: str) -> bool:
        """Whether any worker reads less than the whole parameter."""
        return name in self._cut

    def box(self, worker: Worker, name: str) -> Box:
        """What the worker reads, in the whole parameter's coordinates."""
        return self._cut.get(name, {}).get(worker.index) or Box.whole(self._shapes[name])

    def storage(self, process: int, name: str) -> Box:
        """What the process stores, in the whole parameter's coordinates."""
        return self._storages.get((process, name)) or Box.whole(self._shapes[name])

    def views(self, worker: Worker) -> dict[str, Box]:
        """The worker's parts in its process' storages, where they are not all of them."""
        found = {}
        for name in self._cut:
            storage = self.storage(worker.process, name)
            box = self.box(worker, name)
            if (worker.process, name) in self._storages and box != storage:
                found[name] = box.within(storage)
        return found

    def held(self) -> dict[int, dict[str, Box]]:
        """By process, the storages that are not whole parameters."""
        found: dict[int, dict[str, Box]] = {}
        for (process, name), box in self._storages.items():
            if not box.is_whole(self._shapes[name]):
                found.setdefault(process, {})[name] = box
        return found

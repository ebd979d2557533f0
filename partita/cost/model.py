"""`CostModel`: the questions that the planner and the simulator ask about time."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import fx

CollectiveKind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]


class Place(Protocol):
    """Where a worker lives; `partita.plan.Worker` is one."""

    @property
    def process(self) -> int: ...
    @property
    def machine(self) -> int: ...
    @property
    def cores(self) -> tuple[int, ...]: ...
    @property
    def gpu(self) -> int | None: ...


class CostModel(Protocol):
    """Predicted times, all in seconds. `num_active` is the number of workers of the same machine that compute at the
    same time, on average (they share memory bandwidth and, where not compiled, the interpreter)."""

    def op_time_s(self, node: fx.Node, place: Place, *, num_active: float = 1) -> float:
        """Time of one op with the local shapes in ``node.meta["val"]`` and its inputs', uncompiled."""
        ...

    def segment_time_s(
        self, module: fx.GraphModule, key: str, place: Place, *, compiled: bool, num_active: float = 1
    ) -> float:
        """Time of a whole segment; the measured one where the table has it, else the sum of its ops."""
        ...

    def update_time_s(self, sizes: tuple[int, ...], optimizer: str, place: Place, *, num_active: float = 1) -> float:
        """Time of the optimizer (class name, e.g. "AdamW") on float32 slices of `sizes` elements."""
        ...

    def transfer_time_s(self, num_bytes: int, source: Place, target: Place) -> float:
        """Time until a value of `num_bytes` is at `target`."""
        ...

    def collective_time_s(
        self, kind: CollectiveKind, num_bytes: int, group: tuple[Place, ...], *, num_tensors: int = 1
    ) -> float:
        """Time of a collective, hierarchical where the group spans processes. `num_bytes`: of the whole tensors."""
        ...

    def gradient_sum_time_s(self, num_bytes: int, group: tuple[Place, ...], *, num_tensors: int = 1) -> float:
        """Time of a sum of gradients, as of `collective_time_s`, by the method that forms it between processes."""
        ...

    def interruption_s(self, num_bytes: int, place: Place, *, num_processes: int, num_busy: int) -> float:
        """What a sum of gradients over `num_processes`, made in the background, takes of the time of the worker at
        `place`: its computing, unless the worker's process has more cores than the `num_busy` that workers use."""
        ...

    @property
    def sent_share(self) -> float:
        """What that method sends of the bytes that the exact sum sends."""
        ...

    def instruction_time_s(self) -> float:
        """Fixed cost of one instruction of a worker."""
        ...

    def step_time_s(self, num_workers: int) -> float:
        """Fixed cost of one step: waking the `num_workers` workers of a process and joining them."""
        ...

    def uncertainty(self, *, compiled: bool) -> float:
        """Relative error expected of a step time that is predicted from its ops (0.1 = 10 %)."""
        ...

    @property
    def refined_uncertainty(self) -> float:
        """The same where the plan's segments and updates were measured as a whole."""
        ...

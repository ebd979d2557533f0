"""`Plan`: how one model's training step is split over workers, as a value (JSON in and out)."""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from partita.arguments import path_of
from partita.cluster.model import Cluster
from partita.constraints import Constraints as Constraints
from partita.constraints import Recompute as Recompute
from partita.constraints import Schedule as Schedule
from partita.errors import PlanError
from partita.files import replacing
from partita.plan_layout import ORDER, Layout, worker_of
from partita.plan_layout import Worker as Worker
from partita.units import fingerprint, gap_of

if TYPE_CHECKING:
    from partita.graph.graph import Graph

VERSION = 1
MOST_LISTED = 2000  # workers that a plan with a layout lists one by one


def cluster_fingerprint(cluster: Cluster) -> str:
    """Hash of what a plan relies on: processes, their machine, how many cores they have and which GPUs. Measured
    rates and core numbers are left out, so that the same job detected twice has the same fingerprint."""
    parts: list[object] = []
    for process in cluster.processes:
        machine = cluster.machines[process.machine]
        gpus = tuple(machine.gpus[gpu].name for gpu in process.gpus if gpu < len(machine.gpus))
        parts.append((process.rank, process.machine, machine.cpu, len(process.cores), gpus))
    return fingerprint(parts)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(message)


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost model says of a plan. `lower_bound_s` is proven for every plan of the searched space under the same
    cost model; `uncertainty` is the relative error that the cost model expects of `step_time_s`."""

    step_time_s: float
    lower_bound_s: float
    uncertainty: float
    memory_bytes: dict[str, int]  # peak by process rank (as text); of a GPU by stage in mode "layout"
    bytes_sent: int = 0  # between processes, per step

    @property
    def gap(self) -> float:
        """The share of the step time that could at most be saved: 0 means proven optimal under the cost model."""
        return gap_of(self.step_time_s, self.lower_bound_s)


class Alternative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan that was considered and not taken."""

    description: str
    predicted_step_time_s: float
    measured_step_time_s: float | None
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one model's training step is split over workers.

    `mode` "graph" runs the captured graph as programs; "block" runs plain PyTorch on the whole batch on one worker
    (eager, or `torch.compile` if `compiled`), with `reasons` saying why. Mesh axes are "pipeline" (stages), "data"
    (rows of the batch) and "tensor" (parts of single ops); `axes` gives their extents. `stage_starts` holds the name of
    the first forward op (in the graph's order) of every stage but the first. `shares` gives the rows of the global
    batch of each data coordinate. `placements` maps op names to placement texts per mesh axis, e.g.
    ``{"addmm": {"data": "S(0)"}}``.

    `inputs` says which inputs of the step are cut along which mesh axis, by their names (a parameter's dotted name, the
    batch's leaves as the graph calls them): ``{"layers.0.weight": {"tensor": "S(0)"}}``; on the data axis the rows of
    the batch are cut without being named, and a parameter that is cut there is fully sharded. `rules` names, per op and
    axis, the rule by which the op runs; ops that it does not name run as is cheapest.

    `bucket_bytes` is the size of the buckets in which gradients are exchanged between processes in the background of
    the backward phase; 0: they are exchanged in its foreground.

    `mode` "layout" is a plan for described GPUs (`partita export` writes it for engines that run it): `layout` tells
    its stages and machines, `stage_starts` names blocks, `inputs` patterns of parameters (``*`` for a block's number),
    `prediction.memory_bytes` one GPU of each stage. Axes may then have "context" as well. Its workers are listed up to
    `MOST_LISTED`; `worker` gives any of them. `micro_batch` counts the samples of a microbatch, `num_virtual_stages`
    the chunks of blocks of a stage; `recompute` is what the backward window computes again, `zero_stage` what is
    sharded over the data axis (1 optimizer state, 2 and gradients, 3 and parameters), `sequence_parallel` whether
    values between blocks are cut along the tensor axis.
    """

    mode: Literal["graph", "block", "layout"]
    graph_fingerprint: str
    cluster_fingerprint: str
    axes: dict[str, int]
    workers: tuple[Worker, ...]
    threads_per_worker: int
    num_microbatches: int = 1
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    compiled: bool = False
    stage_starts: tuple[str, ...] = ()
    shares: tuple[int, ...] = ()
    placements: dict[str, dict[str, str]] = {}
    inputs: dict[str, dict[str, str]] = {}
    rules: dict[str, dict[str, str]] = {}
    prediction: Prediction | None = None
    measured_step_time_s: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    reasons: tuple[str, ...] = ()
    local_statistics: bool = False
    version: int = 1
    micro_batch: int | None = None
    num_virtual_stages: int = 1
    recompute: Recompute = "none"
    zero_stage: int = 0
    sequence_parallel: bool = False
    layout: Layout | None = None
    bucket_bytes: int = 0

    def __post_init__(self) -> None:
        _check_layout(self)
        _check_workers(self)
        for name in ("threads_per_worker", "num_microbatches", "num_virtual_stages"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, but the plan has {value}.")
        _require(self.bucket_bytes >= 0, f"bucket_bytes must be at least 0, but the plan has {self.bucket_bytes}.")
        stages, data = self.axes.get("pipeline", 1), self.axes.get("data", 1)
        _require(
            len(self.stage_starts) == stages - 1,
            f"stage_starts must name the first op of every stage but the first: {stages - 1} for "
            f"axes['pipeline']={stages}, but the plan has {len(self.stage_starts)}.",
        )
        _require(
            len(set(self.stage_starts)) == len(self.stage_starts),
            f"stage_starts must differ, but got {self.stage_starts}.",
        )
        _require(
            not self.shares or len(self.shares) == data,
            f"shares must give the rows of each of the {data} data coordinates, but has {len(self.shares)} entries.",
        )
        _require(
            all(share >= 1 for share in self.shares), f"every share must be at least 1 row, but got {self.shares}."
        )

    @property
    def num_workers(self) -> int:
        return len(self.workers) or math.prod(self.axes.values())

    @property
    def used_cores(self) -> Counter[int]:
        """By process, how many cores its workers use."""
        used: Counter[int] = Counter()
        for worker in self.workers:
            used[worker.process] += max(len(worker.cores), 1)
        return used

    def worker(self, index: int) -> Worker:
        """Worker `index`, listed or not. Raises `PlanError` if there is none."""
        if self.layout is not None:
            return worker_of(self.layout, self.axes, index)
        _require(0 <= index < len(self.workers), f"the plan has workers 0 to {len(self.workers) - 1}, not {index}.")
        return self.workers[index]

    @property
    def unrunnable(self) -> tuple[str, ...]:
        """What of this plan partita's runtime does not have, in words; () if it runs."""
        found = ["a layout for described GPUs instead of the model's ops"] if self.mode == "layout" else []
        found += [f"{self.num_virtual_stages} chunks a stage"] if self.num_virtual_stages > 1 else []
        found += ["the interleaved schedule"] if self.schedule == "interleaved" else []
        found += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        found += [f"ZeRO {self.zero_stage}"] if self.zero_stage else []
        found += ["sequence parallelism between blocks"] if self.sequence_parallel else []
        found += ["a context axis"] if self.axes.get("context", 1) > 1 else []
        return tuple(found)

    @property
    def hash(self) -> str:
        """Hash of everything that decides what is run. Predictions, measurements and explanations do not count, so
        every process of a job can compare it."""
        told = ("prediction", "measured_step_time_s", "alternatives", "reasons")
        parts = [
            (name, msgspec.json.encode(_decided(getattr(self, name)), order="sorted").decode())
            for name in self.__struct_fields__
            if name not in told
        ]
        return fingerprint(parts)

    def to_json(self) -> bytes:
        """The plan as indented JSON; `from_json` is the inverse."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=2)

    @classmethod
    def from_json(cls, text: bytes, *, where: str = "plan") -> Plan:
        """Parse what `to_json` gave. Raises `PlanError` naming `where` and the offending field."""
        try:
            raw: Any = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{where} must be a plan in JSON, but it is corrupt: {error}. Save the plan again."
            ) from error
        _require(isinstance(raw, dict), f"{where} must hold a JSON object, but it holds {type(raw).__name__}.")
        version = raw.get("version")
        _require(
            type(version) is int and version == VERSION,
            f"{where}: version must be {VERSION}, but got {version!r}. Make the plan again with this version of "
            f"partita.",
        )
        _check_field_names(raw, where)
        try:
            return msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise PlanError(f"{where} is not a valid plan: {error}.") from error
        except PlanError as error:
            raise PlanError(f"{where} is inconsistent: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path` as JSON; readers see the old file or the whole new one, never a part.
        Raises `PlanError` if it cannot be written."""
        target = path_of(path, "the path of Plan.save")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, durable=True) as new:
                new.write_bytes(self.to_json())
        except OSError as error:
            raise PlanError(
                f"A plan file must be writable, but {str(target)!r} is not: {error.strerror}. Choose another place."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. Raises `PlanError` if the file is missing, corrupt or inconsistent."""
        path = path_of(path, "the path of Plan.load")
        try:
            text = path.read_bytes()
        except OSError as error:
            raise PlanError(
                f"A plan file must be readable, but {os.fspath(path)!r} is not: {error.strerror}."
            ) from error
        return cls.from_json(text, where=f"plan file {os.fspath(path)!r}")

    def validate(self, graph: Graph | None, cluster: Cluster) -> None:
        """Raise `PlanError`, naming what differs, unless this plan belongs to `graph` and `cluster`. `graph` is None
        for a
        model that cannot be captured; then only a "block" plan is valid."""
        again = "Make a new plan with partita.plan(...)."
        if self.mode == "layout":
            self._validate_machines(cluster, again)
            return
        if graph is None:
            _require(
                self.mode == "block",
                f'The model cannot be captured as a graph, so its plan must have mode "block". {again}',
            )
        else:
            self._validate_graph(graph, again)
        differs = cluster_difference(self, cluster)
        if not differs and self.cluster_fingerprint != cluster_fingerprint(cluster):
            differs = (
                f"its fingerprint is {self.cluster_fingerprint}, that of the given one is "
                f"{cluster_fingerprint(cluster)} "
                "(another number of processes or cores, another CPU or GPU model)"
            )
        _require(not differs, f"The plan is for another cluster: {differs}. {again}")

    def _validate_machines(self, cluster: Cluster, again: str) -> None:
        """A layout names blocks, not ops, so only the machines can be compared."""
        _require(
            self.cluster_fingerprint == cluster_fingerprint(cluster),
            f"The plan is for another cluster: its fingerprint is {self.cluster_fingerprint}, that of the given one is "
            f"{cluster_fingerprint(cluster)} (another number of machines or GPUs, or another kind). {again}",
        )

    def _validate_graph(self, graph: Graph, again: str) -> None:
        _require(
            self.graph_fingerprint == graph.fingerprint,
            f"The plan is for another model or batch shape: its graph has fingerprint {self.graph_fingerprint}, the "
            f"given "
            f"one has {graph.fingerprint}. {again}",
        )
        rows = sum(self.shares)
        _require(
            not self.shares or graph.batch_size in (0, rows),
            f"The plan's shares must add up to the {graph.batch_size} rows of the batch, but add up to {rows}. {again}",
        )
        positions = {node.name: index for index, node in enumerate(graph.nodes)}
        for name in self.stage_starts:
            near = difflib.get_close_matches(name, positions, n=1)
            _require(
                name in positions,
                f"stage_starts must name ops of the graph, but it has no op {name!r}."
                + (f" The nearest is {near[0]!r}." if near else ""),
            )
        order = [positions[name] for name in self.stage_starts]
        _require(order == sorted(order), f"stage_starts must be in the graph's order, but got {self.stage_starts}.")

    def __str__(self) -> str:
        from partita.planner.describe import table  # the planner imports this file

        return table(self)

    def explain(self) -> str:
        """The long text: the split and why, stages, devices, predicted time beside the bound, and the alternatives."""
        from partita.planner.describe import explanation

        return explanation(self)

    def diff(self, other: Plan) -> str:
        """One line per field that differs, ``name: this -> other``; "" if both run the same."""
        from partita.planner.describe import difference

        return difference(self, other)


def _decided(value: object) -> object:
    """A layout without what is predicted and explained; other values as they are."""
    if not isinstance(value, Layout):
        return value
    return msgspec.structs.replace(value, parts_s={}, exchanges=(), memory_limits_bytes=())


def _check_layout(plan: Plan) -> None:
    is_layout = plan.mode == "layout"
    _require(is_layout == (plan.layout is not None), 'a plan must have a layout exactly if its mode is "layout".')
    _require(plan.zero_stage in (0, 1, 2, 3), f"zero_stage must be 0, 1, 2 or 3, but the plan has {plan.zero_stage}.")
    _require(plan.micro_batch is None or plan.micro_batch >= 1, f"micro_batch must be at least 1: {plan.micro_batch}.")
    layout = plan.layout
    if layout is None:
        return
    _require(sorted(layout.order) == sorted(ORDER), f"layout.order must name {sorted(ORDER)}, but is {layout.order}.")
    there, used = layout.num_gpus_there, math.prod(plan.axes.values())
    _require(1 <= used <= there, f"the axes must fit the {there} GPUs of the machines, but {plan.axes} take {used}.")
    stages, chunks = plan.axes.get("pipeline", 1), len(layout.num_layers)
    same = len(layout.stages) == stages and all(len(stage) == plan.num_virtual_stages for stage in layout.stages)
    _require(
        same and chunks == stages * plan.num_virtual_stages,
        f"the layout must have {stages} stages of {plan.num_virtual_stages} chunks, but has "
        f"{[len(stage) for stage in layout.stages]} and {chunks} numbers of layers.",
    )
    samples = plan.axes.get("data", 1) * (plan.micro_batch or 0) * plan.num_microbatches
    _require(
        samples == layout.global_batch,
        f"data x micro_batch x num_microbatches must be the batch of {layout.global_batch}, but is {samples}.",
    )


def _check_workers(plan: Plan) -> None:
    allowed = {"pipeline", "data", "tensor", "time"} | ({"context"} if plan.layout is not None else set())
    _require(set(plan.axes) <= allowed, f"axes must be among {sorted(allowed)}, but got {sorted(plan.axes)}.")
    _require(
        all(extent >= 1 for extent in plan.axes.values()),
        f"every axis must have an extent of at least 1, but got {plan.axes}.",
    )
    stages, data, tensor = (plan.axes.get(axis, 1) for axis in ("pipeline", "data", "tensor"))
    if plan.layout is not None:
        _require(
            not plan.workers or len(plan.workers) == plan.num_workers == math.prod(plan.axes.values()),
            f"a plan with a layout must list all of its {math.prod(plan.axes.values())} workers or none, but lists "
            f"{len(plan.workers)}.",
        )
        for index, worker in enumerate(plan.workers):
            wanted = worker_of(plan.layout, plan.axes, index)
            _require(worker == wanted, f"worker {index} must be {wanted} by the layout, but is {worker}.")
        return
    _require(
        len(plan.workers) == stages * data * tensor,
        f"a plan must have pipeline * data * tensor workers, but has {len(plan.workers)} for pipeline={stages}, "
        f"data={data} and tensor={tensor}.",
    )
    for place, worker in enumerate(plan.workers):
        _require(worker.index == place, f"worker {place} must have index {place}, but has {worker.index}.")
        _require(
            0 <= worker.stage < stages and 0 <= worker.data < data and 0 <= worker.tensor < tensor,
            f"worker {place} must lie on the mesh, but has stage {worker.stage} of {stages}, data {worker.data} of "
            f"{data} and tensor {worker.tensor} of {tensor}.",
        )
        _require(worker.process >= 0 and worker.machine >= 0, f"worker {place} must have a process and a machine.")
        _require(
            len(set(worker.cores)) == len(worker.cores),
            f"worker {place} must have different cores, but has {worker.cores}.",
        )
    taken = Counter((worker.stage, worker.data, worker.tensor) for worker in plan.workers)
    for coordinate, count in taken.items():
        _require(count == 1, f"every (stage, data, tensor) must have one worker, but {coordinate} has {count}.")


def _check_field_names(raw: dict[str, Any], where: str) -> None:
    known = Plan.__struct_fields__
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"{where}: unknown field {name!r}.{hint}")


def cluster_difference(plan: Plan, cluster: Cluster) -> str:
    """What of `plan` the cluster does not have, in words; "" if the plan can run there."""
    ranks = {process.rank: process for process in cluster.processes}
    wanted = {worker.process for worker in plan.workers}
    if plan.mode == "graph" and wanted != set(ranks) and len(wanted) > 1:  # one process alone is a plan as well
        return f"the plan has workers on processes {sorted(wanted)}, the cluster has {sorted(ranks)}"
    for worker in plan.workers:
        process = ranks.get(worker.process)
        if process is None:
            return f"worker {worker.index} is on process {worker.process}, which the cluster does not have"
        if worker.machine != process.machine:
            return f"worker {worker.index} is on machine {worker.machine}, its process is on machine {process.machine}"
        if not set(worker.cores) <= set(process.cores):
            return (
                f"worker {worker.index} owns cores {list(worker.cores)}, process {process.rank} has "
                f"{list(process.cores)}"
            )
        if worker.gpu is not None and worker.gpu not in process.gpus:
            return f"worker {worker.index} owns GPU {worker.gpu}, process {process.rank} has {list(process.gpus)}"
    return ""

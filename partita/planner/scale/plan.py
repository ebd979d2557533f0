"""Planning at scale: from a model on ``meta`` and a described cluster of 8 to 100,000 GPUs to a `ScaleSolution`.

capture few blocks -> pieces -> placements per axis (exact) -> works -> search over degrees -> solution
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from partita.cluster.model import Cluster
from partita.cost.kernels import Kernel
from partita.cost.memory import STATE_ELEMENTS
from partita.cost.networks import Fabric
from partita.errors import InputError
from partita.graph.checks import shared_batch_size
from partita.graph.shallow import shallow_capture
from partita.planner.scale.pieces import CutModel, cut_model
from partita.planner.scale.search import Candidate, Effort, Found, Searcher, batch_refused, memory_limits
from partita.planner.scale.solution import Alternative, ScaleConstraints, ScaleSolution, way_text
from partita.planner.scale.solve_pieces import PieceSolver
from partita.planner.scale.step import State
from partita.planner.scale.ways import lay_text
from partita.planner.scale.works import WorkMaker, dtype_of
from partita.units import GIB, fingerprint

# Rows of the captures: primes, so that no degree divides them and no dim of a usual model has them as extent.
ROWS = (7, 11)


class ScalePlanner:
    """Plans one model on any cluster; keeps captures, placements and prices between plans.

    Args:
        model: any ``nn.Module``, best on ``meta``; neither changed nor copied.
        loss_fn: ``loss_fn(model, batch)`` -> scalar.
        batch: the global batch; only its shapes count (``meta`` will do). Dim 0 holds the samples.
        optimizer: an optimizer, or the name of its class ("AdamW"); None: mixed precision with Adam as Megatron-LM
        keeps
            it (18 bytes for each parameter: `partita.planner.scale.step.State`).
        state: bytes kept for each parameter, if they are neither.

    Raises:
        InputError, CaptureError: as `partita.graph.capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        batch: Any,
        optimizer: torch.optim.Optimizer | str | None = None,
        *,
        state: State | None = None,
    ) -> None:
        started_s = time.monotonic()
        self.batch_size = shared_batch_size([x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)])
        if self.batch_size < 1:
            raise batch_refused(self.batch_size)
        captures = [shallow_capture(model, loss_fn, with_rows(batch, self.batch_size, rows)) for rows in ROWS]
        self.model: CutModel = cut_model(captures, ROWS)
        solver = PieceSolver(self.model)
        self.maker = WorkMaker(self.model, solver)
        self.state = state or state_of(optimizer, dtype_of(self.model))
        self.searcher = Searcher(
            maker=self.maker, chain=tuple(piece for piece, _ in self.model.chain), state=self.state,
            batch=self.batch_size,
        )  # fmt: skip
        self.num_parameters = float(sum(parameter.numel() for parameter in model.parameters()))
        self.fingerprint = fingerprint(
            [*(one.graph.fingerprint for one in captures), [name for _, name in self.model.chain], self.batch_size]
        )
        self.is_prepared = False  # whether the works of all families are made
        self.capture_s = time.monotonic() - started_s

    def plan(
        self,
        cluster: Cluster | Fabric,
        constraints: ScaleConstraints | None = None,
        *,
        effort: Effort = "thorough",
    ) -> ScaleSolution:
        """The fastest way to train on ``cluster``.

        Args:
            effort: how many ways are priced exactly: "thorough" takes seconds, "quick" less than a tenth of one if
                something was planned before, "exhaustive" prices all whose bound is below the best (minutes and more
                for large models; "thorough" does so too where that is little work). The bound holds for each.

        Raises:
            InfeasibleError: nothing fits the memory or the constraints.
            ClusterError: a machine has no GPU of a known kind.
        """
        return self.plan_from(cluster, constraints, time.monotonic(), effort)

    def plan_from(
        self, cluster: Cluster | Fabric, constraints: ScaleConstraints | None, started_s: float, effort: Effort
    ) -> ScaleSolution:
        """`plan`, where planning began at ``started_s`` of the monotonic clock."""
        fabric = cluster if isinstance(cluster, Fabric) else Fabric.of_cluster(cluster)
        if not self.is_prepared:
            self.searcher.prepare()
            self.is_prepared = True
        found = self.searcher.search(fabric, constraints or ScaleConstraints(), effort)
        return self._solution(found, fabric, {"capture": self.capture_s, "search": time.monotonic() - started_s})

    def _solution(self, found: Found, fabric: Fabric, seconds: dict[str, float]) -> ScaleSolution:
        best = found.best
        layout = self.maker.solver.layout(best.family.tensor, sequence=best.family.sequence_parallel)
        names = [name for _, name in self.model.chain]
        ends = [*best.cuts[1:], len(names)]
        p = best.degrees.pipeline
        chunks = [(names[begin], names[end - 1]) for begin, end in zip(best.cuts, ends, strict=True)]
        gaps = [self.model.pieces[piece].is_gap for piece, _ in self.model.chain]
        span = best.degrees.stage_devices
        return ScaleSolution(
            axes=_axes(best),
            stages=tuple(tuple(chunks[stage::p]) for stage in range(p)),
            cuts=best.cuts,
            num_layers=tuple(gaps[b:e].count(False) for b, e in zip(best.cuts, ends, strict=True)),
            num_devices=best.degrees.num_devices,
            num_devices_there=fabric.num_gpus,
            global_batch=self.batch_size,
            micro_batch=best.family.micro_batch,
            num_microbatches=best.num_microbatches,
            schedule=best.schedule,
            recompute=best.remat,
            zero=best.zero,
            sequence_parallel=best.family.sequence_parallel,
            placements={self.model.parameter_name(node): lay_text(lay) for node, lay in layout.parameter_lays.items()},
            activations=lay_text(layout.boundary),
            step_time_s=best.prediction.step_time_s,
            parts_s=best.prediction.parts,
            memory_bytes=best.prediction.memory_bytes,
            memory_limits_bytes=memory_limits(fabric, best.degrees),
            lower_bound_s=found.bound_s,
            stage_kinds=tuple(
                "+".join(g.kind.gpu.name for g in fabric.groups_of(s * span, (s + 1) * span - 1)) for s in range(p)
            ),
            num_parameters=self.num_parameters,
            model_flops=self._model_flops(),
            reasons=self._reasons(found, fabric),
            alternatives=tuple(_alternative(other, best) for other in found.others),
            seconds=seconds,
            planner=self,
        )

    def _model_flops(self) -> float:
        """FLOPs of products and attention in one step, on one device, without recomputation."""
        works = self.maker.works(tensor=1, context=1, sequence_parallel=False, micro_batch=1)
        per_piece = [
            sum(item.flops * item.count for item in (*work.forward, *work.backward) if isinstance(item, Kernel))
            for work in works
        ]
        return self.batch_size * sum(per_piece[piece] for piece, _ in self.model.chain)

    def _reasons(self, found: Found, fabric: Fabric) -> tuple[str, ...]:
        best = found.best
        parts = best.prediction.parts
        total = best.prediction.step_time_s
        shares = ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in parts.items())
        reasons = [f"step time: {shares}"]
        limits = memory_limits(fabric, best.degrees)
        stage = max(range(len(limits)), key=lambda s: best.prediction.memory_bytes[s] / limits[s])
        reasons.append(
            f"memory: {best.prediction.memory_bytes[stage] / GIB:.1f} of {limits[stage] / GIB:.1f} GiB on stage {stage}"
        )
        idle = fabric.num_gpus - best.degrees.num_devices
        if idle:
            reasons.append(
                f"{idle} of {fabric.num_gpus} devices idle: a batch of {self.batch_size} is not divided better"
            )
        if self.model.reason:
            reasons.append(f"captured whole: {self.model.reason}")
        reasons.append(
            f"searched {found.num_families} families, {found.num_corners} corners, {found.num_priced} priced exactly; "
            + (f"{found.num_open} more may be faster by their bounds" if found.num_open else "no other is faster")
        )
        return tuple(reasons)


def plan_at_scale(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    batch: Any,
    optimizer: torch.optim.Optimizer | str | None,
    cluster: Cluster | Fabric,
    constraints: ScaleConstraints | None = None,
    *,
    state: State | None = None,
) -> ScaleSolution:
    """The fastest way to train ``model`` on ``cluster``, from shapes alone; see `ScalePlanner` for the arguments.

    Example:
        >>> plan_at_scale(model, loss_fn, batch, None, Cluster.preset("128x8xA100-80")).text()  # doctest: +SKIP
        'data 16 tensor 8 pipeline 8 virtual 2, 96 x 1 samples, zero 1, sequence parallel'
    """
    return ScalePlanner(model, loss_fn, batch, optimizer, state=state).plan(cluster, constraints)


def replan(
    previous: ScaleSolution, *, cluster: Cluster | Fabric, constraints: ScaleConstraints | None = None
) -> ScaleSolution:
    """The plan of the same model on another cluster, in less than a tenth of a second: nothing is captured or solved
    again that still holds, and only a few ways are priced exactly (`ScalePlanner.plan` prices more).

    Raises:
        InputError: ``previous`` was read from a file, so that its captures are gone.
    """
    if not isinstance(previous.planner, ScalePlanner):
        raise InputError(
            "replan needs a solution that plan_at_scale made in this process; make it again from the model."
        )
    return previous.planner.plan(cluster, constraints, effort="quick")


def with_rows(batch: Any, num_samples: int, rows: int) -> Any:
    """``batch`` with ``rows`` samples instead of ``num_samples``; values are not kept."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.shape[0] != num_samples:
            return leaf
        return leaf.new_zeros((rows, *leaf.shape[1:]))

    return pytree.tree_map(resized, batch)


def state_of(optimizer: torch.optim.Optimizer | str | None, dtype: torch.dtype) -> State:
    """Bytes for each parameter as plain PyTorch keeps them: weights, gradients and state in the parameters' type."""
    if optimizer is None:
        return State()
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    size, states = dtype.itemsize, STATE_ELEMENTS.get(name, 2)
    return State(
        weight_bytes=size,
        gradient_bytes=size,
        optimizer_bytes=size * states,
        exchange_bytes=size,
        update_bytes=size * (3 + 2 * states),
    )


def _axes(candidate: Candidate) -> dict[str, int]:
    degrees = candidate.degrees
    names = ("data", "tensor", "pipeline", "virtual", "context", "expert")
    return {name: int(getattr(degrees, name)) for name in names}


def _alternative(other: Candidate, best: Candidate) -> Alternative:
    slower = other.prediction.step_time_s / best.prediction.step_time_s - 1
    theirs, ours = other.prediction.parts, best.prediction.parts
    worst = max(theirs, key=lambda name: theirs[name] - ours[name])
    return Alternative(
        text=way_text(
            _axes(other), other.family.micro_batch, other.num_microbatches, other.remat, other.zero,
            other.family.sequence_parallel,
        ),
        step_time_s=other.prediction.step_time_s,
        peak_memory_bytes=other.prediction.peak_memory_bytes,
        reason=f"{100 * slower:.1f} % slower, most of it {worst}",
    )  # fmt: skip


__all__: Sequence[str] = ("ROWS", "ScalePlanner", "plan_at_scale", "replan", "state_of", "with_rows")

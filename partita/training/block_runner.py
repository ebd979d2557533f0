"""`BlockRunner` is plain PyTorch on the whole batch: the fallback for what cannot be captured, and the baseline that
every plan must beat."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from partita.arguments import told
from partita.errors import InputError
from partita.runtime.binding import clip_factor
from partita.runtime.transport import Transport
from partita.training.averages import average_updated
from partita.training.connecting import Connecting, GradientFilter
from partita.training.inputs import BatchKey, BatchLeaves
from partita.training.job import Team
from partita.training.masters import HALF, WholeMasters
from partita.training.optimizers import by_fused_kernels, fused_agrees
from partita.training.runner import Due, LossFn, Outcome, apply_due
from partita.training.scaling import LossScale


class BlockRunner:
    """Plain PyTorch: forward, backward and the user's own optimizer on the whole batch, as one block. The optimizer
    steps by fused kernels if it has some that agree.

    In a job of several processes rank 0 computes; the others wait for the loss and receive the weights on demand.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        compiled: bool = False,
        num_threads: int,
        process: int = 0,
        transport: Transport | None = None,
        due: Due | None = None,
        clip_norm: float | None = None,
        decay: float | None = None,
        masters: bool = False,
        scale: LossScale | None = None,
        connecting: Connecting | None = None,
    ) -> None:
        self._filter = None if connecting is None else GradientFilter(connecting, {})
        self.model, self.optimizer, self._due = model, optimizer, due
        self._clip_norm, self._decay, self._scale = clip_norm, decay, scale
        self._masters = WholeMasters(optimizer, decay) if masters else None
        self.num_threads = num_threads
        self.process, self.transport = process, transport
        scaled = loss_fn if scale is None else scale.of(loss_fn)
        self._loss = torch.compile(scaled, dynamic=False) if compiled else scaled
        self._is_fused = fused_agrees(optimizer)
        self._is_compiled = compiled
        self._known: set[BatchKey] = set()  # batches of whose kind steps were made
        self._has_accumulated = False  # whether parameters have gradients that were not applied

    def step(
        self,
        batch: Any,
        leaves: BatchLeaves,
        *,
        update: bool = True,
        accumulate_only: bool = False,
        continues: bool = True,
        record: bool = False,
        finite_only: bool = False,
    ) -> Outcome:
        if leaves.offsets:
            raise InputError(
                "a block of plain PyTorch needs all rows of the batch, but partita.data.sharded read those of this "
                "process only; pass the loader's batches as they are"
            )
        compiles = self._is_compiled and leaves.key not in self._known
        self._known.add(leaves.key)
        told = torch.zeros(2, dtype=torch.float64)  # loss, and the norm of the gradients
        if self.process == 0:
            alone = Team(self.transport).working_alone() if compiles else contextlib.nullcontext()
            with alone, on_threads(self.num_threads):
                told = self._compute(batch, update, accumulate_only, continues, finite_only)
        if self.transport is not None:
            Team(self.transport).tell(told, patient=compiles)
        loss, norm = told.tolist()
        knows_norm = self._clip_norm is not None or self._scale is not None
        return Outcome(
            loss / (1.0 if self._scale is None else self._scale.value),
            norm=norm if knows_norm and not accumulate_only else None,
        )

    def _compute(
        self, batch: Any, update: bool, accumulate_only: bool, continues: bool, finite_only: bool
    ) -> torch.Tensor:
        saved = None if update else [buffer.clone() for buffer in self.model.buffers()]
        kept = None if update else [parameter.grad for parameter in self.model.parameters()]
        if not self._has_accumulated or not continues or not update:
            self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.model, batch)
        if not isinstance(loss, torch.Tensor):
            raise InputError(
                f"loss_fn must return a scalar tensor, but got {told(loss)}. Return the tensor itself, without .item() "
                "or float()."
            )
        if loss.dim() != 0 or not loss.requires_grad:
            raise InputError(
                f"loss_fn must return a scalar tensor that depends on the model's parameters, but got shape "
                f"{tuple(loss.shape)} with requires_grad={loss.requires_grad}"
            )
        norm, is_finite = 0.0, math.isfinite(loss.item())
        if is_finite or not (accumulate_only and finite_only):  # gradients of NaN would spoil the others
            loss.backward()
        if accumulate_only:
            self._has_accumulated = True
        else:
            norm = self._apply(loss.item(), update, finite_only)
        if saved is not None and kept is not None:
            with torch.no_grad():
                for buffer, old in zip(self.model.buffers(), saved, strict=True):
                    buffer.copy_(old)
            for parameter, gradient in zip(self.model.parameters(), kept, strict=True):
                parameter.grad = gradient
        return torch.tensor([loss.item(), norm], dtype=torch.float64)

    def _apply(self, loss: float, update: bool, finite_only: bool) -> float:
        """Unscales, clips and applies the gradients that parameters have; their norm before they were clipped."""
        if self._filter is not None:
            self._filter.whole(dict(self.model.named_parameters()))
        gradients = self._taken()
        norm = self._clipped(list(gradients.values()))
        applies = update and (not finite_only or (math.isfinite(loss) and math.isfinite(norm)))
        if not applies:
            self.optimizer.zero_grad(set_to_none=True)
        elif self._masters is not None:
            with by_fused_kernels(self._masters.optimizer) if self._is_fused else contextlib.nullcontext():
                self._masters.step(gradients)
        elif self._due is not None:
            apply_due(self._due, self.optimizer, dict(self.model.named_parameters()), loss, self._decay)
        else:
            with by_fused_kernels(self.optimizer) if self._is_fused else contextlib.nullcontext():
                self.optimizer.step()
            if self._decay is not None:
                average_updated(self.optimizer, self._decay)
        self._has_accumulated = self._has_accumulated and not update
        return norm

    def _taken(self) -> dict[int, torch.Tensor]:
        """The gradients, by identity of the parameter; wide ones for masters."""
        found = {id(item): item.grad for item in self.model.parameters() if item.grad is not None}
        if self._masters is None:
            return found
        return {key: gradient.float() if gradient.dtype in HALF else gradient for key, gradient in found.items()}

    @torch.no_grad()
    def _clipped(self, gradients: list[torch.Tensor]) -> float:
        """Unscales and clips gradients in place, as `torch.nn.utils.clip_grad_norm_` does; the norm before."""
        if self._scale is not None and gradients:
            torch._foreach_mul_(gradients, 1 / self._scale.value)
        if (self._clip_norm is None and self._scale is None) or not gradients:
            return 0.0
        norm = float(nn.utils.get_total_norm(gradients))
        factor = clip_factor(norm, math.inf if self._clip_norm is None else self._clip_norm)
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        return norm

    def collect(self) -> None:
        """The user's optimizer holds its own state."""

    def load_state(self) -> None:
        """The user's optimizer holds its own state."""
        if self._masters is not None:
            self._masters.load()

    def take_weights(self) -> None:
        """The user's model holds the weights."""

    def sync_states(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}  # one process computes: nothing is summed

    def load_sync(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """There is nothing to go on with."""

    def close(self) -> None:
        """Nothing runs between steps."""


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads meanwhile."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

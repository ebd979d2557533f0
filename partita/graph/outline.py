"""The outline of a training step: what its ops compute and move, and the memory that it takes, without a graph.

A step of plain PyTorch runs once on tensors without storage, and its ops are watched. That takes a tenth or two of the
time of `capture`, and says less: there is no graph that could be split, and what depends on the data cannot be left
out.

    peak = max over ops of the bytes of all storages that the step has made and nothing holds no more

Storages are let go when autograd and the user's code let them go, as in a real step. What ops take while they run
(`workspace`) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from partita.errors import CaptureError, PartitaError
from partita.graph import checks, torch_adapter
from partita.graph.custom_ops import replacement
from partita.graph.flops import work_of
from partita.graph.recording import StepInputs, put_stand_ins, tracing_flags
from partita.graph.standins import Substitution, watched_generators


@dataclass(frozen=True, kw_only=True)
class Outline:
    """One training step of plain PyTorch on one device.

    Args:
        works: (floating-point operations, bytes read and written) of each op that does something.
        kept_bytes: of weights, buffers and the batch.
        peak_bytes: what the step makes besides, at most at the same time.
        trained: elements of each parameter that gets a gradient.
        trained_bytes: of these parameters.
        batch_size: extent of dim 0 that the tensors of the batch share (0: none has one).
    """

    works: tuple[tuple[int, int], ...]
    kept_bytes: int
    peak_bytes: int
    trained: tuple[int, ...]
    trained_bytes: int
    batch_size: int


def outline(model: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: Any) -> Outline:
    """The outline of a step of ``model``, which is left as it was, as by `capture`.

    Args:
        model: any ``nn.Module``, in its present mode.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a real tensor with one element.
        batch: any pytree of tensors and plain values.

    Raises:
        InputError: the model, loss or batch cannot be used as given.
        CaptureError: the step cannot run without values: its control flow or shapes depend on them.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> found = outline(model, lambda model, x: model(x).square().mean(), torch.zeros(8, 4))
        >>> found.trained, found.kept_bytes, found.batch_size
        ((8, 2), 168, 8)
    """
    inputs = StepInputs.of(model, loss_fn, batch)
    with torch_adapter.new_fake_mode(), Substitution(model) as substitution, watched_generators([]), tracing_flags():
        try:
            watch, trained = _watched(model, loss_fn, inputs, substitution)
        except PartitaError:
            raise
        except Exception as error:
            raise CaptureError(
                f"The step must run on tensors without values to be outlined, but {type(error).__name__} was raised: "
                f"{error}",
                op=str(getattr(error, "func", "")) or type(error).__name__,
            ) from error
    return Outline(
        works=tuple(watch.works),
        kept_bytes=sum(tensor.nbytes for tensor in inputs.originals()),
        peak_bytes=watch.peak_bytes,
        trained=tuple(tensor.numel() for tensor in trained),
        trained_bytes=sum(tensor.nbytes for tensor in trained),
        batch_size=inputs.batch_size,
    )


def _watched(
    model: nn.Module, loss_fn: Callable[[Any, Any], Any], inputs: StepInputs, substitution: Substitution
) -> tuple[_Watch, list[torch.Tensor]]:
    """What was seen of a step, and the parameters that got a gradient."""
    *values, _ = inputs.fakes()
    standins, batch = put_stand_ins(inputs, values, substitution)
    given = [new for _, new in standins.values()]
    watch = _Watch([*given, *pytree.tree_leaves(batch)])
    with watch:
        loss = checks.check_loss(loss_fn(model, batch))
        loss.backward()
    return watch, [tensor for tensor in given if tensor.requires_grad and tensor.grad is not None]


class _Watch(TorchDispatchMode):
    """Sees every op, and how much memory is in use besides that of `given`."""

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.works: list[tuple[int, int]] = []
        self.peak_bytes = 0
        self._live_bytes = 0
        self._sizes: dict[int, int] = {}  # of storages that live, by their address
        for leaf in given:
            if isinstance(leaf, torch.Tensor):
                self._sizes[leaf.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = replacement(func)
        result = func(*args, **(kwargs or {}))
        work = work_of(func, args, kwargs or {}, result)
        if any(work):
            self.works.append(work)
        if not torch_adapter.is_view(func):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._hold(leaf)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._let_go, address)

    def _let_go(self, address: int) -> None:
        self._live_bytes -= self._sizes.pop(address)

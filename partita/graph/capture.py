"""Capture: the loss and all gradients of a training step as one functional graph of ATen ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from partita.errors import CaptureError
from partita.graph import torch_adapter
from partita.graph.assemble import assemble
from partita.graph.counters import watched_numbers
from partita.graph.graph import Graph
from partita.graph.recording import Recording, StepInputs, functionalize, lift_constants, record
from partita.graph.repeat import depends_on_state
from partita.graph.simplify import simplify
from partita.graph.standins import Substitution
from partita.graph.strides import address_entries


def capture(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    batch: Any,
    *,
    device: torch.device | str | None = None,
    wide_gradients: bool = False,
) -> Graph:
    """One training step of ``model`` as a graph: ``loss_fn(model, batch)``, all gradients, all updated buffers.

    Nothing is allocated or computed: the step runs once on tensors without storage, so the model may live on the
    ``meta`` device. The model is left as it was (weights, gradients, buffers, attributes, training flags, random
    generators); its forward hooks run, on tensors without storage.

    Args:
        model: any ``nn.Module``. It is captured in its present mode (``train()`` or ``eval()``).
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a real tensor with one element. What it closes over becomes
            part of the graph: tensors as CONSTANT inputs, everything else as it is now.
        batch: any pytree of tensors and plain values; plain values become part of the graph. Shapes are those of the
            whole (global) batch.
        device: where the graph's tensors live. Default: where the model's are; for tensors on ``meta``, the CPU.
        wide_gradients: gradients of half-precision parameters are cast to float32 where they are made, so that they are
            added up in float32.

    Returns:
        The `Graph`. Buffers, and frozen parameters, that the step updates are BUFFER inputs and outputs; such a frozen
        parameter (a moving average of another model) is no PARAMETER input. Activation checkpointing is left out:
        what is computed again is the plan's decision.

    Raises:
        InputError: the model, loss or batch cannot be used as given (empty batch, loss not a scalar, ...).
        CaptureError: the step is no single graph: control flow or shapes depend on the data, or Python state that
            the step changes influences the next step. Carries the op and the source line. Control flow that only
            checks values (``if bad(values): raise``) is left out instead, and named in `Graph.unchecked`.

    Example:
        >>> graph = capture(model, lambda model, batch: model(batch[0]).square().mean(), batch)  # doctest: +SKIP
        >>> print(graph.module.code, graph.flops)  # doctest: +SKIP
    """
    inputs = StepInputs.of(model, loss_fn, batch, device=device, wide_gradients=wide_gradients)
    with torch_adapter.new_fake_mode(), Substitution(model) as substitution:
        first = record(model, loss_fn, inputs, substitution)
        _check_repeats(model, loss_fn, inputs, substitution, first)
        lift_constants(first)
        functional = functionalize(first, inputs, _loss_dtype(first))
        address_entries(functional.module.graph, functional.labels)
        simplify(functional.module.graph)
        names = {name: substitution.name_of(tensor) or name for name, tensor in functional.constants.items()}
    return assemble(functional, inputs, names)


def _loss_dtype(recording: Recording) -> torch.dtype:
    output = next(iter(reversed(recording.module.graph.nodes)))
    loss = pytree.tree_leaves(output.args)[0]
    assert isinstance(loss, fx.Node)
    dtype: torch.dtype = loss.meta["val"].dtype
    return dtype


def _check_repeats(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    inputs: StepInputs,
    substitution: Substitution,
    first: Recording,
) -> None:
    """If the step changed attributes of the model, records it again from there: both must be the same step.

    Counters that only count and kept intermediate results pass; a hidden state that is carried to the next step, and a
    counter that anything is decided by, do not.
    """
    changed = substitution.changed_attributes()
    if not changed:
        return
    with watched_numbers(model, changed) as reads:
        second = record(model, loss_fn, inputs, substitution)
    if reads.names or depends_on_state(first, second):
        listed = ", ".join(f"'{name}'" for name in sorted(reads.names) or changed[:5])
        raise CaptureError(
            f"The training step must be the same every time, but it changes {listed} of the model, and the next step "
            "depends on it. Keep tensors that are carried from step to step in buffers (register_buffer) and "
            "update them in place; pass counters and schedules in the batch.",
            op=changed[0],
        )

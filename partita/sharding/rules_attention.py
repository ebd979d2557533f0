"""Rules of fused attention: samples, heads, and rows of the queries.

Row i of the output depends on row i of the queries alone, and on all keys and values. With a causal mask it depends on
the keys 0 .. i: the worker with rows ``a .. b`` needs the keys 0 .. b and a mask that knows about ``a``. Gradients of
keys and values are sums over the rows. (Context parallelism with gathered keys: Dubey et al., "The Llama 3 herd of
models", 2024, section 3.3.2.)
"""

from __future__ import annotations

from typing import Any

import torch

from partita.sharding.calls import OpCall, Slot
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, InputSpec, Part, Rule, register

aten = torch.ops.aten

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip


@register(*_ATTENTION, *[f"{name}_backward" for name in _ATTENTION])
def attention_rules(call: OpCall) -> list[Rule]:
    """Samples (dim 0) and heads (dim 1) are independent. Masks with extent 1 there are whole.

    An attention with dropout draws its own random numbers: whole inputs only. Outputs that are not cut by rows (seeds
    and offsets of the draw) are whole. On the CPU, rows of the queries may be cut as well (context parallelism).
    """
    if call.schema_argument("dropout_p", 0.0) != 0.0:
        return []
    leading = call.inputs[0].shape[:2]
    # With grouped-query attention keys have fewer heads than queries.
    rules = []
    for dim in (0, 1):
        extent = leading[dim]
        if extent < 2:
            continue
        inputs = [_leading_cut(spec.shape, dim, extent) for spec in call.inputs]
        tensors = [spec for spec in call.inputs if len(spec.shape) == 4]
        if dim == 1 and (any(spec.shape[1] not in (1, extent) for spec in tensors) or extent == 1):
            continue
        if dim == 1 and any(spec.shape[1] == 1 for spec in tensors[:3]):
            continue
        outputs = tuple(None if spec is None else _leading_cut(spec.shape, dim, extent) for spec in call.outputs)
        rules.append(Rule(tuple(inputs), outputs, extent))
    return rules + (_query_rules(call) if "flash_attention_for_cpu" in call.base_name else [])


def _leading_cut(shape: tuple[int, ...], dim: int, extent: int) -> Any:
    """Cut if the tensor has rows for every sample (head); row sums have three dims, everything else four."""
    return Cut(dim) if len(shape) >= 3 and shape[dim] == extent else REPLICATE


def _query_rules(call: OpCall) -> list[Rule]:
    """``(query, key, value, dropout_p, is_causal, *, attn_mask, scale) -> (output, logsumexp)`` and the backward,
    ``(grad, query, key, value, output, logsumexp, dropout_p, is_causal, *, ...) -> (gradients of query, key, value)``.

    Shapes: query ``[B, H, L, D]``, key and value ``[B, H', S, D]``, logsumexp ``[B, H, L]``.
    """
    backward = call.base_name.endswith("_backward")
    num_tensors = 6 if backward else 3
    rows = call.inputs[0].shape[2]
    if len(call.inputs[0].shape) != 4 or rows < 2:
        return []
    causal = bool(call.schema_argument("is_causal", False))
    mask = call.schema_argument("attn_mask")
    whole = (1, 2) if not backward else (2, 3)
    inputs: list[InputSpec] = [REPLICATE if place in whole else Cut(2) for place in range(num_tensors)]
    if isinstance(mask, Slot):
        if causal:
            return []
        shape = call.inputs[mask.index].shape
        inputs.append(Cut(len(shape) - 2) if len(shape) > 1 and shape[-2] == rows else REPLICATE)
    outputs = (Cut(2), PARTIAL, PARTIAL) if backward else (Cut(2), Cut(2))
    local = (_causal_backward if backward else _causal_forward) if causal else None
    return [Rule(tuple(inputs), outputs, rows, local=local)]


def _causal_mask(query: torch.Tensor, part: Part, num_keys: int) -> torch.Tensor:
    """0 where a key is seen, -infinity elsewhere, for the own rows."""
    rows = torch.arange(part.start, part.end, device=query.device).unsqueeze(1)
    keys = torch.arange(num_keys, device=query.device)
    hidden = torch.full([part.end - part.start, num_keys], float("-inf"), dtype=query.dtype, device=query.device)
    return torch.where(keys <= rows, torch.zeros_like(hidden), hidden)


def _causal_forward(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    query, key, value = tensors
    seen = min(part.end, key.shape[2])
    mask = _causal_mask(query, part, seen)
    scale = call.schema_argument("scale")
    keys = (key.narrow(2, 0, seen), value.narrow(2, 0, seen))
    return tuple(call.target(query, *keys, 0.0, False, attn_mask=mask, scale=scale))


def _causal_backward(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    grad, query, key, value, output, logsumexp = tensors
    seen = min(part.end, key.shape[2])
    mask = _causal_mask(query, part, seen)
    scale = call.schema_argument("scale")
    given = (grad, query, key.narrow(2, 0, seen), value.narrow(2, 0, seen), output, logsumexp)
    grads = call.target(*given, 0.0, False, attn_mask=mask, scale=scale)
    pads = [0, 0, 0, key.shape[2] - seen]
    return (grads[0], *(aten.constant_pad_nd.default(item, pads, 0.0) for item in grads[1:]))

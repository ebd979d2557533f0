"""Random ops with a generator of the caller's choice instead of torch's default one, drawing the same numbers.

Workers are threads of one process: were they to share torch's default generator, the numbers would depend on who
comes first. Each worker therefore owns a generator, and every random op left in a segment is called through
`with_generator`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, fx

from partita.graph.masks import bernoulli
from partita.graph.torch_adapter import OpOverload, overload_with_generator, takes_generator

aten = torch.ops.aten
_DEFAULT_GENERATOR = threading.Lock()  # held by whoever lends its state to the default generator


def _like(draw: Callable[[Tensor, Generator, tuple[Any, ...]], Tensor]) -> Callable[..., Tensor]:
    """What torch does for ``rand_like`` and friends: an empty tensor of the same layout, filled in place."""

    def op(generator: Generator, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return draw(torch.empty_like(value, **options), generator, args)

    return op


def _native_dropout(generator: Generator, value: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or value.numel() == 0:
        return value.clone(), torch.ones_like(value, dtype=torch.bool)
    mask = torch.empty(value.shape, dtype=torch.bool, device=value.device).bernoulli_(1 - p, generator=generator)
    return value.mul(mask).mul_(0.0 if p == 1 else 1 / (1 - p)), mask


def _bernoulli(generator: Generator, value: Tensor, p: float, **options: Any) -> Tensor:
    return bernoulli(value, p, generator)


_randint_like = _like(
    lambda out, generator, bounds: out.random_(*((0, *bounds) if len(bounds) == 1 else bounds), generator=generator)
)

_BY_HAND: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.p: _bernoulli,
    aten.rand_like.default: _like(lambda out, generator, _: out.uniform_(generator=generator)),
    aten.randn_like.default: _like(lambda out, generator, _: out.normal_(generator=generator)),
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like,
    aten.native_dropout.default: _native_dropout,
}


def is_random(node: fx.Node) -> bool:
    """Whether the op draws from a random generator (attention without dropout does not, whatever its tag says).

    Such ops are kept and stay in order even if nobody reads them, since each draw moves the generator.
    """
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            value = node.kwargs.get("dropout_p", argument.default_value)
            return bool(node.args[position] if position < len(node.args) else value)
    return True


def with_generator(target: Any) -> Callable[..., Any]:
    """The op as a function of a generator and its own arguments, equal in its numbers to the op on torch's default
    generator.

    Example:
        >>> with_generator(torch.ops.aten.rand_like.default)(torch.Generator().manual_seed(0), torch.zeros(2))
        tensor([0.4963, 0.7682])
    """
    if target in _BY_HAND:
        return _BY_HAND[target]
    if takes_generator(target):
        return lambda generator, *args, **options: target(*args, **{**options, "generator": generator})
    other = overload_with_generator(target)
    if other is not None:
        return lambda generator, *args, **options: other(*args, **{**options, "generator": generator})
    return _through_default_generator(target)


def _through_default_generator(target: Any) -> Callable[..., Any]:
    """For ops that know no generator: the default one takes over this worker's state for the length of the call."""

    def op(generator: Generator, *args: Any, **options: Any) -> Any:
        with _DEFAULT_GENERATOR:
            default = default_generator(generator.device)
            before = default.get_state()
            default.set_state(generator.get_state())
            try:
                return target(*args, **options)
            finally:
                generator.set_state(default.get_state())
                default.set_state(before)

    return op


def default_generator(device: torch.device) -> Generator:
    """Torch's default generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator

"""Which parameters of a module are connections between adjacent layers.

By default the weights of linear layers and convolutions and the projections of attention; embeddings stay dense, and so
does what is tied to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from partita.errors import InputError
from partita.search.connections.grain import Grain

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def connections_of(model: nn.Module, *, dense: Sequence[str], grain: Grain) -> dict[str, nn.Parameter]:
    """The parameters, by their first names. Those whose names match a pattern of `dense` are left alone.

    Raises:
        InputError: there are none, a pattern matches nothing, or a weight is not whole blocks.
    """
    found = {name: weight for name, weight in _candidates(model) if weight.requires_grad}
    for pattern in dense:
        matched = [name for name in found if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"every pattern of dense must match connections of the model, but {pattern!r} matches none of "
                f"{list(found)}"
            )
        for name in matched:
            del found[name]
    if not found:
        raise InputError(
            "the model must have connections to learn (weights of nn.Linear, nn.Conv1d to nn.Conv3d or "
            f"nn.MultiheadAttention), but {type(model).__name__} has none that are trained and not kept dense"
        )
    uneven = {name: tuple(weight.shape) for name, weight in found.items() if not grain.fits(tuple(weight.shape))}
    if uneven:
        raise InputError(
            f"weights must be whole blocks of {grain.block} (outputs, inputs), but got {uneven}. Choose another block, "
            f"or keep them dense: dense={tuple(uneven)}"
        )
    return found


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    embedded = {id(item) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
                for item in module.parameters(recurse=False)}  # fmt: skip
    first_names = {id(item): name for name, item in model.named_parameters()}
    seen: set[int] = set()
    for module in model.modules():
        names = ("weight",) if isinstance(module, _LAYERS) else ()
        for name in _PROJECTIONS if isinstance(module, nn.MultiheadAttention) else names:
            weight = getattr(module, name, None)
            if not isinstance(weight, nn.Parameter) or id(weight) in embedded or id(weight) in seen:
                continue  # a weight that is computed from others is no parameter
            seen.add(id(weight))
            yield first_names[id(weight)], weight

"""How the inputs of a step lie along the mesh axes, as the constraints ask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from partita.errors import PlanError
from partita.graph.graph import Graph, Input, InputKind, OutputKind
from partita.plan import Constraints
from partita.sharding.placement import dim_of

MIN_SHARDED_ELEMENTS = 2  # fully sharded: each worker gets at least so many of a parameter


def placed_inputs(
    graph: Graph, data: int, tensor: int, constraints: Constraints, chosen: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Input -> mesh axis -> placement text, for the inputs that are cut: those in `chosen`, and what the constraints
    ask for.

    Raises:
        PlanError: a pattern fits no input, or asks for a cut that its inputs do not have.
    """
    sizes = {"data": data, "tensor": tensor}
    found: dict[str, dict[str, str]] = {name: dict(by_axis) for name, by_axis in chosen.items()}
    items = [item for kind in (InputKind.PARAMETER, InputKind.BATCH) for item in graph.inputs_of(kind)]
    for pattern, by_axis in (constraints.inputs or {}).items():
        matching = [item for item in items if item.name == pattern or fnmatchcase(item.name, pattern)]
        if not matching:
            names = ", ".join(item.name for item in items[:6])
            raise PlanError(
                f"every pattern of Constraints.inputs must fit an input of the step, but {pattern!r} fits none; the "
                f"inputs are {names}{', ...' if len(items) > 6 else ''}"
            )
        for item in matching:
            for axis, text in by_axis.items():
                if sizes[axis] > 1 and dim_of(text) is not None:
                    _check(item, axis, text, sizes[axis])
                    found.setdefault(item.name, {})[axis] = text
    if constraints.fully_sharded and data > 1:
        trained = {output.target for output in graph.outputs_of(OutputKind.GRADIENT)}
        for item in graph.inputs_of(InputKind.PARAMETER):
            text = _sharded_text(item, data, tensor, found.get(item.name, {}))
            if text and item.name in trained and "data" not in found.get(item.name, {}):
                found.setdefault(item.name, {})["data"] = text
    return found


def _check(item: Input, axis: str, text: str, size: int) -> None:
    dim = dim_of(text)
    assert dim is not None
    if dim >= len(item.shape) or item.shape[dim] < size:
        raise PlanError(
            f"{item.name!r} must have a dim {dim} of at least {size} entries to be cut as {text} over axis {axis!r}, "
            f"but has shape {tuple(item.shape)}"
        )
    if axis == "data" and item.kind is InputKind.BATCH:
        raise PlanError(
            f"the rows of the batch are cut over the data axis as they are, but {item.name!r} is placed there; "
            'place it along "tensor"'
        )


def _sharded_text(item: Input, data: int, tensor: int, placed: dict[str, str]) -> str:
    """The first dim that is long enough and that the tensor axis leaves alone: what the workers of one process have of
    the parameter is then one block."""
    along_tensor = dim_of(placed["tensor"]) if "tensor" in placed else None
    for dim, extent in enumerate(item.shape):
        if dim != along_tensor and extent >= data and math.prod(item.shape) >= MIN_SHARDED_ELEMENTS * data * tensor:
            return f"S({dim})"
    return ""

"""A network as something whose widths can be read and changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from partita.arguments import check_number
from partita.errors import InputError
from partita.search.structure import equations, movements  # noqa: F401  (they register themselves)
from partita.search.structure.exporting import exported
from partita.search.structure.making import made
from partita.search.structure.source import Source, source_of
from partita.search.structure.tracing import Dims, Trace
from partita.search.structure.widths import Chosen, Extent, Width, free_widths, indices, positions, size_of, widths_of


@dataclass(eq=False)
class Network:
    """A module, and what its tensors are made of.

    Args:
        model: any module that `torch.export` captures; it is read as it is now (training or not), and never changed.
        args: what ``model.forward`` takes, for example. Sizes of 0 and 1 are taken for constants: give several samples.
        kwargs: its keyword arguments.

    Raises:
        InputError: the module can't be captured.

    Example:
        >>> network = Network(model, (torch.randn(8, 64),))
        >>> network.sizes
        {'0': 100, '2': 50}
        >>> smaller = network.with_units({"0": torch.arange(50)})
        >>> smaller.model, smaller.source.text
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.args, Tensor) or not isinstance(self.args, tuple):
            raise InputError(f"args must be a tuple of what the model takes, but got {type(self.args).__name__}")
        _ = self.trace

    @cached_property
    def program(self) -> ExportedProgram:
        return exported(self.model, self.args, self.kwargs)

    @cached_property
    def trace(self) -> Trace:
        trace = Trace()
        trace.read(self.program, self._first_names)
        return trace

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return parameters | dict(self.model.named_buffers(remove_duplicate=False))

    @cached_property
    def _first_names(self) -> dict[str, str]:
        """Of each name the first one of the same tensor."""
        firsts: dict[int, str] = {}
        return {name: firsts.setdefault(id(tensor), name) for name, tensor in self._state.items()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and constants that the network reads, by their first names."""
        return {name: self._state[name] if name in self._state else self.program.constants[name]
                for name in self.trace.names.values()}  # fmt: skip

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)}

    @cached_property
    def dims(self) -> dict[str, Dims]:
        """What the dims of each tensor are made of."""
        return {name: self.trace.dims[node] for node, name in self.trace.names.items()}

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """All names of each tensor, the first one first."""
        found: dict[str, list[str]] = {name: [name] for name in self.tensors}
        for name, first in self._first_names.items():
            if first in found and name != first:
                found[first].append(name)
        return found

    @cached_property
    def placeholders(self) -> dict[fx.Node, list[str]]:
        """All names of the tensor that each placeholder of the graph stands for."""
        return {node: self.aliases[name] for node, name in self.trace.names.items()}

    @cached_property
    def widths(self) -> dict[str, Width]:
        """The numbers of units that can change, by name.

        Named like the first parameter that has it in dim 0, else in another, without ".weight"; where several make up
        this dim, their places follow: "attention.qkv/0".
        """
        found: dict[str, Width] = {}
        known: set[Width] = set()
        for first in (True, False):
            for name, dims in self.dims.items():
                for dim, extent in enumerate(dims):
                    if (dim == 0) is first:
                        for label, width in _labelled(name, dim, extent):
                            if width not in known:
                                known.add(width)
                                found[label] = width
        return found

    @property
    def sizes(self) -> dict[str, int]:
        return {name: width.size for name, width in self.widths.items()}

    def width(self, name: str) -> Width:
        if name not in self.widths:
            raise InputError(
                f"a width must be one of {list(self.widths)}, but got {name!r}; explain() says why others are fixed"
            )
        return self.widths[name]

    def uses(self, name: str) -> list[tuple[str, int]]:
        """The dims (tensor, dim) that a width is a part of."""
        width = self.width(name)
        return [(tensor, dim) for tensor, dims in self.dims.items()
                for dim, extent in enumerate(dims) if width in set(widths_of(extent))]  # fmt: skip

    def outgoing(self, name: str) -> list[tuple[str, int]]:
        """Those of `uses` over which an op sums: the weights with which other units read these."""
        return [use for use in self.uses(name) if use in set(self.trace.weights)]

    def units(self, name: str, tensor: str, dim: int) -> Tensor:
        """Which unit of a width each entry of a dim belongs to; -1 where none."""
        return positions(self.dims[tensor][dim], self.width(name))

    def reads_all(self, name: str) -> list[str]:
        """Ops that read all units of a width at once, through no weights: a norm, an attention."""
        width = self.width(name)
        return list(dict.fromkeys(why for extent, why in self.trace.mixed if width in set(widths_of(extent))))

    def num_parameters(self, sizes: Mapping[str, int] | None = None) -> int:
        """Elements of its parameters, if widths had these sizes."""
        new = self.new_sizes(sizes or {})
        return sum(math.prod(size_of(extent, new) for extent in self.dims[name]) for name in self.parameters)

    def num_flops(self, sizes: Mapping[str, int] | None = None) -> int:
        """Floating-point operations of its products and convolutions for the example, forward, if widths had these
        sizes: two for each multiplication."""
        new = self.new_sizes(sizes or {})
        return sum(2 * math.prod(size_of(extent, new) for extent in extents) for extents in self.trace.products)

    def new_sizes(self, sizes: Mapping[str, int]) -> dict[Width, int]:
        for name, size in sizes.items():
            check_number(size, f"the size of {name}", least=1, whole=True)
        return {self.width(name): size for name, size in sizes.items()}

    @cached_property
    def source(self) -> Source:
        """The network as a file of plain classes."""
        return source_of(self, {})

    def with_units(self, units: Mapping[str, Tensor]) -> Network:
        """The network with these units of its widths alone.

        Args:
            units: by name of a width, indices of its units in their new order; an index may come more than once.

        Returns:
            a network whose module is made from its source.
        """
        chosen = self.chosen(units)
        new = {width: len(kept) for width, kept in chosen.items()}
        found = {name: self.selected(name, chosen) for name in self.tensors}
        model = made(source_of(self, new), found, self.model)
        return Network(model, self.args, self.kwargs)

    def chosen(self, units: Mapping[str, Tensor]) -> Chosen:
        found = {}
        for name, kept in units.items():
            width = self.width(name)
            fits = kept.ndim == 1 and len(kept) > 0 and not kept.is_floating_point() and kept.dtype != torch.bool
            if not fits or int(kept.min()) < 0 or int(kept.max()) >= width.size:
                raise InputError(
                    f"units of {name!r} must be a vector of indices from 0 to {width.size - 1}, at least one, but got "
                    f"{kept}"
                )
            found[width] = kept.long().cpu()
        return found

    def selected(self, tensor: str, chosen: Chosen) -> Tensor:
        """A tensor with the chosen units alone."""
        found = self.tensors[tensor].detach()
        for dim, extent in enumerate(self.dims[tensor]):
            if any(width in chosen for width in widths_of(extent)):
                found = found.index_select(dim, indices(extent, chosen).to(found.device))
        return found.clone()

    def explain(self) -> str:
        """A line for each width, then why other dims are fixed."""
        lines = [f"{name}: {width.size} units of {', '.join(f'{t}[{d}]' for t, d in self.uses(name))}"
                 for name, width in self.widths.items()]  # fmt: skip
        fixed = {f"{name}[{dim}]": width.fixed for name, dims in self.dims.items() for dim, extent in enumerate(dims)
                 for width in widths_of(extent) if width.fixed and width.size > 1}  # fmt: skip
        lines += [f"fixed: {place}, since {why}" for place, why in fixed.items()]
        lines += [f"{op} has no equation of widths: what it reads and makes is fixed" for op in self.trace.unknown]
        return "\n".join(lines)


def _labelled(name: str, dim: int, extent: Extent) -> list[tuple[str, Width]]:
    label = name.removesuffix(".weight") + (f"[{dim}]" if dim else "")
    widths = free_widths([extent])
    return [(f"{label}/{place}" if len(widths) > 1 else label, width) for place, width in enumerate(widths)]

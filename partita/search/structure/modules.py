"""The modules of a network: which are layers, lists or classes, and how one reaches another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import sympy
import torch
from torch import nn

from partita.search.structure.leaves import New, constructor, is_leaf, sizes_of_leaf
from partita.search.structure.scopes import Scope, calls_of, scope_of
from partita.search.structure.widths import size_of

if TYPE_CHECKING:
    from partita.search.structure.network import Network

_LISTS = (nn.ModuleList, nn.ParameterList)
_DICTS = (nn.ModuleDict, nn.ParameterDict)


class Modules:
    """The modules that a network needs.

    Args:
        new: sizes of widths that change.
        inlined: modules whose calls are written out where they happen.

    Attributes:
        root: what the network did, call by call.
        calls: of each module, "" for the network itself.
        sizes: which calls are given besides their inputs.
        paths: names of modules that run or have parameters, and those around them.
    """

    def __init__(self, network: Network, new: New, inlined: frozenset[str]) -> None:
        self.network, self.trace, self.new = network, network.trace, new
        self._leaves: dict[str, bool] = {}
        self.calls: dict[str, list[Scope]] = {}
        self.sizes: dict[Scope, list[sympy.Expr]] = {}
        self.root = self._scopes(inlined)
        self.calls |= calls_of(self.root)
        self.paths = {""}
        names = [name for aliases in network.aliases.values() for name in aliases]
        for path in (*self.calls, *(name.rpartition(".")[0] for name in names)):
            while path:
                self.paths.add(path)
                path = path.rpartition(".")[0]

    def _scopes(self, inlined: frozenset[str]) -> Scope:
        """Calls of layers that take or give several tensors are written out as well."""
        while True:
            root = scope_of(self.network.program, self.network.placeholders, inlined)
            odd = {scope.path for scope in root.scopes() if scope.path and is_leaf(self.module(scope.path))
                   and (len(scope.inputs) != 1 or len(scope.outputs) != 1)}  # fmt: skip
            if not odd:
                return root
            inlined |= odd

    def module(self, path: str) -> nn.Module:
        return self.network.model.get_submodule(path)

    def is_leaf(self, path: str) -> bool:
        """Whether it is a layer that its constructor makes: one that runs (else others use its weights, whose sizes say
        less than its own ops), or a linear one."""
        if path not in self._leaves:
            self._leaves[path] = bool(path) and is_leaf(self.module(path))
        return self._leaves[path] and (path in self.calls or isinstance(self.module(path), nn.Linear))

    def is_sequence(self, path: str) -> bool:
        """Whether it is an `nn.Sequential` that calls its modules one after the other, and nothing else."""
        if type(self.module(path)) is not nn.Sequential:
            return False
        if not all(name.isdigit() for name, _ in self.module(path).named_children()):
            return False
        return all(self._is_chain(scope) for scope in self.calls.get(path, ()))

    def _is_chain(self, scope: Scope) -> bool:
        if len(scope.inputs) != 1 or len(scope.outputs) != 1:
            return False
        value, last = scope.inputs[0], -1
        for item in scope.body:
            if not isinstance(item, Scope) or item.inputs != [value] or len(item.outputs) != 1:
                return False
            name = item.path.removeprefix(f"{scope.path}.")
            if not name.isdigit() or int(name) <= last:
                return False
            value, last = item.outputs[0], int(name)
        return scope.outputs == [value]

    def takes_sizes(self, path: str) -> bool:
        """Whether its call may be given sizes: not if a sequence makes it."""
        return bool(path) and not self.is_sequence(path.rpartition(".")[0])

    def is_class(self, path: str) -> bool:
        """Whether it is written as a class of its own."""
        holder = type(self.module(path)) in (*_LISTS, *_DICTS)
        return not path or not (holder or self.is_leaf(path) or self.is_sequence(path))

    def length_of_list(self, path: str) -> int:
        found = self.module(path)
        return len(found) if type(found) is nn.ModuleList else 0

    def children(self, path: str) -> list[str]:
        """The modules right inside it that are needed."""
        inside = [f"{path}.{name}" if path else name for name, _ in self.module(path).named_children()]
        return [child for child in inside if child in self.paths]

    def attribute(self, target: str, start: str) -> str:
        """How `forward` of the module ``start`` reaches a module or a parameter inside of it."""
        text, path = "self", start
        for token in (target.removeprefix(f"{start}.") if start else target).split("."):
            holder = self.module(path)
            if type(holder) in _DICTS:
                text += f'["{token}"]'
            elif token.isdigit():
                listed = type(holder) in _LISTS or self.is_sequence(path)
                text += f"[{token}]" if listed else f'.get_submodule("{token}")'
            else:
                text += f".{token}"
            path = f"{path}.{token}" if path else token
            if path not in self.paths:
                path = start  # a parameter: the last one
        return text

    # -- constructors -----------------------------------------------------------------------------------------------

    def constructor(self, path: str, of_class: Callable[[str], str]) -> str:
        """The expression that makes a module. ``of_class`` gives those of modules that are classes here."""
        module = self.module(path)
        if path not in self.paths:
            return constructor(module, {}) if is_leaf(module) else "nn.Identity()"  # type: ignore[return-value]
        if self.is_leaf(path):
            return self._layer(path)
        if self.is_class(path):
            return of_class(path)
        name = type(module).__name__
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            made = [(key, self.parameter(f"{path}.{key}")) for key in self._own_tensors(path)]
        else:
            made = self.made_children(path, of_class)
        if type(module) in _DICTS:
            return f"nn.{name}({{{', '.join(f'{key!r}: {text}' for key, text in made)}}})"
        inner = ", ".join(text for _, text in made)
        return f"nn.Sequential({inner})" if isinstance(module, nn.Sequential) else f"nn.{name}([{inner}])"

    def made_children(self, path: str, of_class: Callable[[str], str]) -> list[tuple[str, str]]:
        """Names and constructors of all modules right inside."""
        prefix = f"{path}." if path else ""
        names = [name for name, _ in self.module(path).named_children()]
        return [(name, self.constructor(prefix + name, of_class)) for name in names]

    def _layer(self, path: str) -> str:
        nodes = [node for scope in self.calls.get(path, ()) for node in scope.nodes()]
        attributes = sizes_of_leaf(nodes, self.trace, self.new) if nodes else self._sizes_by_tensors(path)
        text = constructor(self.module(path), attributes)
        assert text is not None
        kinds = {tensor.dtype for tensor in self.module(path).parameters() if tensor.is_floating_point()}
        return text if kinds <= {torch.float32} else f"{text}.to({kinds.pop()})"

    def _sizes_by_tensors(self, path: str) -> dict[str, int]:
        """Of a linear layer whose weight others use."""
        dims = self.network.dims.get(f"{path}.weight")
        if dims is None or not isinstance(self.module(path), nn.Linear):
            return {}
        return {"in_features": size_of(dims[1], self.new), "out_features": size_of(dims[0], self.new)}

    def tensors(self, path: str) -> dict[str, str]:
        """The module's own parameters and buffers, by attribute, and the text that makes them."""
        own = self._own_tensors(path)
        return {attribute: self.parameter(f"{path}.{attribute}" if path else attribute) for attribute in own}

    def _own_tensors(self, path: str) -> list[str]:
        prefix = f"{path}." if path else ""
        names = [name.removeprefix(prefix) for name in self.network.tensors if name.startswith(prefix)]
        return [name for name in names if "." not in name]

    def parameter(self, name: str) -> str:
        tensor, dims = self.network.tensors[name], self.network.dims[name]
        shape = ", ".join(str(size_of(extent, self.new)) for extent in dims) or "()"
        dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
        made = f"torch.zeros({shape}{dtype})"
        return f"nn.Parameter({made})" if isinstance(tensor, nn.Parameter) else made

    @cached_property
    def tied(self) -> dict[str, str]:
        """Names of parameters that are others', and whose."""
        return {name: aliases[0] for aliases in self.network.aliases.values() for name in aliases[1:]}

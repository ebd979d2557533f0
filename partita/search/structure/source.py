"""A network as a source file: plain classes of `torch.nn`, without partita.

Every module with code of its own becomes a class; layers of `torch.nn` are made by their constructors. Modules whose
classes differ in numbers alone share one, which takes these numbers as arguments.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch.export.graph_signature import InputKind

from partita.errors import InputError
from partita.search.structure.bodies import Unwritten, written
from partita.search.structure.leaves import New
from partita.search.structure.modules import Modules

if TYPE_CHECKING:
    from partita.search.structure.network import Network

_NUMBER = re.compile(r"""(?<![\w."'])\d+(?![\w."'])""")
LONGEST_LINE = 100
_RESERVED = {"nn", "F", "torch", "namedtuple", "load"}


@dataclass(frozen=True)
class Source:
    """A file's text, and its class that is the network."""

    text: str
    name: str


def source_of(network: Network, new: New) -> Source:
    """A file with ``network``, its widths of ``new`` sizes.

    Raises:
        InputError: something can't be written.
    """
    inlined: frozenset[str] = frozenset()
    while True:
        try:
            return _File(Modules(network, new, inlined)).source()
        except Unwritten as error:
            if not error.path:
                raise InputError(
                    "sizes inside the network must be those of its inputs' dims, but some are not; give inputs whose "
                    "dims are not products of other sizes"
                ) from None
            inlined |= {error.path}


@dataclass
class _Class:
    """One class, with its numbers as they are in one module."""

    base: str
    init: list[str]
    forward: list[str]
    path: str
    parent: str = "nn.Module"

    def numbers(self) -> list[str]:
        return _NUMBER.findall("\n".join((*self.init, *self.forward)))

    def key(self) -> str:
        return self.base + "\n" + _NUMBER.sub("#", "\n".join((*self.init, *self.forward)))


class _File:
    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._made: dict[str, str] = {}  # constructor of a module that is a class, by path
        self._texts: list[str] = []
        self._tuples: dict[str, list[str]] = {}
        self._names: set[str] = set(_RESERVED)

    def source(self) -> Source:
        for level in self._levels():
            for group in self._groups(level):
                self._write(group)
        head = ["from collections import namedtuple", ""] if self._tuples else []
        head += ["import torch", "from torch import nn"]
        if any("F." in text for text in self._texts):
            head.append("from torch.nn import functional as F")
        head += ["", *(f'{name} = namedtuple("{name}", {fields!r})' for name, fields in self._tuples.items())]
        text = "\n".join(head).rstrip() + "\n\n\n" + "\n\n\n".join(self._texts) + "\n"
        return Source(text, self._made[""].removesuffix("()"))

    def _levels(self) -> list[list[str]]:
        """Modules that are classes, those without others inside first."""
        heights: dict[str, int] = {}

        def height(path: str) -> int:
            inner = max((height(child) for child in self._modules.children(path)), default=-1)
            if not self._modules.is_class(path):
                return inner
            heights[path] = inner + 1
            return inner + 1

        height("")
        heights[""] = max(heights.values()) + 1
        return [[path for path in heights if heights[path] == level] for level in sorted(set(heights.values()))]

    def _groups(self, paths: list[str]) -> Iterator[list[_Class]]:
        groups: dict[str, list[_Class]] = {}
        for path in paths:
            made = self._class(path)
            groups.setdefault(made.key(), []).append(made)
        yield from groups.values()

    # -- one class --------------------------------------------------------------------------------------------------

    def _class(self, path: str) -> _Class:
        module = self._modules.module(path)
        if not path and self._modules.is_sequence(path):
            return self._sequence()
        init = ["super().__init__()"]
        init += self._tensors(path)
        for child in self._modules.children(path):
            name, text = child.rpartition(".")[2], self._modules.constructor(child, self._made.__getitem__)
            init.append(f'self.add_module("{name}", {text})' if name.isdigit() else f"self.{name} = {text}")
        if path:
            forwards = {"\n".join(self._forward(path, at)) for at in range(len(self._modules.calls.get(path, ())))}
            if len(forwards) > 1:
                raise Unwritten(path)
            forward = next(iter(forwards)).split("\n") if forwards else []
        else:
            init += [f"self.{name} = self.{first}" for name, first in self._modules.tied.items()]
            init += self._frozen()
            forward = self._root_forward()
        return _Class(type(module).__name__, init, forward, path)

    def _sequence(self) -> _Class:
        """The whole network is a sequence."""
        made = self._modules.made_children("", self._made.__getitem__)
        return _Class("Network", [f"super().__init__({', '.join(text for _, text in made)})"], [], "", "nn.Sequential")

    def _frozen(self) -> list[str]:
        names = [name for name, value in self._modules.network.parameters.items() if not value.requires_grad]
        return [f"for name in {names!r}:", "    self.get_parameter(name).requires_grad_(False)"] if names else []

    def _tensors(self, path: str) -> list[str]:
        """The module's own parameters, then its buffers."""
        parameters, buffers = [], []
        for name, text in self._modules.tensors(path).items():
            if text.startswith("nn.Parameter"):
                parameters.append(f"self.{name} = {text}")
            else:
                buffers.append(f'self.register_buffer("{name}", {text})')
        return parameters + buffers

    def _forward(self, path: str, at: int) -> list[str]:
        scope = self._modules.calls[path][at]
        body = written(scope, self._modules)
        self._modules.sizes[scope] = body.sizes
        results = [f"return {', '.join(body.results)}"] if body.results else []
        return [f"def forward({', '.join(['self', *body.parameters])}):", *(f"    {line}" for line in body.lines),
                *(f"    {line}" for line in results)]  # fmt: skip

    def _root_forward(self) -> list[str]:
        network, scope = self._modules.network, self._modules.root
        texts = _input_texts(network)
        body = written(scope, self._modules, [texts.get(node.name, "") for node in scope.inputs])
        outputs = iter(body.results)
        values = {node.name: text for node, text in zip(scope.outputs, outputs, strict=True)}
        results = [self._result(spec.arg, values, texts) for spec in network.program.graph_signature.output_specs
                   if spec.kind.name == "USER_OUTPUT"]  # fmt: skip
        assert network.program.call_spec.out_spec is not None
        result = pytree.tree_unflatten(results, network.program.call_spec.out_spec)
        self._tuples = _named_tuples(result)
        head = f"def forward({', '.join(['self', *_signature(network)])}):"
        return [head, *(f"    {line}" for line in body.lines), f"    return {_literal(result)}"]

    def _result(self, argument: Any, values: dict[str, str], inputs: dict[str, str]) -> str:
        name = getattr(argument, "name", None)
        if name in values:
            return values[name]
        if name in inputs:
            return inputs[name]
        if hasattr(argument, "value"):
            return repr(argument.value)
        named = {node.name: target for node, target in self._modules.trace.names.items()}
        if name in named:
            return self._modules.attribute(named[name], "")
        raise InputError(f"results must be tensors or constants to be written, but one is {argument}")

    # -- merging ----------------------------------------------------------------------------------------------------

    def _write(self, group: list[_Class]) -> None:
        """One class for all of them, with the numbers in which they differ as arguments."""
        name = self._class_name(group[0].base)
        columns = list(zip(*(made.numbers() for made in group), strict=True))
        attributes = set(re.findall(r"self\.(\w+) =|register_buffer\(\"(\w+)", "\n".join(group[0].init)))
        attributes = {name for pair in attributes for name in pair}
        names: dict[tuple[str, ...], str] = {}
        places: dict[int, str] = {}
        for place, (column, base) in enumerate(zip(columns, _labels(group[0]), strict=True)):
            if len(set(column)) > 1:
                if column not in names:
                    names[column] = _unlike(base, {*names.values(), *attributes})
                places[place] = names[column]
        init, used = _replaced(group[0].init, places, 0, "")
        forward, _ = _replaced(group[0].forward, places, used, "self.")
        in_forward = [argument for argument in names.values() if any(f"self.{argument}" in line for line in forward)]
        init += [f"self.{argument} = {argument}" for argument in in_forward]
        lines = [f"class {name}({group[0].parent}):", f"    def __init__({', '.join(['self', *names.values()])}):",
                 *(f"        {inner}" for line in init for inner in _wrapped(line))]  # fmt: skip
        if forward:
            lines += ["", *(f"    {line}" for line in forward)]
        self._texts.append("\n".join(lines))
        for at, made in enumerate(group):
            arguments = ", ".join(f"{argument}={column[at]}" for column, argument in names.items())
            self._made[made.path] = f"{name}({arguments})"

    def _class_name(self, base: str) -> str:
        name = _unlike(base, self._names)
        self._names.add(name)
        return name


def _unlike(base: str, others: set[str]) -> str:
    name, count = base, 1
    while name in others:
        count += 1
        name = f"{base}_{count}"
    return name


def _wrapped(line: str) -> list[str]:
    """A long call with a line for each argument."""
    if len(line) <= LONGEST_LINE or not line.endswith(")"):
        return [line]
    depth, commas = 0, []
    for start in range(len(line) - 1, -1, -1):  # back to the parenthesis that the last one closes
        depth += (line[start] in ")]}") - (line[start] in "([{")
        if depth == 0:
            break
        if line[start] == "," and depth == 1:
            commas.append(start)
    bounds = [start, *reversed(commas), len(line) - 1]
    parts = [line[a + 1 : b].strip() for a, b in itertools.pairwise(bounds)]
    return [line[: start + 1], *(f"    {part}," for part in parts), ")"]


def _labels(made: _Class) -> list[str]:
    """A name for each number: that of the attribute which it makes, and of the argument."""
    found = []
    for line in made.init:
        attribute = re.match(r"self\.(\w+) =", line)
        for match in _NUMBER.finditer(line):
            argument = re.search(r"(\w+)=\(?$", line[: match.start()])
            word = argument[1] if argument else "size"
            of_layer = "= nn." in line or "zeros(" in line  # else an argument of one of these classes
            parts = [attribute[1] if attribute else "own", word] if of_layer else [word]
            found.append("_".join(parts))
    return found + ["size" for line in made.forward for _ in _NUMBER.finditer(line)]


def _replaced(lines: list[str], places: dict[int, str], start: int, prefix: str) -> tuple[list[str], int]:
    counter = iter(range(start, 10**9))
    last = start

    def word(match: re.Match[str]) -> str:
        nonlocal last
        place = next(counter)
        last = place + 1
        return f"{prefix}{places[place]}" if place in places else match[0]

    return [_NUMBER.sub(word, line) for line in lines], last


# -- inputs and results of the network --------------------------------------------------------------------------------


def _signature(network: Network) -> list[str]:
    found: list[str] = []
    for parameter in inspect.signature(network.model.forward).parameters.values():
        given = len(found) < len(network.args) or parameter.name in network.kwargs
        if parameter.kind is parameter.VAR_POSITIONAL:
            found.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            found += [name for name in network.kwargs if name not in found]
        elif given:
            found.append(parameter.name)
    return found


def _input_texts(network: Network) -> dict[str, str]:
    """How each of the network's inputs is read, by the name of its placeholder."""
    names = [spec.arg.name for spec in network.program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    signature = _signature(network)
    found = {}
    paths, _ = pytree.tree_flatten_with_path((network.args, dict(network.kwargs)))
    for name, (path, _) in zip(names, paths, strict=True):
        container, place, *inner = path
        assert isinstance(container, pytree.SequenceKey)
        if isinstance(place, pytree.MappingKey):
            found[name] = str(place.key) + "".join(map(str, inner))
            continue
        assert isinstance(place, pytree.SequenceKey)
        first = signature[min(place.idx, len(signature) - 1)]
        if first.startswith("*"):
            inner, first = [pytree.SequenceKey(place.idx - len(signature) + 1), *inner], first[1:]
        found[name] = first + "".join(map(str, inner))
    return found


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return value
    if type(value) is tuple:
        return ", ".join(map(_literal, value)) if len(value) > 1 else f"({_literal(value[0])},)"
    if type(value) is list:
        return f"[{', '.join(map(_literal, value))}]"
    if type(value) is dict:
        return f"{{{', '.join(f'{key!r}: {_literal(item)}' for key, item in value.items())}}}"
    names, items = _fields(value)
    return f"{type(value).__name__}({', '.join(f'{name}={_literal(items[name])}' for name in names)})"


def _fields(value: Any) -> tuple[list[str], dict[str, Any]]:
    """Of a named tuple, a data class or a mapping with attributes."""
    items = value._asdict() if hasattr(value, "_asdict") else dict(value) if hasattr(value, "keys") else vars(value)
    return [name for name, item in items.items() if item is not None], items


def _named_tuples(value: Any) -> dict[str, list[str]]:
    """Names and fields of the classes in a result that a file of its own must define."""
    if isinstance(value, str) or value is None:
        return {}
    if type(value) in (tuple, list, dict):
        inner = value.values() if isinstance(value, dict) else value
        return {name: fields for item in inner for name, fields in _named_tuples(item).items()}
    names, items = _fields(value)
    found = {name: fields for item in names for name, fields in _named_tuples(items[item]).items()}
    return found | {type(value).__name__: names}

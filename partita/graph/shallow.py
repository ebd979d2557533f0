"""Shallow capture: a deep model's step from a copy in which repeated blocks are few, so that depth costs nothing.

Members of a list of modules (`ModuleList`, `Sequential`, `ModuleDict`) are of one *kind* if they have equal classes,
attributes, children and tensors' shapes. A copy of the module tree, which shares all tensors with the user's, keeps the
first two members of each kind (and the last, if members know their own position), and is captured instead. The members
kept of one kind must then run the same ops; where they do not, or the copy does not run, the whole model is captured
and `ShallowCapture.reason` says why.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from partita.errors import CaptureError, InputError
from partita.graph.capture import capture
from partita.graph.graph import Graph, OpInfo, Phase

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_NUM_KEPT = 2  # of one kind: the second has a neighbour of its own kind, and proves that the first was no exception
_DEPTH_NAME = re.compile(r"layer|depth|block|stage", re.IGNORECASE)
_MAX_DEPTH = 4  # of attributes inside attributes that are compared


@dataclass(frozen=True)
class Members:
    """The members of one list of modules, in the user's model.

    Attributes:
        container: path of the list.
        paths: of all members, in order.
        kinds: of each member, numbered within the list from 0.
        captured: path of a kept member in the captured graph -> its path in the user's model.
    """

    container: str
    paths: tuple[str, ...]
    kinds: tuple[int, ...]
    captured: Mapping[str, str]

    def captured_of(self, kind: int) -> tuple[str, ...]:
        """Paths in the captured graph of the kept members of ``kind``."""
        kind_of = dict(zip(self.paths, self.kinds, strict=True))
        return tuple(path for path, original in self.captured.items() if kind_of[original] == kind)

    def count(self, kind: int) -> int:
        return self.kinds.count(kind)


@dataclass(frozen=True)
class ShallowCapture:
    """A graph of few blocks, and what it stands for.

    Attributes:
        graph: of the copy (or of the whole model).
        lists: the lists of modules whose members are blocks.
        reason: why the whole model was captured; "" if the copy was.
    """

    graph: Graph
    lists: tuple[Members, ...]
    reason: str


def shallow_capture(model: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: Any) -> ShallowCapture:
    """The training step of ``model``, captured with few members of every kind of repeated block.

    The user's model is neither changed nor copied: the copy of its module tree shares all tensors.

    Raises:
        CaptureError, InputError: as `capture`, from the whole model.

    Example:
        >>> shallow = shallow_capture(model, loss_fn, batch)  # doctest: +SKIP
        >>> shallow.lists[0].count(0), len(shallow.lists[0].captured)  # doctest: +SKIP
        (96, 2)
    """
    lists = list(_module_lists(model))
    if not any(_kept(kinds, _knows_position(items)) != list(range(len(items))) for _, items, kinds in lists):
        return ShallowCapture(capture(model, loss_fn, batch), tuple(_whole(*found) for found in lists), "")
    reason = ""
    for patched in (False, True):
        try:
            small, described = _shortened(model, lists, patched)
            graph = capture(small, loss_fn, batch)
        except (CaptureError, InputError, IndexError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            reason = reason or f"a copy with fewer blocks does not run ({type(error).__name__}: {error})"
            continue
        differing = _differing(graph, described)
        if not differing:
            return ShallowCapture(graph, described, "")
        reason = f"blocks that look equal run different ops ({differing})"
    return ShallowCapture(capture(model, loss_fn, batch), tuple(_whole(*found) for found in lists), reason)


# -- which members are of one kind ---------------------------------------------------------------------------------

_List = tuple[str, list[tuple[str, nn.Module]], list[int]]  # path, children by name, kind of each


def _module_lists(model: nn.Module) -> Iterator[_List]:
    """Outermost lists of modules with repeated members that have parameters."""

    def walk(path: str, module: nn.Module) -> Iterator[_List]:
        children = [(name, child) for name, child in module.named_children() if child is not None]
        if isinstance(module, _LISTS) and len(module._modules) == len(children):  # no child twice
            kinds = _kinds([child for _, child in children])
            trained = [any(True for _ in child.parameters()) for _, child in children]
            if len(children) > 1 and all(trained) and max(Counter(kinds).values()) > 1:
                yield path, children, kinds
                return
        for name, child in children:
            yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", model)


def _kinds(members: Sequence[nn.Module]) -> list[int]:
    seen: dict[str, int] = {}
    return [seen.setdefault(_description(member, index), len(seen)) for index, member in enumerate(members)]


def _description(member: nn.Module, index: int) -> str:
    """Classes, attributes and shapes of a member and all below; a number equal to its position is written as such."""
    parts: list[object] = []
    for path, module in member.named_modules():
        parts.append((path, type(module).__module__, type(module).__qualname__, module.training))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                parts.append((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
        for name, value in sorted(module.__dict__.items()):
            if name not in _OWN:
                parts.append((name, "<position>" if _is_position(name, value, index) else _value_text(value)))
    return repr(parts)


def _is_position(name: str, value: object, index: int) -> bool:
    named = name.endswith(("idx", "index", "_id", "number", "layer_num")) or name in ("layer", "depth", "i")
    return type(value) is int and named and value in (index, index + 1)


def _value_text(value: object, depth: int = 0) -> str:
    """A text that is equal for equal values; objects that cannot be looked into are equal only to themselves."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}{value.dtype}"
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__}{[_value_text(item, depth + 1) for item in value]}"
    if depth < _MAX_DEPTH and isinstance(value, dict):
        return f"dict{[(str(key), _value_text(item, depth + 1)) for key, item in value.items()]}"
    if isinstance(value, functools.partial):
        return f"partial{_value_text([value.func, value.args, value.keywords], depth + 1)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return f"{type(value).__qualname__}@{id(value)}"


def _knows_position(items: Sequence[tuple[str, nn.Module]]) -> bool:
    """Whether any member holds a number that is its position, by which it might behave differently."""
    return any(
        _is_position(name, value, index)
        for index, (_, member) in enumerate(items)
        for module in member.modules()
        for name, value in module.__dict__.items()
    )


def _kept(kinds: Sequence[int], with_last: bool) -> list[int]:
    """Positions of the members that the copy keeps."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds):
        places[kind].append(place)
    kept = {place for of_kind in places.values() for place in of_kind[:_NUM_KEPT]}
    if with_last:
        kept |= {of_kind[-1] for of_kind in places.values()}
    return sorted(kept)


# -- the copy ------------------------------------------------------------------------------------------------------


def _shortened(model: nn.Module, lists: Sequence[_List], patched: bool) -> tuple[nn.Module, tuple[Members, ...]]:
    """A copy of the module tree with the kept members only; with ``patched``, numbers that tell the depth follow."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = [_kept(kinds, _knows_position(items)) for _, items, kinds in lists]
    for (_, items, _), places in zip(lists, kept, strict=True):
        for place in set(range(len(items))) - set(places):
            memo[id(items[place][1])] = items[place][1]  # dropped below: need not be copied
    small = copy.deepcopy(model, memo)
    described = []
    for (path, items, kinds), places in zip(lists, kept, strict=True):
        container = small.get_submodule(path)
        members = list(container._modules.items())
        container._modules.clear()
        captured = {}
        for new, place in enumerate(places):
            name = members[place][0] if isinstance(container, nn.ModuleDict) else str(new)
            container._modules[name] = members[place][1]
            captured[_join(path, name)] = _join(path, items[place][0])
        described.append(Members(path, tuple(_join(path, name) for name, _ in items), tuple(kinds), captured))
        if patched:
            _patch_depth(small, len(items), len(places))
    return small, tuple(described)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _patch_depth(model: nn.Module, old: int, new: int) -> None:
    """Numbers named like a depth and equal to the list's length, in modules and their plain configuration objects."""
    seen: set[int] = set()
    for module in model.modules():
        for holder in (module, *(value for value in module.__dict__.values() if hasattr(value, "__dict__"))):
            if id(holder) in seen or isinstance(holder, type):
                continue
            seen.add(id(holder))
            for name, value in list(vars(holder).items()):
                if type(value) is int and value == old and _DEPTH_NAME.search(name):
                    vars(holder)[name] = new


def _whole(path: str, items: list[tuple[str, nn.Module]], kinds: list[int]) -> Members:
    paths = tuple(_join(path, name) for name, _ in items)
    return Members(path, paths, tuple(kinds), {name: name for name in paths})


# -- the check -----------------------------------------------------------------------------------------------------


def _differing(graph: Graph, lists: Sequence[Members]) -> str:
    """The first members of one kind whose ops differ, as text; "" if all are alike."""
    owner = {path: path for members in lists for path in members.captured}
    ops: dict[str, list[str]] = defaultdict(list)
    for node, info in graph.ops():
        path = owning_member(info, owner)
        if path:
            ops[path].append(_op_text(node, info, path))
    for members in lists:
        for kind in sorted(set(members.kinds)):
            paths = members.captured_of(kind)
            for path in paths[1:]:
                if not same_ops(ops[paths[0]], ops[path]):
                    return f"'{members.captured[paths[0]]}' and '{members.captured[path]}'"
    return ""


def same_ops(first: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two members run the same ops.

    What adds up gradients may be fewer at the ends of a chain, and the first member may have fewer backward ops: a
    model's inputs need no gradient.
    """
    if list(first) == list(other):
        return True
    counts = [Counter(text for text in ops if "aten.add.Tensor" not in text) for ops in (first, other)]
    only_first, only_other = counts[0] - counts[1], counts[1] - counts[0]
    return not only_first and all(text.startswith("b ") for text in only_other)


def owning_member(info: OpInfo, members: Mapping[str, str]) -> str:
    """The member in which an op was called, "" if in none."""
    path = info.module
    while path:
        if path in members:
            return path
        path = path.rpartition(".")[0]
    return ""


def _op_text(node: fx.Node, info: OpInfo, path: str) -> str:
    values = node.meta["val"]
    items = values if isinstance(values, (tuple, list)) else (values,)
    shapes = [(tuple(v.shape), v.dtype) for v in items if isinstance(v, torch.Tensor)]
    phase = "f" if info.phase is Phase.FORWARD else "b"
    return f"{phase} {node.target} {info.module[len(path) :]} {shapes}"

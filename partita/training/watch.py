"""Sees what the user changes between steps, outside of the graph that was captured.

A captured graph is fixed: ``model.eval()``, a frozen layer, a coefficient that ``loss_fn`` reads from a global, a
weight tensor that is exchanged - plain PyTorch would follow each of them in the next step, the graph would not. `Watch`
takes a cheap picture of everything of the kind that the step can read, and tells before every step what has changed:

* of every module: its submodules, its training mode and its plain attributes (numbers, strings, flags);
* of every parameter and buffer: which tensor it is, where its values lie, and whether it is trained;
* of ``loss_fn`` and of the functions and forward methods of the user's that it can reach: numbers, strings, flags and
  tensors in closures, defaults, globals, and containers and simple objects there;
* of the optimizer: its parameters and its step hooks; and whether autocast is on.

What is reached in other ways (a file, an attribute of an object in a container of objects) is not seen.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partita.training.torch_adapter import has_own_step

Picture = dict[str, Any]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LIBRARIES = ("site-packages", "dist-packages", str(Path(torch.__file__).parent), str(Path(types.__file__).parent))
MAX_FUNCTIONS = 200
MAX_ITEMS = 100  # of a container; larger ones count by their identity and length


@dataclass(frozen=True)
class Change:
    """What differs: names for people, and whether tensors or the optimizer are concerned, or only plain values."""

    names: tuple[str, ...]
    structural: bool


class Watch:
    """The picture of a model, its loss and its optimizer, and what has changed since.

    Example:
        >>> watch = Watch(model, loss_fn, optimizer)
        >>> model.eval()
        >>> watch.changes().names
        ('model is in evaluation mode',)
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], optimizer: torch.optim.Optimizer) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._ignored: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """Take the state of now as the one to compare with."""
        self._modules = list(self._model.named_modules())
        self._functions = list(_functions(self._loss_fn, self._modules))
        self._remember()
        self._structure, self._values = self._take_structure(), self._take_values()

    def changes(self) -> Change | None:
        """What differs from the last picture; None if nothing does."""
        if self._is_same():
            return None
        now = Watch(self._model, self._loss_fn, self._optimizer)
        structural = _differing(self._structure, now._structure)
        names = [*structural, *_differing(self._values, now._values)]
        names = [name for name in names if name not in self._ignored]
        if not names:
            self.renew()  # other objects that are equal: compare with these from now on
            return None
        return Change(tuple(names), bool(structural))

    def accept(self) -> None:
        """Take the state of now as the one to compare with. In it, values that had no part so far may have one."""
        self._ignored.clear()
        self.renew()

    def ignores(self, change: Change) -> bool:
        return self._ignored.issuperset(change.names)

    @property
    def token(self) -> str:
        """Equal for two pictures in which nothing differs but what is ignored."""
        values = {name: value for name, value in self._values.items() if name not in self._ignored}
        return repr((self._structure, values))

    def ignore(self, change: Change) -> None:
        """These plain values turned out to have no part in the step: do not look at them again."""
        self._ignored.update(change.names)
        self.renew()

    def _remember(self) -> None:
        """What the quick comparison looks at: almost always nothing has changed, and it is made in every step."""
        dicts = [
            held
            for _, module in self._modules
            for held in (module.__dict__, module._modules, module._parameters, module._buffers, *_hooks(module))
        ]
        self._empty, self._filled = [held for held in dicts if not held], [held for held in dicts if held]
        self._lengths = list(map(len, self._filled))
        attributes = [(module.__dict__, name) for _, module in self._modules for name in _plain_names(module.__dict__)]
        own = {id(module.__dict__) for _, module in self._modules}
        parts = [(held, name) for held in self._filled if id(held) not in own for name in held]
        self._entries = _Entries([*attributes, *parts])
        self._tensors = [
            tensor
            for _, module in self._modules
            for held in (module._parameters, module._buffers)
            for tensor in held.values()
            if tensor is not None and _has_place(tensor)
        ]
        self._places, self._trained = list(map(_PLACE, self._tensors)), list(map(_TRAINED, self._tensors))
        self._num_hooks = [len(hooks or ()) for hooks in map(_TENSOR_HOOKS, self._tensors)]
        self._variables = _Variables([function for _, function in self._functions])
        self._deep = [(value, seen) for value in self._variables.values() if isinstance(seen := _seen(value, 2), list)]
        self._groups = [list(group["params"]) for group in self._optimizer.param_groups]
        self._rest = self._take_rest()

    def _is_same(self) -> bool:
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._lengths
            and self._entries.are_same()
            and self._are_tensors_same()
            and self._variables.are_same()
            and all(_seen(value, 2) == seen for value, seen in self._deep)
            and _are_groups_same(self._groups, self._optimizer)
            and self._take_rest() == self._rest
        )

    def _are_tensors_same(self) -> bool:
        places, trained = list(map(_PLACE, self._tensors)), list(map(_TRAINED, self._tensors))
        if places != self._places or trained != self._trained:
            return False
        hooks = list(map(_TENSOR_HOOKS, self._tensors))
        return not (any(hooks) or any(self._num_hooks)) or [len(one or ()) for one in hooks] == self._num_hooks

    def _take_rest(self) -> tuple[Any, ...]:
        return (has_own_step(self._optimizer), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))

    def _take_structure(self) -> Picture:
        """Tensors by identity, place and whether they are trained; modules by identity; the optimizer."""
        picture: Picture = {}
        for name, module in self._modules:
            tensors = [*module._parameters.values(), *module._buffers.values()]
            picture[f"the tensors of {name or 'the model'}"] = [
                (id(t), t.data_ptr(), t.requires_grad, len(t._backward_hooks or ()))
                for t in tensors
                if t is not None and _has_place(t)
            ]
            parts = (module._modules, *_hooks(module))
            picture[f"the parts or hooks of {name or 'the model'}"] = [[id(m) for m in held.values()] for held in parts]
        picture["the optimizer's parameters"] = [[id(item) for item in group] for group in self._groups]
        picture["the optimizer's step hooks"] = self._rest[0]
        return picture

    def _take_values(self) -> Picture:
        picture: Picture = {"autocast": self._rest[1:]}
        for name, module in self._modules:
            for attribute, value in module.__dict__.items():
                if isinstance(value, _PLAIN):
                    picture[f"{name or 'model'}.{attribute}"] = value
        for name, function in self._functions:
            for variable, value in _variables(function):
                seen = _seen(value, 2)
                if seen is not _UNSEEN:
                    picture[f"{variable} (read by {name})"] = seen
        return picture


class _Entries:
    """Entries of dictionaries, as they are now: `are_same` tells whether they still are."""

    def __init__(self, places: Sequence[tuple[Mapping[Any, Any], Any]]) -> None:
        self._held, self._names = [held for held, _ in places], [name for _, name in places]
        self.values = self._now()

    def _now(self) -> list[Any]:
        return list(map(operator.getitem, self._held, self._names))

    def are_same(self) -> bool:
        try:
            now = self._now()
        except KeyError:
            return False
        if not all(map(operator.is_, now, self.values)):
            if not all(map(_is_equal, now, self.values)):
                return False
            self.values = now
        return True


class _Variables:
    """What functions read from outside: closures, defaults and globals, as they are now."""

    def __init__(self, functions: Sequence[types.FunctionType]) -> None:
        self._functions = functions
        self._cells = [cell for function in functions for cell in function.__closure__ or ()]
        self._contents = list(map(_content, self._cells))
        self._defaults = list(map(_DEFAULTS, functions))
        names = {
            (id(function.__globals__), name): (function.__globals__, name)
            for function in functions
            for name in function.__code__.co_names
        }
        self._globals = _Entries([(held, name) for held, name in names.values() if name in held])
        absent = [(held, name) for held, name in names.values() if name not in held]
        self._absent = [held for held, _ in absent], [name for _, name in absent]

    def values(self) -> Iterator[Any]:
        defaults = (value for values in self._defaults for value in values or ())
        return itertools.chain(self._contents, defaults, self._globals.values)

    def are_same(self) -> bool:
        return (
            all(map(_is_equal, map(_content, self._cells), self._contents))
            and all(map(operator.is_, map(_DEFAULTS, self._functions), self._defaults))
            and not any(map(operator.contains, *self._absent))
            and self._globals.are_same()
        )


_PLACE, _TRAINED = torch.Tensor.data_ptr, operator.attrgetter("requires_grad")
_TENSOR_HOOKS, _DEFAULTS = operator.attrgetter("_backward_hooks"), operator.attrgetter("__defaults__")


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _UNSEEN


def _is_equal(now: Any, before: Any) -> bool:
    """Whether it is the same object, or an equal plain value."""
    return now is before or (type(now) is type(before) and isinstance(now, _PLAIN) and bool(now == before))


def _are_groups_same(groups: Sequence[Sequence[torch.Tensor]], optimizer: torch.optim.Optimizer) -> bool:
    now = [group["params"] for group in optimizer.param_groups]
    return list(map(len, now)) == list(map(len, groups)) and all(
        map(operator.is_, itertools.chain.from_iterable(now), itertools.chain.from_iterable(groups))
    )


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip


def _plain_names(held: Mapping[str, Any]) -> list[str]:
    return [name for name, value in held.items() if isinstance(value, _PLAIN)]


def _has_place(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout is torch.strided and not nn.parameter.is_lazy(tensor)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys((*before, *now)) if before.get(name, _UNSEEN) != now.get(name, _UNSEEN)]


_UNSEEN = object()


def _seen(value: Any, depth: int) -> Any:
    """What of a value counts: plain ones as they are, tensors by identity, containers and simple objects by what they
    hold; `_UNSEEN` for functions, modules, classes and whatever else."""
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value))
    if isinstance(value, (nn.Module, types.ModuleType, type)) or callable(value) or depth == 0:
        return _UNSEEN
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
        return len(items) if len(items) > MAX_ITEMS else [_seen(item, depth - 1) for item in items]
    held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if not isinstance(held, dict):
        return _UNSEEN
    if len(held) > MAX_ITEMS:
        return len(held)
    return [(repr(key), _seen(item, depth - 1)) for key, item in held.items()]


def _functions(loss_fn: Callable[..., Any], modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """The user's functions that a step can run, with their names: ``loss_fn``, the methods of the modules' classes, and
    those that they call by name. Installed libraries are left out."""
    classes = dict.fromkeys(base for _, module in modules for base in type(module).__mro__)
    methods = [item for kind in classes for item in vars(kind).values() if isinstance(item, types.FunctionType)]
    waiting: list[Any] = [loss_fn, *methods]
    known: set[int] = set()
    while waiting and len(known) < MAX_FUNCTIONS:
        function = _plain_function(waiting.pop(0))
        if function is None or id(function) in known or _is_library(function):
            continue
        known.add(id(function))
        yield function.__qualname__, function
        waiting += [value for _, value in _variables(function) if callable(value) and not isinstance(value, type)]


def _plain_function(value: Any) -> types.FunctionType | None:
    value = getattr(value, "func", value)  # functools.partial
    value = getattr(value, "__func__", value)  # bound methods
    if not isinstance(value, types.FunctionType) and not isinstance(value, nn.Module):
        value = vars(type(value)).get("__call__")  # an object that can be called
    return value if isinstance(value, types.FunctionType) else None


def _is_library(function: types.FunctionType) -> bool:
    return any(part in function.__code__.co_filename for part in _LIBRARIES)


def _variables(function: Any) -> Iterator[tuple[str, Any]]:
    """Names and current values of what a function reads from outside: its closure, defaults and globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for index, value in enumerate(function.__defaults__ or ()):
        yield f"default {index}", value
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]

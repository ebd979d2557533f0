"""The user's module with stand-ins for its tensors, for as long as its training step is recorded, and its old self
after."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_OWN = ("_parameters", "_buffers", "_modules")
_MAX_DEPTH = 3  # of lists in lists that are searched for parameters


@dataclass(frozen=True)
class ModelTensors:
    """All parameters and buffers of a module, each tensor once, by its first name.

    Attributes:
        parameters: first name -> parameter.
        buffers: first name -> buffer.
        aliases: every name -> first name of the same tensor.
    """

    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]


def model_tensors(model: nn.Module) -> ModelTensors:
    """The parameters and buffers of ``model``; tied ones once."""
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    found: list[dict[str, torch.Tensor]] = []
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in named:
            aliases[name] = first.setdefault(id(tensor), name)
            if aliases[name] == name:
                tensors[name] = tensor
        found.append(tensors)
    return ModelTensors(parameters=found[0], buffers=found[1], aliases=aliases)


def _replaced(value: Any, standins: Mapping[int, torch.Tensor], depth: int = 0) -> Any:
    """``value`` with every tensor that has a stand-in replaced; the same object if it holds none."""
    if isinstance(value, torch.Tensor):
        return standins.get(id(value), value)
    if depth >= _MAX_DEPTH:
        return value
    if type(value) in (list, tuple):
        items = [_replaced(item, standins, depth + 1) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return type(value)(items)
    elif type(value) is dict:
        entries = {key: _replaced(item, standins, depth + 1) for key, item in value.items()}
        if any(entries[key] is not value[key] for key in value):
            return entries
    return value


class _Snapshot:
    """What one module holds: its tensors, its attributes, and the contents of its lists, dicts and sets."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = dict(module._parameters)
        self.buffers = dict(module._buffers)
        self.attributes = {key: value for key, value in module.__dict__.items() if key not in _OWN}
        self.contents = {
            key: value.copy() for key, value in self.attributes.items() if type(value) in (list, dict, set)
        }

    def restore(self) -> None:
        for current, saved in ((self.module._parameters, self.parameters), (self.module._buffers, self.buffers)):
            current.clear()
            current.update(saved)  # type: ignore[arg-type]
        attributes = self.module.__dict__
        for key in [key for key in attributes if key not in _OWN and key not in self.attributes]:
            del attributes[key]
        attributes.update(self.attributes)
        for key, content in self.contents.items():
            value = attributes[key]
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)

    def changes(self, path: str) -> Iterator[str]:
        """Names of the attributes that are not what they were."""
        attributes = self.module.__dict__
        for key in sorted(set(attributes) | set(self.attributes)):
            if key in _OWN:
                continue
            old, new = self.attributes.get(key), attributes.get(key)
            if key in self.contents and new is old:
                old = self.contents[key]
            if not _same(old, new):
                yield f"{path}.{key}" if path else key


def _same(old: Any, new: Any, depth: int = 0) -> bool:
    if old is new:
        return True
    if type(old) is not type(new) or isinstance(old, torch.Tensor) or depth > _MAX_DEPTH:
        return False
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(_same(a, b, depth + 1) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key], depth + 1) for key in old)
    if isinstance(old, (bool, int, float, complex, str, bytes, set, frozenset)):
        return bool(old == new)
    return False


class Substitution:
    """A module whose tensors can be exchanged for stand-ins and whose Python state is watched.

    ``put(standins)`` may be called several times inside ``with``; leaving restores tensors, attributes, training flags
    and the contents of lists, dicts and sets, whatever the user's code did to them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, _Snapshot] = {}
        self._put: dict[str, _Snapshot] = {}

    def __enter__(self) -> Substitution:
        self._before = {path: _Snapshot(module) for path, module in self._model.named_modules()}
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.ExitStack() as stack:  # one module that cannot be restored must not keep the others from it
            for snapshot in self._before.values():
                stack.callback(snapshot.restore)

    def put(self, standins: Mapping[int, torch.Tensor]) -> None:
        """Puts ``standins[id(original)]`` wherever the module holds ``original``: registered, or in attributes and
        lists."""
        for snapshot in self._before.values():
            module = snapshot.module
            for current, saved in ((module._parameters, snapshot.parameters), (module._buffers, snapshot.buffers)):
                for name, tensor in saved.items():
                    if tensor is not None:
                        current[name] = standins[id(tensor)]  # type: ignore[assignment]
            for key, value in snapshot.attributes.items():
                new = _replaced(value, standins)
                if new is not value:
                    module.__dict__[key] = new
        self._put = {path: _Snapshot(snapshot.module) for path, snapshot in self._before.items()}

    def changed_attributes(self) -> list[str]:
        """Attributes that the user's code changed since the last `put`."""
        return [name for path, snapshot in self._put.items() for name in snapshot.changes(path)]

    def current(self, path: str) -> torch.Tensor | None:
        """What the module now holds under a fully qualified name of a parameter or buffer."""
        owner, _, name = path.rpartition(".")
        module = self._before[owner].module
        tensor = module._parameters.get(name, module._buffers.get(name))
        return tensor

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Path of the plain attribute that holds ``tensor``, if one does."""
        for path, snapshot in self._before.items():
            for key, value in snapshot.attributes.items():
                if value is tensor:
                    return f"{path}.{key}" if path else key
        return None


@contextlib.contextmanager
def watched_generators(drawn_from: list[str]) -> Iterator[None]:
    """Restores Python's, numpy's and torch's generators; adds to ``drawn_from`` those outside torch that were used."""
    numpy = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state(legacy=False) if numpy is not None else None
    try:
        yield
    finally:
        if random.getstate() != python_state:
            drawn_from.append("random")
            random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            now = numpy.random.get_state(legacy=False)
            if repr(now) != repr(numpy_state) or now["state"]["pos"] != numpy_state["state"]["pos"]:
                drawn_from.append("numpy.random")
                numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)

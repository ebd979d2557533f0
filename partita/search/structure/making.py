"""Making the module of a source, with given tensors."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from partita.search.structure.source import Source

_counter = itertools.count()


def made(source: Source, tensors: Mapping[str, Tensor], like: nn.Module) -> nn.Module:
    """The network of ``source``.

    Args:
        tensors: its parameters and buffers by name; of tied ones one is enough.
        like: has the same names; what of it does not train, does not here, and the mode is the same.
    """
    file = f"<network {next(_counter)}>"
    linecache.cache[file] = (len(source.text), None, source.text.splitlines(keepends=True), file)  # for tracebacks
    space: dict[str, object] = {"__name__": file}
    exec(compile(source.text, file, "exec"), space)
    with torch.device("cpu"):
        model = space[source.name]()  # type: ignore[operator]
    assert isinstance(model, nn.Module)
    devices = {tensor.device for tensor in tensors.values()}
    model.to(devices.pop() if len(devices) == 1 else "cpu")
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            given = _of_any_name(name, model, tensors)
            if given is not None:
                tensor.copy_(given)
    trained = dict(like.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name].requires_grad if name in trained else True)
    return model.train(like.training)


def _of_any_name(name: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor, by this name or another of the same parameter; None where the network never reads it."""
    if name in tensors:
        return tensors[name]
    mine = dict(model.named_parameters(remove_duplicate=False))
    names = [other for other, parameter in mine.items() if parameter is mine.get(name)]
    return next((tensors[other] for other in names if other in tensors), None)

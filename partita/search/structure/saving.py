"""A network as files that need no partita."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor

from partita.arguments import path_of
from partita.errors import InputError
from partita.search.structure.making import made
from partita.search.structure.network import Network

_LOAD = '''

def load(path="weights.safetensors"):
    """The network with the weights of a file."""
    from safetensors.torch import load_model

    model = {name}()
    load_model(model, path)
    return model
'''


def save_network(network: Network, folder: str | Path, masks: Mapping[str, Tensor] | None = None) -> Path:
    """Write a network as ``model.py`` and ``weights.safetensors``.

    ``model.py`` has plain classes of `torch.nn` and a function ``load``. It imports torch, and safetensors to load.

    Args:
        folder: where the files go; made if it is not there.
        masks: by name of a parameter, which of its entries are connections; they go into ``masks.safetensors``, and the
            other entries of the weights are zero.

    Returns:
        the folder.

    Raises:
        InputError: a mask does not fit.

    Example:
        >>> save_network(network, "found")
        >>> # elsewhere, in the folder: from model import load; model = load()
    """
    folder = path_of(folder, "the folder of save_network")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(network.tensors)
    for name, mask in (masks or {}).items():
        if name not in network.parameters or mask.shape != tensors[name].shape:
            shape = tuple(tensors[name].shape) if name in tensors else "none"
            raise InputError(
                f"a mask must be shaped like its parameter, but {name!r} is {tuple(mask.shape)} and {shape}"
            )
        tensors[name] = tensors[name].detach() * mask.to(tensors[name])
    model = made(network.source, tensors, network.model)
    save_model(model, str(folder / "weights.safetensors"))
    if masks:
        save_file({name: mask.to(torch.bool).contiguous() for name, mask in masks.items()},
                  str(folder / "masks.safetensors"))  # fmt: skip
    (folder / "model.py").write_text(network.source.text + _LOAD.replace("{name}", network.source.name))
    return folder

"""Which form of a layer whose weight has absent blocks is fastest here: measured, never counted.

A layer of 90 % absent blocks does a tenth of the arithmetic and still may be slower than a dense one: small blocks and
few rows leave a product's kernel little to do for each call. So all forms are run, once
(`partita.search.blocks.measure`), and the times are kept in the cache folder (`partita.cache`) by the shapes, the
processor and the version of torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from partita.cache import read_json, write_json
from partita.cluster.hardware import cpu_name
from partita.errors import InputError
from partita.runtime import block_products
from partita.search.blocks.layer import Block, BlockLinear, block_mask, num_blocks
from partita.search.blocks.measure import Forms, measure_forms
from partita.units import fingerprint


def fastest_form(
    num_rows: int,
    in_features: int,
    out_features: int,
    block: Block,
    num_inputs: int,
    *,
    needs_input_gradient: bool = True,
    compiled: bool = False,
    num_threads: int | None = None,
) -> Forms:
    """What a layer in float32 takes in each form on this machine: measured the first time, then known.

    Args:
        num_rows: of the layer's input; samples times all dims between the first and the last.
        in_features, out_features, block, num_inputs: as of `BlockLinear`.
        needs_input_gradient: False for a model's first layer.
        compiled: measure compiled code (as `partita.parallelize` makes it); compiling takes some seconds the first
            time. Otherwise ops are called one after the other, which is slower for blocks above all: where they win so,
            they win compiled.
        num_threads: torch's own number of threads, if not given.

    Raises:
        InputError: features that are no whole blocks, no rows, or numbers of blocks that are not there.

    Example:
        >>> fastest_form(256, 2048, 2048, (64, 64), 3).fastest
        'blocks'
    """
    _, num_all = num_blocks(in_features, out_features, block)
    threads = num_threads or torch.get_num_threads()
    if num_rows < 1 or not 1 <= num_inputs <= num_all:
        raise InputError(
            f"there must be at least one row and between 1 and {num_all} input blocks for each output block, but "
            f"num_rows is {num_rows} and num_inputs is {num_inputs}"
        )
    case = (num_rows, in_features, out_features, *block, num_inputs, needs_input_gradient, compiled, threads)
    file, key = _file(), " ".join(map(str, case))
    kept = (read_json(file) or {}).get(key)
    if kept is not None:
        try:
            return msgspec.convert(kept, Forms)
        except msgspec.ValidationError:  # damaged: it is measured again
            pass
    found = measure_forms(
        num_rows, in_features, out_features, block, num_inputs,
        needs_input_gradient=needs_input_gradient, compiled=compiled, num_threads=threads,
    )  # fmt: skip
    write_json(file, {**(read_json(file) or {}), key: msgspec.to_builtins(found)})
    return found


def forms_of(
    model: nn.Module, masks: Mapping[str, Tensor], inputs: Any, *, block: Block = (64, 64), compiled: bool = False
) -> dict[str, Forms]:
    """What each linear layer of a model that could have absent blocks takes in each form, by the name of its weight.

    Left out are layers that are no plain `torch.nn.Linear` of float32 on the CPU, whose weight has another user, and
    whose mask is not made of whole blocks, the same number for each output block.

    Args:
        masks: by the name of a weight (``"0.weight"``), as `BlockLinear.from_linear` takes them.
        inputs: what the model is called with, a tensor or a tuple of arguments: it runs once, in evaluation mode and
            without gradients, to see how many rows each layer gets.

    Raises:
        InputError: a mask's name is not that of a parameter.
    """
    layers = _possible(model, masks, block)
    num_rows, first = _seen(model, {name: layer for name, (layer, _) in layers.items()}, inputs)
    return {
        name: fastest_form(
            num_rows[name], layer.in_features, layer.out_features, block, num_inputs,
            needs_input_gradient=name not in first, compiled=compiled,
        )
        for name, (layer, num_inputs) in layers.items()
        if name in num_rows
    }  # fmt: skip


def with_blocks(
    model: nn.Module, masks: Mapping[str, Tensor], inputs: Any, *, block: Block = (64, 64), compiled: bool = False
) -> nn.Module:
    """A copy of the model with a `BlockLinear` in the place of every linear layer for which blocks are fastest here,
    and with zeros where masks are false in the weights of all others: it computes what the masked model computes.

    Arguments and errors are those of `forms_of`, which tells what was measured.

    Example:
        >>> sparse = with_blocks(model, {"0.weight": mask}, torch.randn(256, 2048))
    """
    chosen = [name for name, forms in forms_of(model, masks, inputs, block=block, compiled=compiled).items()
              if forms.fastest == "blocks"]  # fmt: skip
    found = copy.deepcopy(model)
    parameters = dict(found.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(_by_entries(mask, parameters[name], block))
    for name in chosen:
        path, _, own = name.removesuffix(".weight").rpartition(".")
        parent = found.get_submodule(path)
        linear = getattr(parent, own)
        setattr(parent, own, BlockLinear.from_linear(linear, masks[name], block))
    return found


# Layers of a model ---------------------------------------------------------------------------------------------------


def _possible(model: nn.Module, masks: Mapping[str, Tensor], block: Block) -> dict[str, tuple[nn.Linear, int]]:
    """By the weight's name: the layers that can be blocks, and how many input blocks each output block has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in masks if name not in parameters]
    if unknown:
        raise InputError(
            f"masks must be named like the model's parameters ({', '.join(list(parameters)[:3])}, ...), but there is "
            f"none that is called {unknown[0]!r}"
        )
    users: dict[int, int] = {}
    for value in parameters.values():
        users[id(value)] = users.get(id(value), 0) + 1
    found = {}
    for name, mask in masks.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        weight = parameters[name]
        if type(layer) is not nn.Linear or layer.weight is not weight or users[id(weight)] > 1 or layer is model:
            continue
        if weight.dtype is not torch.float32 or weight.device.type != "cpu":
            continue
        try:
            counts = block_mask(mask, layer.in_features, layer.out_features, block).sum(1)
        except InputError:  # not made of these blocks
            continue
        if int(counts.min()) == int(counts.max()) > 0:
            found[name] = (layer, int(counts[0]))
    return found


def _seen(model: nn.Module, layers: Mapping[str, nn.Linear], inputs: Any) -> tuple[dict[str, int], set[str]]:
    """Rows that each layer gets, of all its calls; those that read one of the inputs themselves."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    num_rows: dict[str, int] = {}
    first: set[str] = set()
    places = {tensor.data_ptr() for tensor in given if isinstance(tensor, Tensor)}

    def watch(name: str) -> Callable[[nn.Module, Sequence[Any]], None]:
        def note(module: nn.Module, args: Sequence[Any]) -> None:
            num_rows[name] = num_rows.get(name, 0) + args[0].numel() // args[0].shape[-1]
            if args[0].data_ptr() in places:
                first.add(name)

        return note

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(*given)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return num_rows, first


def _by_entries(mask: Tensor, weight: Tensor, block: Block) -> Tensor:
    if mask.shape == weight.shape:
        return mask != 0
    if weight.dim() != 2:
        raise InputError(f"a mask must have the shape of its weight, {tuple(weight.shape)}, not {tuple(mask.shape)}")
    whole = block_mask(mask, weight.shape[1], weight.shape[0], block)
    return whole.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def _file() -> str:
    processor = (cpu_name(Path("/")), torch.backends.cpu.get_cpu_capability(), torch.__version__)
    return f"blocks/{fingerprint((block_products.CODE, *processor))}.json"

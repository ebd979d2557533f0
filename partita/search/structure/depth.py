"""Networks with more or fewer blocks.

A block that is put behind its original changes nothing at first. Where the original adds to what comes in (residual
blocks), the copy adds zero: the last weights of what it adds are zero, and learn from the first step on. Else the
copy's layers are identities, if its activations allow that, as ReLU does (Chen, Goodfellow and Shlens 2016, "Net2Net").
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from partita.errors import InputError
from partita.search.structure.network import Network
from partita.search.structure.scopes import Scope, calls_of, scope_of
from partita.search.structure.tracing import arguments_of, op_name, sizes_of

CLOSE = 1e-6  # of the largest entry

_PASSING = {"dropout", "contiguous", "clone", "relu", "to", "type_as", "view", "reshape", "transpose", "permute"}
_LISTS = (nn.ModuleList, nn.Sequential)


def blocks_of(network: Network) -> list[str]:
    """Modules of lists and sequences that run once, and whose result is shaped like what they take."""
    return [path for path, scopes in _calls(network).items() if path.rpartition(".")[2].isdigit() and len(scopes) == 1
            and isinstance(network.model.get_submodule(path.rpartition(".")[0]), _LISTS)
            and _keeps_shape(scopes[0])]  # fmt: skip


def repeated(network: Network) -> list[list[str]]:
    """Runs of at least two equal blocks: of one class with parameters of the same shapes, one behind the other. Runs
    inside blocks of others are left out."""
    runs: list[list[str]] = []
    for path in sorted(blocks_of(network), key=_holder_and_place):
        holder, place = _holder_and_place(path)
        last = _holder_and_place(runs[-1][-1]) if runs else ("", -1)
        follows = (holder, place - 1) == last and bool(runs)
        if follows and _form(network.model, path) == _form(network.model, runs[-1][-1]):
            runs[-1].append(path)
        else:
            runs.append([path])
    runs = [run for run in runs if len(run) > 1]
    inside = tuple(f"{path}." for run in runs for path in run)
    return [run for run in runs if not run[0].startswith(inside)] if inside else []


def _holder_and_place(path: str) -> tuple[str, int]:
    holder, _, place = path.rpartition(".")
    return holder, int(place)


def _form(model: nn.Module, path: str) -> tuple[type[nn.Module], dict[str, torch.Size]]:
    block = model.get_submodule(path)
    return type(block), {name: tensor.shape for name, tensor in block.named_parameters()}


def with_depth(model: nn.Module, run: Sequence[str], depth: int) -> nn.Module:
    """A copy of a module in which a run of blocks (`repeated`) has so many: the last ones are left out, or copies of
    the last one follow. What it computes changes, and whether it still runs is not tried."""
    model = copy.deepcopy(model)
    holder, place = _place(model, run[-1])
    for _ in range(len(run) - depth):
        del holder[place]
        place -= 1
    for _ in range(depth - len(run)):
        holder.insert(place + 1, copy.deepcopy(holder[place]))
        place += 1
    return model


def _calls(network: Network) -> dict[str, list[Scope]]:
    return calls_of(scope_of(network.program, network.placeholders))


def _keeps_shape(scope: Scope) -> bool:
    if not scope.inputs or len(scope.outputs) != 1:
        return False
    before, after = (node.meta.get("val") for node in (scope.inputs[0], scope.outputs[0]))
    return isinstance(before, Tensor) and isinstance(after, Tensor) and sizes_of(before) == sizes_of(after)


def deepened(network: Network, block: str) -> Network:
    """The network with a copy of a block right behind it, and the same results.

    Args:
        block: name of a module in an `nn.ModuleList` or `nn.Sequential`; `blocks_of` has those that can be.

    Raises:
        InputError: there is no such block, the copy can't be made to change nothing, or the network does not call it.

    Example:
        >>> deeper = deepened(network, "blocks.3")
    """
    model = copy.deepcopy(network.model)
    holder, place = _place(model, block)
    with torch.no_grad():
        holder.insert(place + 1, _neutral(network, model, block))
    name = f"{block.rpartition('.')[0]}.{place + 1}".lstrip(".")
    return _checked(network, model, name, f"a copy behind {block!r}", same=True)


def shallower(network: Network, block: str) -> Network:
    """The network without a block.

    Args:
        block: name of a module in an `nn.ModuleList` or `nn.Sequential`.

    Raises:
        InputError: there is no such block, or the network does not run without it.
    """
    model = copy.deepcopy(network.model)
    holder, place = _place(model, block)
    del holder[place]
    return _checked(network, model, "", f"the network without {block!r}", same=False)


def _place(model: nn.Module, block: str) -> tuple[Any, int]:
    path, _, name = block.rpartition(".")
    holder = dict(model.named_modules()).get(path)
    if not isinstance(holder, _LISTS) or not name.isdigit() or int(name) >= len(holder):
        raise InputError(
            f"a block must be a module in an nn.ModuleList or nn.Sequential of the network, but got {block!r}; "
            "blocks_of() has those that can be"
        )
    return holder, int(name)


def _checked(network: Network, model: nn.Module, block: str, what: str, *, same: bool) -> Network:
    """The network of ``model``, once it has run."""
    calls: list[str] = []
    hook = model.get_submodule(block).register_forward_hook(lambda *_: calls.append(block)) if block else None
    try:
        results = _run(model, network)
    except Exception as error:
        raise InputError(f"{what} must run, but does not: {type(error).__name__}: {error}") from error
    if same and not _same(_run(network.model, network), results):
        raise InputError(f"{what} must change nothing, but results differ; is there more than one path around it?")
    if hook is not None:
        hook.remove()
        if not calls:
            raise InputError(f"{what} must be called by the network, but is not: it counts its blocks by itself")
    return Network(model, network.args, network.kwargs)


def _run(model: nn.Module, network: Network) -> Any:
    trained = model.training
    twin = copy.deepcopy(model).eval() if trained else model
    with torch.no_grad():
        return twin(*network.args, **network.kwargs)


def _same(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(_close(x, y) for x, y in pairs if isinstance(x, Tensor))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= CLOSE * a.abs().max().clamp_min(1)).all())


# -- blocks that change nothing ---------------------------------------------------------------------------------------


def _neutral(network: Network, model: nn.Module, block: str) -> nn.Module:
    args, kwargs = _taken(network, model, block)
    for silence in (_add_zero, _be_identity):
        copied = copy.deepcopy(model.get_submodule(block))
        if not silence(copied, network, block):
            continue
        trained = copied.training
        result = copied.eval()(*args, **kwargs)
        copied.train(trained)
        if isinstance(result, Tensor) and _close(args[0], result):
            return copied
    raise InputError(
        f"a copy of {block!r} must be able to change nothing, but can't: it neither adds to what it takes, nor can its "
        "layers be identities"
    )


def _taken(network: Network, model: nn.Module, block: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module = model.get_submodule(block)
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: taken.append((args, kwargs)), with_kwargs=True)
    trained = model.training
    try:
        model.eval()(*network.args, **network.kwargs)
    finally:
        model.train(trained)
        handle.remove()
    if not taken or not taken[0][0] or not isinstance(taken[0][0][0], Tensor):
        raise InputError(f"a block must take a tensor first, but {block!r} {'does not' if taken else 'is not called'}")
    return taken[0]


def _add_zero(copied: nn.Module, network: Network, block: str) -> bool:
    scopes = _calls(network).get(block)
    if not scopes or not _keeps_shape(scopes[0]):
        return False
    scope = scopes[0]
    added = _added(scope.outputs[0], scope.inputs[0])
    if not added:
        return False
    own = dict(copied.named_parameters())
    for branch in added:
        names = [network.trace.names[node] for node in _last_weights(branch, network)]
        inside = [own.get(alias.removeprefix(f"{block}.")) for name in names for alias in network.aliases[name]]
        found = [parameter for parameter in inside if parameter is not None]
        if not found:
            return False
        for parameter in found:
            parameter.zero_()
    return True


def _added(node: fx.Node, start: fx.Node) -> list[fx.Node] | None:
    """What is added to ``start`` on the way to ``node``; None if there is no way of sums alone."""
    if node is start:
        return []
    if op_name(node).strip("_") == "add":
        values = [node.args[0], node.args[1]]
        for one, other in (values, values[::-1]):
            found = _added(one, start) if isinstance(one, fx.Node) else None
            if found is not None and isinstance(other, fx.Node):
                return [*found, other]
    if op_name(node) in _PASSING and isinstance(node.args[0], fx.Node):
        return _added(node.args[0], start)
    return None


def _last_weights(node: fx.Node, network: Network) -> Iterator[fx.Node]:
    """The parameters of the last op that has some: its result is zero if they are."""
    while node.op == "call_function":
        own = [source for source in node.all_input_nodes if network.trace.names.get(source) in network.parameters]
        if own:
            yield from own
            return
        sources = [value for value in arguments_of(node).values() if isinstance(value, fx.Node)]
        if not sources:
            return
        node = sources[0]


def _be_identity(copied: nn.Module, network: Network, block: str) -> bool:
    for module in copied.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.dirac_(module.weight, module.groups)
        elif own:
            return False
        if getattr(module, "bias", None) is not None and own:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return True

"""A module's graph of whole layers (`torch.export`), whose batch and lengths stay open."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from partita.errors import InputError


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """The graph of ``model(*args, **kwargs)``, as it is in the mode (training or not) of ``model``.

    Sizes of inputs stay open where the model allows it: the batch, and all those of vectors and sequences (images of
    open sizes take minutes in models that cut them into windows); else the batch alone, else none.

    Raises:
        InputError: `torch.export` can't capture it.
    """
    attempts = (_batch_and_length, _batch, None)
    reason: Exception | None = None
    for open_dims in attempts:
        shapes: Any = None
        if open_dims is not None:
            shapes = _shapes(model, args, kwargs, open_dims)
        try:
            traced = copy.deepcopy(model)  # a norm counts batches, and some models keep sizes
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The tensor attributes", UserWarning)  # those that an LSTM keeps
                program = torch.export.export(traced, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
            _flatten(program.graph_module)
            return program
        except Exception as error:  # whatever the model's own code raises on symbolic sizes
            reason = error
    raise InputError(
        f"the model must be one that torch.export captures, but {type(model).__name__} is not: {reason}. Replace what "
        "depends on the data's values by tensor ops, or leave that part out of the model"
    ) from reason


def _batch(tensor: torch.Tensor) -> dict[int, Any]:
    return {0: Dim.AUTO}


def _batch_and_length(tensor: torch.Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(tensor.ndim if tensor.ndim <= 3 else 1), Dim.AUTO)


def _shapes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], open_dims: Any) -> Any:
    def of(value: Any) -> Any:
        return open_dims(value) if isinstance(value, torch.Tensor) and value.ndim else None

    parameters = list(inspect.signature(model.forward).parameters.values())
    named: dict[str, Any] = {}
    for parameter, value in zip(parameters, args, strict=False):
        if parameter.kind is parameter.VAR_POSITIONAL:
            named[parameter.name] = args[len(named) :]
            break
        named[parameter.name] = value
    named |= kwargs
    return pytree.tree_map(of, named)


# -- graphs inside the graph ------------------------------------------------------------------------------------------


def _flatten(module: fx.GraphModule) -> None:
    """Put in place what runs under `torch.no_grad` or `torch.autocast`, and leave out checks of types.

    What ran without gradients is detached. A network in a file of its own leaves autocast to who calls it.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif node.op == "call_function" and str(node.target) in _WRAPPERS:
            _put_in_place(module, node, detached=str(node.target) == "wrap_with_set_grad_enabled" and not node.args[0])
    graph.eliminate_dead_code(is_impure_node=_changes_something)


_CHECKS = {torch.ops.aten._assert_tensor_metadata.default}
_WRAPPERS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}


def _changes_something(node: fx.Node) -> bool:
    in_place = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or in_place


def _put_in_place(module: fx.GraphModule, node: fx.Node, *, detached: bool) -> None:
    place = next(at for at, value in enumerate(node.args) if isinstance(value, fx.Node) and value.op == "get_attr")
    inner = getattr(module, node.args[place].target)  # type: ignore[union-attr,arg-type]
    _flatten(inner)
    values: dict[fx.Node, Any] = {}
    given = iter(node.args[place + 1 :])
    with module.graph.inserting_before(node):
        for source in inner.graph.nodes:
            if source.op == "placeholder":
                values[source] = next(given)
            elif source.op == "output":
                results = source.args[0]
            else:
                values[source] = module.graph.node_copy(source, values.__getitem__)
        found = [values[result] for result in results]
        if detached:
            found = [_detached(module.graph, result) for result in found]
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(found[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _detached(graph: fx.Graph, result: fx.Node) -> fx.Node:
    if not isinstance(result.meta.get("val"), torch.Tensor):
        return result
    node = graph.call_function(torch.ops.aten.detach.default, (result,))
    node.meta = dict(result.meta)
    return node

"""Finds the first op of a step that produces NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from partita.errors import NonFiniteLossError
from partita.graph.execute import graph_arguments
from partita.graph.graph import Graph, OpInfo
from partita.training.block_runner import BlockRunner
from partita.training.graph_runner import GraphRunner
from partita.training.inputs import BatchLeaves


class _Watch(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.found is None and n.op == "call_function" and not _is_finite(result) and self._inputs_are_finite(n):
            self.found = n
        return result

    def _inputs_are_finite(self, node: fx.Node) -> bool:
        return all(_is_finite(self.env[item]) for item in node.all_input_nodes)


def _is_finite(value: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def first_non_finite(
    graph: Graph, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], batch: Any
) -> str:
    """A sentence that names the first op which gives NaN or infinity from finite inputs, its module and source line.

    Attention masks hold infinities on purpose; an op whose inputs are not all finite is not blamed.
    """
    watch = _Watch(graph.module)
    watch.garbage_collect_values = False
    with torch.no_grad():
        watch.run(*graph_arguments(graph, parameters, buffers, batch))
    if watch.found is None:
        return "No op gives NaN or infinity from finite inputs: look at the batch and the weights."
    info = watch.found.meta.get("op")
    place = ""
    if isinstance(info, OpInfo):
        place = f" in module {info.module or 'loss_fn'!r} at {info.source or 'unknown source'} ({info.phase.value})"
    return f"The first op with a NaN or infinite result is {watch.found.name} ({watch.found.target}){place}."


def check_before(
    runner: GraphRunner | BlockRunner,
    batch: Any,
    leaves: BatchLeaves,
    number: int,
    collect: Callable[[], None],
) -> None:
    """Runs step `number` without its update first, and names the op that made the loss NaN or infinite; `collect`
    brings whole weights here.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    random_state = torch.get_rng_state()
    loss = runner.step(batch, leaves, update=False).loss
    torch.set_rng_state(random_state)
    if math.isfinite(loss):
        return
    found = ""
    if isinstance(runner, GraphRunner):
        if runner.held:  # the op is looked for with whole weights
            collect()
            runner.take_weights()
        found = first_non_finite(runner.graph, runner.parameters, runner.buffers, batch)
        torch.set_rng_state(random_state)
    raise NonFiniteLossError(
        f"the loss must be finite, but got {loss} in step {number}; nothing was updated. "
        f"{found or 'The model runs as one block, so the op is not known.'}"
    )

"""`Graph`: a thin typed view of one joint forward+backward `torch.fx` graph of ATen ops.

The graph is *functional*: no op mutates its input. Its placeholders are, in order, the tensors named by `Graph.inputs`;
its output is one flat tuple, described by `Graph.outputs`. Shapes are those of the global batch. Every node carries
`node.meta["val"]` (a FakeTensor, or a tuple of them) and, for ops, `node.meta["op"]` (an `OpInfo`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.utils._pytree as pytree
from torch import fx


class InputKind(enum.Enum):
    """What a placeholder of the graph stands for."""

    PARAMETER = "parameter"  # of the model; `Input.name` is its fully qualified name
    BUFFER = "buffer"  # of the model; `Input.name` is its fully qualified name
    BATCH = "batch"  # tensor leaf of the batch; `Input.name` is its pytree path, `Input.leaf` its index among leaves
    CONSTANT = "constant"  # tensor that the loss closes over; its value is in `Graph.constants`
    SEED = "seed"  # the scalar 1.0 from which the backward phase starts


class OutputKind(enum.Enum):
    """What an element of the graph's output tuple stands for."""

    LOSS = "loss"
    GRADIENT = "gradient"  # of the parameter `Output.target`
    BUFFER = "buffer"  # the updated value of the buffer `Output.target`


class Phase(enum.Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Input:
    kind: InputKind
    name: str
    node: str  # name of the placeholder node
    shape: tuple[int, ...]
    dtype: torch.dtype
    leaf: int = -1  # BATCH only: index into `pytree.tree_leaves(batch)`


@dataclass(frozen=True)
class Output:
    kind: OutputKind
    target: str  # "" for the loss
    node: str  # name of the node that produces it


@dataclass(frozen=True)
class OpInfo:
    """What is known of one op node. `num_bytes` counts what it reads and writes."""

    flops: int
    num_bytes: int
    phase: Phase
    module: str  # path of the module that called it, "" for the loss function
    source: str  # "file:line" in the user's code, "" if unknown


@dataclass
class Graph:
    """The loss and all gradients of one training step as one functional ATen graph.

    Attributes:
        module: the `torch.fx.GraphModule`; `module.graph.nodes` is in the order in which plain PyTorch would run it.
        inputs: the placeholders, in order.
        outputs: the elements of the output tuple, in order: the loss first, then the gradients of all trainable
            parameters that have one, then the buffers that the step updates.
        constants: values of the CONSTANT inputs, by name.
        aliases: fully qualified name -> first name, for tied parameters and buffers (the first name maps to itself).
        without_gradient: trainable parameters that the loss does not reach.
        batch_spec: tree structure of the batch, for `pytree.tree_unflatten`.
        batch_size: extent of dim 0 that the tensors of the batch share (0: none has one).
        unchecked: source lines of checks of values (``if bad(values): raise``) that the graph leaves out.
        fingerprint: hash of ops, shapes, dtypes and names; equal on every process for the same model and batch shape.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    without_gradient: tuple[str, ...]
    batch_spec: pytree.TreeSpec
    batch_size: int
    fingerprint: str
    blocks: tuple[tuple[str, ...], ...] = field(default=())  # repeated blocks: groups of module paths with equal ops
    unchecked: tuple[str, ...] = ()

    @property
    def nodes(self) -> list[fx.Node]:
        """All op nodes, in order (no placeholders, no output)."""
        return [node for node in self.module.graph.nodes if node.op == "call_function"]

    def ops(self) -> Iterator[tuple[fx.Node, OpInfo]]:
        """Op nodes that do work, with what is known of them (tuple `getitem`s are skipped)."""
        for node in self.nodes:
            info = node.meta.get("op")
            if isinstance(info, OpInfo):
                yield node, info

    def inputs_of(self, kind: InputKind) -> tuple[Input, ...]:
        return tuple(item for item in self.inputs if item.kind is kind)

    def outputs_of(self, kind: OutputKind) -> tuple[Output, ...]:
        return tuple(item for item in self.outputs if item.kind is kind)

    @property
    def flops(self) -> int:
        return sum(info.flops for _, info in self.ops())

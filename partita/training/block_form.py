"""Weights of which only the blocks are stored, updated and multiplied that are there.

Where a method of `partita.connections` chooses whole blocks, for each block of outputs as many blocks of inputs, a few
blocks [O / bo, K, bo, bi] and their index [O / bo, K] tell all of a weight [O, I]. `BlockForm` holds these, and an
optimizer over them, beside the user's own module and optimizer, which stay dense, with zeros where no block is.

* The step is captured with the blocks in the place of the weights (`BlockForm.in_place`): layers then call the ops of
  `partita.graph.block_ops`, and the index is a buffer. Runners of such a graph train the blocks.
* `collect` brings blocks and their states into the user's weights and optimizer; `take_weights` and `load_state` take
  them from there, and the index from the masks. So weights change hands in their dense form only: the runners of other
  graphs, checkpoints, and whoever changes the connections know nothing of blocks, and a block that comes has the zeros
  that are there.
* After each update the user's weights are made current (`show`); what the user writes into them is taken.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from partita.errors import CaptureError, CheckpointError, PlanError
from partita.graph.block_ops import OPS, block_layer
from partita.graph.graph import Graph, InputKind
from partita.program.instructions import Box
from partita.training.connecting import Block, Connecting
from partita.training.torch_adapter import clone_optimizer, options_of

INDEX = "partita_index"  # name of the buffer that a layer has meanwhile


class BlockForm:
    """Some linear layers of a model in blocks.

    Args:
        model: holds the layers; each is a plain `torch.nn.Linear` with a contiguous weight of float32 on the CPU that
            nobody else has.
        optimizer: the user's own, which updates every element by itself.
        connecting: its masks are made of the blocks.
        names: of the weights.
        block: outputs and inputs of a block.

    Example:
        >>> form = BlockForm(model, optimizer, connecting, ["0.weight"], (64, 64))  # doctest: +SKIP
        >>> with form.in_place():  # doctest: +SKIP
        ...     graph = capture(model, loss_fn, batch)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        connecting: Connecting,
        names: Sequence[str],
        block: Block,
    ) -> None:
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
        self._layers = {name: _Layer.of(module, connecting.masks[name], block) for name, module in modules.items()}
        self._by_blocks = {id(layer.blocks): layer for layer in self._layers.values()}
        self._users = optimizer
        self.optimizer = clone_optimizer(optimizer, self._groups())
        self._seen: list[int] = []  # versions of the user's weights
        self.take_weights()
        self.load_state()

    @property
    def names(self) -> frozenset[str]:
        """Of the weights that are in blocks."""
        return frozenset(self._layers)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the user's layers have the blocks in the place of their weights, and compute by them."""
        with contextlib.ExitStack() as stack:
            for layer in self._layers.values():
                stack.enter_context(layer.in_place())
            yield

    def uses(self, graph: Graph) -> dict[str, BlockUse]:
        """How the weights are used by a step that was captured `in_place`; those that it also reads in another way
        than by their layer's product are left out."""
        held = {id(value) for value in graph.constants.values()}  # e.g. those that are in a list of the model's
        nodes = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
        weights = {item.name: nodes[item.node] for item in graph.inputs_of(InputKind.PARAMETER)}
        names = [name for name, layer in self._layers.items() if name in weights and id(layer.weight) not in held]
        found = {name: _use_of(weights[name]) for name in names}
        return {name: use for name, use in found.items() if use is not None}

    def check(self, graph: Graph) -> None:
        """Raises CaptureError if the step reads a weight in another way than by its layer's product."""
        others = self.names - self.uses(graph).keys()
        if others:
            raise CaptureError(
                f"weights in blocks must be read by their layers alone, but the step reads {sorted(others)[:5]} in "
                'another way. Pass form="masked" to the method that learns connections'
            )

    # Weights and states ----------------------------------------------------------------------------------------------

    def refresh_groups(self) -> None:
        """Takes the user's groups: learning rates and other options, and which parameters there are; called before each
        step."""
        self.optimizer.param_groups[:] = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        own = {id(layer.weight): layer.blocks for layer in self._layers.values()}
        return [
            {**options_of(group), "params": [own.get(id(item), item) for item in group["params"]]}
            for group in self._users.param_groups
        ]

    @torch.no_grad()
    def take_weights(self) -> None:
        """Takes the index from the masks and the blocks from the user's weights, of which no more than these are left.

        Raises:
            CheckpointError: the masks have another number of blocks than before.
        """
        for name, layer in self._layers.items():
            layer.take(name)
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        """Brings the blocks into the user's weights."""
        for layer in self._layers.values():
            torch._foreach_copy_(layer.places, layer.parts)
        self._seen = self._versions()

    @property
    def is_stale(self) -> bool:
        """Whether somebody else has written into the user's weights since."""
        return self._versions() != self._seen

    def _versions(self) -> list[int]:
        return [layer.weight._version for layer in self._layers.values()]

    def collect(self) -> None:
        """Brings blocks and states into the user's weights and optimizer."""
        if not self.is_stale:
            self.show()
        for parameter, state in self.optimizer.state.items():
            layer = self._by_blocks.get(id(parameter))
            if layer is None:
                self._users.state[parameter] = state
            elif state:
                whole = self._users.state[layer.weight]
                for name, value in state.items():
                    whole[name] = layer.whole_of(value, whole.get(name))

    def load_state(self) -> None:
        """Takes the states from the user's optimizer."""
        own = {id(layer.weight): layer for layer in self._layers.values()}
        self.optimizer.state.clear()
        for parameter, state in self._users.state.items():
            layer = own.get(id(parameter))
            if layer is None:
                self.optimizer.state[parameter] = state
            elif state:
                self.optimizer.state[layer.blocks] = {name: layer.part_of(value) for name, value in state.items()}

    def users_box(self, name: str, box: Box) -> Box:
        """The part of the user's weight that a part of its blocks covers.

        Raises:
            PlanError: it is no box.
        """
        layer = self._layers.get(name)
        if layer is None:
            return box
        shape, (height, _) = tuple(layer.blocks.shape), layer.block
        if box.lengths[1:] != shape[1:]:
            raise PlanError(
                f"a process must store all blocks that a block of outputs reads, but the plan gives it {box.lengths} "
                f'of the blocks {shape} of {name!r}. Use another plan, or form="masked" of the method that learns '
                "connections"
            )
        return Box((box.starts[0] * height, 0), (box.lengths[0] * height, layer.weight.shape[1]))


class BlockUse(NamedTuple):
    """What a step does with a layer's blocks: rows of all products together, whether its input needs a gradient, and
    whether it is computed in another type than the weight's."""

    num_rows: int
    needs_input_gradient: bool
    is_cast: bool


def _use_of(weight: fx.Node) -> BlockUse | None:
    """None if anything but the layer's products reads it."""
    casts = [node for node in weight.users if node.target is torch.ops.aten._to_copy.default]
    readers = [node for node in (*weight.users, *(user for cast in casts for user in cast.users)) if node not in casts]
    if any(node.target not in OPS for node in readers):
        return None
    rows = [node.args[0].meta["val"].shape[0] for node in readers if node.target is OPS[0]]  # type: ignore[union-attr]
    if not rows:
        return None
    return BlockUse(sum(rows), any(node.target is OPS[1] for node in readers), bool(casts))


@dataclass
class _Layer:
    """One layer. `mask` is what others keep current; `places` are the places of the blocks in the user's weight, and
    `parts` the blocks, one by one."""

    module: nn.Module
    mask: Tensor
    block: Block
    blocks: nn.Parameter
    index: Tensor
    places: list[Tensor] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module, mask: Tensor, block: Block) -> _Layer:
        num_outputs, num_inputs = mask.shape[0] // block[0], int(mask[0].sum()) // block[1]
        blocks = nn.Parameter(torch.zeros(num_outputs, num_inputs, *block))
        return cls(module, mask, block, blocks, torch.zeros(num_outputs, num_inputs, dtype=torch.int64))

    @property
    def weight(self) -> nn.Parameter:
        """The user's own, as it is now."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        module, weight = self.module, self.weight
        if weight._backward_hooks:
            raise CaptureError(
                "weights in blocks must have no hooks, which would see gradients of their shape, but one was "
                'registered. Remove it, or pass form="masked" to the method that learns connections'
            )
        self.blocks.requires_grad_(weight.requires_grad)
        module._parameters["weight"] = self.blocks
        module._buffers[INDEX] = self.index
        module.__dict__["forward"] = functools.partial(_forward, module)
        try:
            yield
        finally:
            del module.__dict__["forward"], module._buffers[INDEX]
            module._parameters["weight"] = weight

    def take(self, name: str) -> None:
        chosen = self._by_blocks(self.mask)[:, :, 0, 0]
        if not torch.equal(chosen.sum(1), torch.full((len(chosen),), self.index.shape[1])):
            raise CheckpointError(
                f"connections in blocks must keep their number, but {name!r} has {self.index.shape[1]} blocks of "
                f"inputs for each block of outputs, and is to have {chosen.sum(1).unique().tolist()}. Go on with the "
                'method and density of the checkpoint, or pass form="masked" to it'
            )
        self.index.copy_(chosen.nonzero()[:, 1].view_as(self.index))
        self.blocks.copy_(self._taken(self.weight))
        self.weight.zero_()
        places = self._by_blocks(self.weight.detach())
        self.places = [places[row, column] for row, column in chosen.nonzero().tolist()]
        self.parts = list(self.blocks.detach().flatten(0, 1).unbind())

    def part_of(self, value: Any) -> Any:
        """Of a state in the weight's shape that of the blocks."""
        if not isinstance(value, Tensor):
            return value
        return self._taken(value.detach()) if value.shape == self.weight.shape else value.clone()

    def whole_of(self, value: Any, known: Any) -> Any:
        """Of a state of the blocks that of the weight, in the storage of a known one that fits."""
        if not isinstance(value, Tensor) or value.shape != self.blocks.shape:
            return value.clone() if isinstance(value, Tensor) else value
        fits = isinstance(known, Tensor) and known.shape == self.weight.shape and known.is_contiguous()
        if not fits or known.dtype != value.dtype:
            known = torch.empty(self.weight.shape, dtype=value.dtype)
        self._by_blocks(known.zero_()).index_put_((self._rows, self.index), value.detach())
        return known

    def _taken(self, whole: Tensor) -> Tensor:
        return self._by_blocks(whole.contiguous())[self._rows, self.index]

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.index))[:, None]

    def _by_blocks(self, whole: Tensor) -> Tensor:
        """[O, I] as [O / bo, I / bi, bo, bi]."""
        height, width = self.block
        return whole.view(len(self.index), height, -1, width).transpose(1, 2)


def _forward(module: nn.Module, input: Tensor) -> Tensor:
    """What a layer computes meanwhile."""
    weight, index, bias = module._parameters["weight"], module._buffers[INDEX], module._parameters["bias"]
    assert weight is not None and index is not None
    return block_layer(input, weight, index, bias)

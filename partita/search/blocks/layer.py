"""The block-sparse linear layer, and what leads from dense layers to it and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from partita.errors import InputError
from partita.graph.block_ops import block_layer
from partita.search.connections.grain import Grain

Block = tuple[int, int]  # outputs, inputs


class BlockLinear(nn.Module):
    """``y = x W' + bias`` with a weight W of which each block of outputs reads a fixed number of blocks of inputs.

    Trains, captures and compiles (`partita.graph.block_ops` has the mathematics). Time and memory go with the blocks
    that are there; see `partita.search.blocks.fastest_form` for whether that is faster than a dense layer.

    Shapes: x [..., I] to y [..., O]; ``weight`` [O / bo, K, bo, bi]: the blocks that are there; ``index`` [O / bo, K]:
    which input block each of them reads (a buffer, of type int64); ``bias`` [O] or None. The index may be written in
    place at any time, between steps of `partita.parallelize` as well: nothing is captured or compiled again.

    Args:
        in_features: I, a multiple of ``block[1]``.
        out_features: O, a multiple of ``block[0]``.
        block: outputs and inputs of one block, (bo, bi).
        num_inputs: K, how many input blocks each output block reads.
        index: which; at random without repetition, if not given.
        bias: whether there is one.

    Raises:
        InputError: features that are no whole blocks, more input blocks than there are, an index that does not fit.

    Example:
        >>> layer = BlockLinear(256, 128, (64, 64), num_inputs=1)
        >>> layer(torch.randn(5, 256)).shape, layer.density
        (torch.Size([5, 128]), 0.25)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: Block,
        *,
        num_inputs: int,
        index: Tensor | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_outputs, num_all = num_blocks(in_features, out_features, block)
        if not 1 <= num_inputs <= num_all:
            raise InputError(
                f"an output block must read between 1 and all {num_all} input blocks, but num_inputs is {num_inputs}. "
                "Change it, or take smaller blocks."
            )
        self.in_features, self.out_features = in_features, out_features
        self.block: Block = (block[0], block[1])
        if index is None:
            index = torch.rand(num_outputs, num_all).argsort(1)[:, :num_inputs].sort(1).values
        _check_index(index, (num_outputs, num_inputs), num_all)
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, *block, device=device, dtype=dtype))
        self.index: Tensor
        self.register_buffer("index", index.detach().to(device=device, dtype=torch.int64).clone())
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` does it, for the inputs that each output has: uniform within 1 / sqrt(K bi)."""
        bound = 1 / math.sqrt(self.weight.shape[1] * self.weight.shape[3])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise InputError(f"the last dim of the input must be {self.in_features}, but its shape is {tuple(x.shape)}")
        return block_layer(x, self.weight, self.index, self.bias)

    @property
    def density(self) -> float:
        """The share of the weight that is there."""
        return self.weight.numel() / (self.in_features * self.out_features)

    @property
    def mask(self) -> Tensor:
        """[O / bo, I / bi], true where a block is there."""
        num_outputs, num_all = num_blocks(self.in_features, self.out_features, self.block)
        found = torch.zeros(num_outputs, num_all, dtype=torch.bool, device=self.index.device)
        return found.scatter_(1, self.index, True)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, mask: Tensor, block: Block) -> BlockLinear:
        """The layer that computes what `linear` computes with the weight ``mask * weight``.

        Args:
            mask: true (or not 0) where a connection is there: one entry for each of the weight's, [O, I], or for each
                block, [O / bo, I / bi].

        Raises:
            InputError: the mask cuts through a block, or output blocks have unequal numbers of input blocks.
        """
        blocks = block_mask(mask, linear.in_features, linear.out_features, block)
        counts = blocks.sum(1)
        if int(counts.min()) != int(counts.max()) or not int(counts.min()):
            raise InputError(
                "every output block must have the same number of input blocks, at least one, but they have "
                f"{int(counts.min())} to {int(counts.max())}. Choose the mask so, or leave the layer as it is."
            )
        num_inputs = int(counts[0])
        index = blocks.nonzero()[:, 1].view(-1, num_inputs)
        found = cls(
            linear.in_features, linear.out_features, block, num_inputs=num_inputs, index=index,
            bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        parts = Grain(block).units(linear.weight).unflatten(2, block)
        found.weight.copy_(parts[torch.arange(len(index), device=parts.device)[:, None], found.index])
        found.weight.requires_grad_(linear.weight.requires_grad)
        if linear.bias is not None and found.bias is not None:
            found.bias.copy_(linear.bias).requires_grad_(linear.bias.requires_grad)
        return found.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same, with zeros where no block is."""
        found = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype
        )
        num_outputs, num_all = self.mask.shape
        height, width = self.block
        parts = self.weight.new_zeros(num_outputs, num_all, height, width)
        rows = torch.arange(num_outputs, device=parts.device)[:, None].expand_as(self.index)
        parts.index_put_((rows, self.index), self.weight, accumulate=True)
        found.weight.copy_(parts.transpose(1, 2).reshape(self.out_features, self.in_features))
        if self.bias is not None:
            found.bias.copy_(self.bias)
        return found.train(self.training)

    def extra_repr(self) -> str:
        num_inputs, has_bias = self.weight.shape[1], self.bias is not None
        return f"{self.in_features}, {self.out_features}, block={self.block}, num_inputs={num_inputs}, bias={has_bias}"


def num_blocks(in_features: int, out_features: int, block: Block) -> tuple[int, int]:
    """(output blocks, input blocks). Raises `InputError` if the features are no whole blocks."""
    height, width = block
    if height < 1 or width < 1 or in_features < 1 or out_features < 1 or in_features % width or out_features % height:
        raise InputError(
            f"{out_features} outputs and {in_features} inputs must be whole blocks of {height} outputs and {width} "
            "inputs, at least one each. Choose a block whose sides divide them."
        )
    return out_features // height, in_features // width


def block_mask(mask: Tensor, in_features: int, out_features: int, block: Block) -> Tensor:
    """The mask by blocks, [O / bo, I / bi] of bool, of one by entries or by blocks.

    Raises:
        InputError: it has another shape, or cuts through a block.
    """
    (height, width), shape = block, num_blocks(in_features, out_features, block)
    present = mask.detach() != 0
    if tuple(present.shape) == shape:
        return present
    if tuple(present.shape) != (out_features, in_features):
        raise InputError(
            f"a mask must have an entry for each of the weight's, {(out_features, in_features)}, or for each block, "
            f"{shape}, but it has the shape {tuple(mask.shape)}"
        )
    parts = Grain(block).units(present)
    whole: Tensor = parts.all(2)
    if not torch.equal(whole, parts.any(2)):
        raise InputError(
            f"{int((parts.any(2) & ~whole).sum())} blocks of {height} outputs and {width} inputs are there in part; a "
            "block must be there as a whole or not at all. Choose other blocks, or keep the layer dense with a mask."
        )
    return whole


def _check_index(index: Tensor, shape: tuple[int, int], num_all: int) -> None:
    if tuple(index.shape) != shape:
        raise InputError(f"index must have the shape {shape} (output blocks, num_inputs), but has {tuple(index.shape)}")
    if index.dtype.is_floating_point or int(index.min()) < 0 or int(index.max()) >= num_all:
        raise InputError(
            f"index must hold numbers of input blocks, 0 to {num_all - 1}, but holds {index.dtype} from "
            f"{index.min().item()} to {index.max().item()}"
        )

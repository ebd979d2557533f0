"""Work of a described transformer: `LayerWork`s for a microbatch on one device.

Letters: b sequences of a microbatch, s their length, h hidden, a heads, d = h / a, g key-value heads, f ffn, V
vocabulary, t tensor ways, c context ways, T = b s / c local tokens, e bytes of an activation's element (2). One block,
forward:

    norm; qkv [T, h] x [h, (a + 2g) d / t]; attention; projection [T, h/t] x [h/t, h]; sum over t of [T, h]
    norm; [T, h] x [h, f/t] (twice if gated); activation; [T, f/t] x [f/t, h]; sum over t of [T, h]

Backward: each product once for the input's gradient and once for the weight's, the two sums over t again, element-wise
kernels with about twice their bytes. Attention is 4 b s^2 h / (t c) flops; fused attention computes only what a causal
mask leaves (half) and keeps no scores; otherwise scores of b a s^2 / t elements are written and read by the masked
softmax (one kernel where its shapes allow it, else five) and the dropout.
Context parallelism passes keys and values around (Liu et al., Ring Attention, 2023).

Kept activations, bytes for each token (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models", 2022, table 2, in these letters): ``(4h + 4h + 2h dropout) / (t if sequence parallel) + (2 (a + 2g) d + 2h
[attention's output] + (3 if gated else 2) 2f) / t + scores``, with scores = 5 a s / t without fused attention (4
without dropout), 0 with it.

Selective recomputation drops the scores where attention is not fused (Korthikanti et al.); where it is, there are none
to drop, and the name means op-level recomputation (torchtitan, "selective: op"): element-wise kernels and every second
product run again, about half of the activations are kept.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from partita.cost.kernels import Exchange, Item, Kernel, LayerWork
from partita.cost.model import CollectiveKind
from partita.errors import InputError

ELEMENT_BYTES = 2
# Bytes of element-wise kernels of eager PyTorch against fused ones. Llama-like blocks (norms and rotations in four
# bytes, gates) gain more: torchtitan's 8B on 8 H100s takes 2.84 s a step eagerly and 2.46 s compiled, which is 12 ms a
# layer and this many times what fused kernels move; blocks of GPT's kind have about half as many unfused ops.
EAGER_GATED, EAGER_PLAIN = 3.0, 1.8
# Attention kernels of PyTorch against those of Transformer Engine and cuDNN: on H100 FlashAttention-2 runs at 0.35
# of the peak, FlashAttention-3 and cuDNN at about 0.6 (Shah et al. 2024, figure 5).
PLAIN_ATTENTION = 0.55
# Share of the activations that op-level selective recomputation keeps (torchtitan: every second product, attention).
OP_LEVEL_SHARE = 0.5
# Megatron-LM's softmax of causal scores reads only what the mask leaves, and writes all: three quarters of the bytes.
CAUSAL_SHARE = 0.75
# Megatron-LM's kernel for scale, causal mask and softmax takes rows of more than 16 and at most 2048 scores (later
# versions longer ones), and matrices (sequences x local heads) in fours. Elsewhere five kernels follow each other, in
# four bytes: cast, scale, mask, softmax, cast: 6 + 8 + 8 + 8 + 6 bytes for each score, backward 6 + 12 + 8 + 8 + 6.
# Source: `FusedScaleMaskSoftmax` of Megatron-LM 2.x and Megatron-DeepSpeed (megatron/model/fused_softmax.py).
SOFTMAX_SEQ, SOFTMAX_MATRICES = (16, 2048), 4
SOFTMAX_LAUNCHES, SOFTMAX_BYTES = 5, (36.0, 40.0)
# Kernels that the host starts before each forward pass: a batch is taken from the loader, its sizes and tokens are
# broadcast to the tensor ranks, cut into inputs and labels, mask and positions are made (a dozen element-wise kernels),
# and the loss of the pass before is summed and averaged. The host waits for the sizes, so the device waits meanwhile.
# What happens is in `get_batch`, `broadcast_data` and `get_ltor_masks_and_position_ids` of Megatron-LM 2.x; how many
# kernels that takes is an estimate.
INPUT_LAUNCHES = 30
# Bytes for each logit, forward and backward, of a cross-entropy whose operations each write a four-byte result (to four
# bytes 6, transposed 8, maximum 4, subtraction 8, exponential 8, sum 4, quotient 8, choice 8; backward: copy, product,
# transposition 24, to two bytes 6), and of a fused one. Where the vocabulary is divided over tensor ranks the measured
# times (Megatron-DeepSpeed, 2 to 8 ranks) leave no room for more than the fused one's. PyTorch's own module joins some
# of them, but its strided kernels reach about two thirds of what others do.
LOSS_BYTES, PLAIN_LOSS_BYTES, FUSED_LOSS_BYTES = (54.0, 30.0), (70.0, 45.0), (22.0, 12.0)


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A decoder-only (or encoder-only) transformer. `causal` matters to fused attention alone.

    Example:
        >>> round(Transformer(layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, seq=2048).num_parameters / 1e9)
        175
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    seq: int
    kv_heads: int | None = None  # None: as many as heads
    gated: bool = False  # SwiGLU and the like: three matrices in the feed-forward part
    bias: bool = True
    dropout: bool = False
    rotary: bool = False  # positions by rotation; otherwise a learned table
    fused_attention: bool = True
    fused: bool = True  # element-wise kernels joined (a compiler, Megatron's or Transformer Engine's); False: eager
    tuned_attention: bool = True  # the vendor's newest attention kernels; False: those that come with PyTorch
    fused_loss: bool = True  # cross-entropy in few kernels; otherwise each operation writes its four-byte result
    causal: bool = True
    tied: bool = True  # the head shares the embedding's matrix
    dtype: str = "bfloat16"  # of the linear layers; attention computes in two bytes

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.heads, self.ffn, self.vocab, self.seq) < 1 or self.hidden % self.heads:
            raise InputError(f"sizes must be at least 1 and heads must divide hidden, but got {self}.")

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def block_parameters(self) -> int:
        linear = self.hidden * (self.hidden + 2 * self.groups * self.head_dim) + self.hidden**2
        linear += (3 if self.gated else 2) * self.hidden * self.ffn
        return linear + 4 * self.hidden + ((5 * self.hidden + self.ffn) if self.bias else 0)

    @property
    def num_parameters(self) -> int:
        tables = self.vocab * (1 if self.tied else 2) + (0 if self.rotary else self.seq)
        return self.layers * self.block_parameters + tables * self.hidden

    @property
    def attention_dtype(self) -> str:
        return self.dtype if self.dtype in ("float16", "bfloat16", "float32") else "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a block is divided: ways along tensor and context, sequences in a microbatch."""

    tensor: int = 1
    context: int = 1
    micro_batch: int = 1
    sequence_parallel: bool = False


def _memory(num_bytes: float, *, launches: int = 1) -> Kernel:
    return Kernel(kind="memory", num_bytes=num_bytes, num_launches=launches)


def _matmul(m: int, n: int, k: int, dtype: str, *, batch: int = 1, out_bytes: int = ELEMENT_BYTES) -> Kernel:
    in_bytes = {"float8_e4m3fn": 1.0, "float4_e2m1fn": 0.5, "float32": 4.0}.get(dtype, 2.0)
    return Kernel(
        kind="matmul", flops=2.0 * batch * m * n * k, batch=batch, m=m, n=n, k=k, dtype=dtype,
        num_bytes=batch * (in_bytes * (m * k + k * n) + out_bytes * m * n),
    )  # fmt: skip


class _Block:
    """Builds one block's items; the methods are the parts of the formula above."""

    def __init__(self, model: Transformer, split: Split) -> None:
        self.model, self.split = model, split
        self.tokens = max(1, split.micro_batch * model.seq // split.context)
        self.outer = self.tokens / (split.tensor if split.sequence_parallel else 1)
        self.h, self.t = model.hidden, split.tensor
        self.local_heads = max(1, model.heads // split.tensor)
        self.qkv = max(1, (model.hidden + 2 * model.groups * model.head_dim) // split.tensor)
        self.ffn = max(1, model.ffn // split.tensor)

    def linear(self, n: int, k: int) -> tuple[list[Item], list[Item]]:
        """Forward and backward of one product with a weight; low precision quantises its inputs first."""
        dtype, tokens = self.model.dtype, self.tokens
        forward: list[Item] = [_matmul(tokens, n, k, dtype)]
        # The gradient of a weight is added to the one that is kept (Megatron-LM: in 4 bytes).
        backward: list[Item] = [
            _matmul(tokens, k, n, dtype),
            _matmul(k, n, tokens, dtype, out_bytes=8),
        ]
        if dtype not in ("float16", "bfloat16", "float32"):
            forward.append(_memory(4.0 * tokens * k + 3.0 * n * k, launches=2))
            backward.append(_memory(4.0 * tokens * n))
        return forward, backward

    def sum_over_tensor(self) -> list[Item]:
        if self.t == 1:
            return []
        num_bytes = ELEMENT_BYTES * self.tokens * self.h
        kinds: tuple[CollectiveKind, ...] = (
            ("reduce_scatter", "all_gather") if self.split.sequence_parallel else ("all_reduce",)
        )
        return [Exchange(kind=kind, num_bytes=num_bytes, axis="tensor") for kind in kinds]

    def attention(self) -> tuple[list[Item], list[Item]]:
        model, split = self.model, self.split
        batch, seq, d = split.micro_batch * self.local_heads, model.seq, model.head_dim
        rows = max(1, seq // split.context)
        dtype = model.attention_dtype
        ring: list[Item] = []
        if split.context > 1:
            kept = 2.0 * ELEMENT_BYTES * split.micro_batch * seq * max(1, model.groups // self.t) * d
            ring = [Exchange(kind="all_gather", num_bytes=kept, axis="context", overlapped=True)]
        if model.fused_attention:
            flops = 4.0 * batch * rows * seq * d * (0.5 if model.causal else 1.0)
            flops /= 1.0 if model.tuned_attention else PLAIN_ATTENTION
            num_bytes = 4.0 * ELEMENT_BYTES * batch * rows * d
            forward: list[Item] = [Kernel(kind="attention", flops=flops, num_bytes=num_bytes, dtype=dtype)]
            # The scores are computed again: five products for the forward's two (Dao et al. 2022, appendix B).
            backward: list[Item] = [
                Kernel(kind="attention", flops=2.5 * flops, num_bytes=2 * num_bytes, dtype=dtype, num_launches=3)
            ]
            return forward + ring, backward + ring
        scores = float(batch) * rows * seq
        share = CAUSAL_SHARE if model.causal else 1.0
        softmax = _memory(share * 2.0 * ELEMENT_BYTES * scores)  # with scale and mask in one kernel
        softmax_backward = _memory(share * 3.0 * ELEMENT_BYTES * scores)
        if not self.fuses_softmax():
            softmax = _memory(SOFTMAX_BYTES[0] * scores, launches=SOFTMAX_LAUNCHES)
            softmax_backward = _memory(SOFTMAX_BYTES[1] * scores, launches=SOFTMAX_LAUNCHES)
        dropout = [_memory((2.0 * ELEMENT_BYTES + 1) * scores)] if model.dropout else []
        forward = [
            _matmul(rows, seq, d, dtype, batch=batch), softmax, *dropout, _matmul(rows, d, seq, dtype, batch=batch),
        ]  # fmt: skip
        backward = [
            _matmul(rows, seq, d, dtype, batch=batch), _matmul(seq, d, rows, dtype, batch=batch),
            softmax_backward, *dropout,
            _matmul(rows, d, seq, dtype, batch=batch), _matmul(seq, d, rows, dtype, batch=batch),
        ]  # fmt: skip
        return forward + ring, backward + ring

    def fuses_softmax(self) -> bool:
        """Whether scale, mask and softmax of unfused attention are one kernel (see `SOFTMAX_SEQ`)."""
        low, high = SOFTMAX_SEQ
        return (self.split.micro_batch * self.local_heads) % SOFTMAX_MATRICES == 0 and low < self.model.seq <= high

    def element_wise(self) -> tuple[list[Item], list[Item]]:
        """Norms, dropout and residuals on [T, h]; reshapes of qkv; the activation on [T, f/t]."""
        model, e = self.model, ELEMENT_BYTES
        norms = [_memory(2.0 * e * self.outer * self.h)] * 2
        residuals = [_memory((3.0 * e + (1 if model.dropout else 0)) * self.outer * self.h)] * 2
        reshapes = [_memory(2.0 * e * self.tokens * self.qkv, launches=3)]
        rotations = [_memory(2.0 * e * self.tokens * self.qkv, launches=2)] if model.rotary else []
        activation = [_memory((3.0 if model.gated else 2.0) * e * self.tokens * self.ffn)]
        forward: list[Item] = self._eager([*norms, *residuals, *reshapes, *rotations, *activation])
        gated_bytes = (5.0 if model.gated else 3.0) * e * self.tokens * self.ffn
        biases = [_memory(float(e) * self.tokens * (self.qkv + self.ffn), launches=4)] if model.bias else []
        backward = self._eager(
            [
                *[_memory(5.0 * e * self.outer * self.h, launches=2)] * 2, *residuals, *reshapes,
                *rotations, _memory(gated_bytes), *biases,
            ]
        )  # fmt: skip
        return forward, backward

    def _eager(self, kernels: list[Kernel]) -> list[Item]:
        if self.model.fused:
            return list(kernels)
        factor = EAGER_GATED if self.model.gated else EAGER_PLAIN
        return [
            Kernel(kind="memory", num_bytes=factor * one.num_bytes, num_launches=round(factor * one.num_launches))
            for one in kernels
        ]

    def saved_bytes(self) -> tuple[float, float]:
        """Kept without recomputation, and with selective recomputation."""
        model = self.model
        outer = (8.0 + (2.0 if model.dropout else 0.0)) * self.h * self.outer
        low = model.dtype not in ("float16", "bfloat16", "float32")
        ffn_tensors = (3.0 if model.gated else 2.0) * 2.0
        inner = (2.0 * self.qkv + 2.0 * self.h / self.t + ffn_tensors * self.ffn) * self.tokens
        kept = outer + inner * (0.75 if low else 1.0)  # eight-bit copies stand in for the two-byte inputs of products
        scores = float(self.split.micro_batch * self.local_heads) * model.seq * (model.seq / self.split.context)
        score_bytes = 0.0 if model.fused_attention else (5.0 if model.dropout else 4.0) * scores
        if not model.fused_attention and not self.fuses_softmax():
            score_bytes += 4.0 * scores  # the softmax in four bytes, beside its two-byte copy
        return kept + score_bytes, kept * (OP_LEVEL_SHARE if model.fused_attention else 1.0)

    def work(self) -> LayerWork:
        model = self.model
        forward: list[Item] = []
        backward: list[Item] = []
        gate = 2 if model.gated else 1
        linears: list[list[Item]] = []
        own = max(1, self.h // self.t)
        for n, k in ((self.qkv, self.h), (self.h, own), (gate * self.ffn, self.h), (self.h, self.ffn)):
            ahead, back = self.linear(n, k)
            linears.append(ahead)
            forward += ahead
            backward += back
        attention_forward, attention_backward = self.attention()
        ahead, back = self.element_wise()
        forward += attention_forward + ahead + 2 * self.sum_over_tensor()
        backward += attention_backward + back + 2 * self.sum_over_tensor()
        saved, selective = self.saved_bytes()
        again = [item for item in attention_forward if isinstance(item, Kernel)]
        if model.fused_attention:
            again = [item for item in (*ahead, *linears[1], *linears[3]) if isinstance(item, Kernel)]
        return LayerWork(
            name="block",
            forward=tuple(forward),
            backward=tuple(backward),
            parameter_elements=model.block_parameters / self.t,
            saved_bytes=saved,
            selective_bytes=selective,
            boundary_bytes=ELEMENT_BYTES * self.outer * self.h,
            selective=tuple(again),
            temporary_bytes=saved,
        )


def block_work(model: Transformer, split: Split) -> LayerWork:
    """One block of `model`."""
    return _Block(model, split).work()


def embedding_work(model: Transformer, split: Split) -> LayerWork:
    """The embedding: a look-up, the sum over tensor ranks of a divided table, dropout."""
    part = _Block(model, split)
    moved = _memory(3.0 * ELEMENT_BYTES * part.tokens * model.hidden, launches=4)
    rows = model.vocab / split.tensor + (0 if model.rotary else model.seq)
    return LayerWork(
        name="embedding",
        forward=(moved, *part.sum_over_tensor()),
        backward=(moved,),
        parameter_elements=rows * model.hidden,
        saved_bytes=ELEMENT_BYTES * part.outer * model.hidden,
        selective_bytes=ELEMENT_BYTES * part.outer * model.hidden,
        boundary_bytes=ELEMENT_BYTES * part.outer * model.hidden,
    )


def head_work(model: Transformer, split: Split, *, alone: bool = True) -> LayerWork:
    """The last norm, the product with the vocabulary and the cross-entropy in four bytes.

    `alone`: the stage holds its own copy of a tied matrix (the embedding lives on another one).
    """
    part = _Block(model, split)
    columns = -(-model.vocab // split.tensor)
    logits = float(part.tokens) * columns
    product = (_matmul(part.tokens, columns, model.hidden, model.attention_dtype),)
    sums: tuple[Item, ...] = ()
    if split.tensor > 1:
        sums = (Exchange(kind="all_reduce", num_bytes=4.0 * part.tokens, axis="tensor", count=3),)
    gradient = tuple(part.sum_over_tensor())
    norm = _memory(4.0 * ELEMENT_BYTES * part.outer * model.hidden)
    own = columns * model.hidden if alone or not model.tied else 0
    kept_bytes = 2.0 if model.fused_loss else 4.0
    loss_bytes = LOSS_BYTES if model.tuned_attention else PLAIN_LOSS_BYTES
    if model.fused_loss or (split.tensor > 1 and model.tuned_attention):
        loss_bytes = FUSED_LOSS_BYTES
    return LayerWork(
        name="head",
        forward=(norm, *product, _memory(loss_bytes[0] * logits, launches=8), *sums),
        backward=(
            norm,
            _memory(loss_bytes[1] * logits, launches=4),
            _matmul(part.tokens, model.hidden, columns, model.attention_dtype),
            _matmul(model.hidden, columns, part.tokens, model.attention_dtype, out_bytes=8),
            *gradient,
        ),
        parameter_elements=own + 2.0 * model.hidden,
        saved_bytes=ELEMENT_BYTES * part.outer * model.hidden + kept_bytes * logits,
        selective_bytes=ELEMENT_BYTES * part.outer * model.hidden + kept_bytes * logits,
        boundary_bytes=ELEMENT_BYTES * part.outer * model.hidden,
        temporary_bytes=(2.0 if model.fused_loss else 8.0) * logits,
    )


def chunks_of(
    model: Transformer, split: Split, *, num_chunks: int, cuts: tuple[int, ...] | None = None
) -> list[list[tuple[LayerWork, int]]]:
    """The model cut into `num_chunks` runs of layers; each a list of (layer, how many of it).

    Args:
        cuts: first layer of each chunk but the first, counting the embedding as layer 0 and the head as the last one
            (``layers + 2`` in all). None: equal numbers of blocks; where only ``layers + 2`` divides evenly, embedding
            and head count as layers (Megatron-LM's account of them); else a remainder goes to the middle chunks.

    Raises:
        InputError: there are fewer blocks than chunks, or the cuts are not increasing layer numbers.
    """
    total = model.layers + 2
    if cuts is None and model.layers % num_chunks and total % num_chunks == 0:
        cuts = tuple(range(total // num_chunks, total, total // num_chunks))
    if cuts is None:
        if num_chunks > model.layers:
            raise InputError(f"there must be a block for each chunk, but {model.layers} are cut into {num_chunks}.")
        base, extra = divmod(model.layers, num_chunks)
        sizes = [base] * num_chunks
        first = (num_chunks - extra) // 2
        for index in range(first, first + extra):
            sizes[index] += 1
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        cuts = tuple(bound + 1 for bound in bounds[1:-1])
    edges = [0, *cuts, total]
    if len(cuts) != num_chunks - 1 or any(after <= before for before, after in itertools.pairwise(edges)):
        raise InputError(f"{num_chunks - 1} increasing cuts in 1 to {total - 1} must be given, but got {list(cuts)}.")
    block = block_work(model, split)
    found: list[list[tuple[LayerWork, int]]] = []
    for start, stop in itertools.pairwise(edges):
        chunk: list[tuple[LayerWork, int]] = []
        if start == 0:
            chunk.append((embedding_work(model, split), 1))
        num_blocks = min(stop, total - 1) - max(start, 1)
        if num_blocks > 0:
            chunk.append((block, num_blocks))
        if stop == total:
            chunk.append((head_work(model, split, alone=num_chunks > 1), 1))
        found.append(chunk)
    return found

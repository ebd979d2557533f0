"""Large language models as plain modules, for planning on ``meta``: GPT-3 and Llama-3.1 shapes.

Written as anybody would write them; nothing here knows of parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class GptBlock(nn.Module):
    """Pre-norm attention and feed-forward with biases (Radford et al. 2019; Brown et al. 2020)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        parts = self.qkv(self.norm1(x_BTD)).split(D, dim=2)
        q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class Gpt(nn.Module):
    """A decoder-only language model with learned positions."""

    def __init__(self, layers: int, hidden: int, heads: int, vocab: int, seq: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, hidden), nn.Embedding(seq, hidden)
        self.blocks = nn.ModuleList(GptBlock(hidden, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class LlamaBlock(nn.Module):
    """RMS norm, grouped-query attention with rotary positions, gated feed-forward (Grattafiori et al. 2024)."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, hidden // heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.out = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.width).transpose(1, 2)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k = (
            _rotated(self._heads(self.q(h), self.heads), cos, sin),
            _rotated(self._heads(self.k(h), self.kv_heads), cos, sin),
        )
        v = self._heads(self.v(h), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Llama(nn.Module):
    """A decoder-only language model with rotary positions."""

    def __init__(self, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> None:
        super().__init__()
        self.width = hidden // heads
        self.tokens = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(LlamaBlock(hidden, heads, kv_heads, ffn) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids_BT)
        T, half = ids_BT.shape[1], self.width // 2
        rates = 5e5 ** (-torch.arange(half, device=ids_BT.device) / half)
        angles = torch.outer(torch.arange(T, device=ids_BT.device), rates)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def next_token_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy in float32."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())


def gpt3_175b(layers: int = 96, hidden: int = 12288) -> nn.Module:
    """GPT-3 175B (Brown et al. 2020, table 2.1), with a vocabulary padded to 51,200 as in Megatron-LM."""
    return _on_meta(lambda: Gpt(layers, hidden, hidden // 128, 51200, 2048))


def llama_405b(layers: int = 126, hidden: int = 16384) -> nn.Module:
    """Llama-3.1 405B (Grattafiori et al. 2024, table 3)."""
    return _on_meta(lambda: Llama(layers, hidden, hidden // 128, 8, hidden * 13 // 4, 128256))


def token_batch(sequences: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets on ``meta``."""
    shape = (sequences, seq)
    return torch.zeros(shape, dtype=torch.long, device="meta"), torch.zeros(shape, dtype=torch.long, device="meta")


def _on_meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = make()
    return model.to(torch.bfloat16)

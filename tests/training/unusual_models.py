"""Models that do what few models do, each a small `Case`: custom gradients, gradients inside the loss, parametrised
weights, writes to buffers, complex numbers, sorting, recomputation, literal masks.

Shapes: B rows of the batch, T tokens or time steps, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A model, its loss and its batches (by number of rows)."""

    build: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Callable[[int], Any]


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch)
    return result


def labelled(*shape: int) -> Callable[[int], Any]:
    return lambda rows: (torch.randn(rows, *shape), torch.randint(0, NUM_CLASSES, (rows,)))


def unlabelled(*shape: int) -> Callable[[int], Any]:
    return lambda rows: torch.randn(rows, *shape)


class Translator(nn.Module):
    """torch.nn.Transformer looks at its mask to see whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens_BT.shape[1] - 1)
        hidden = self.body(self.embed(tokens_BT), self.embed(tokens_BT[:, :-1]), tgt_mask=mask)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens_BT[:, 1:].flatten(), label_smoothing=0.1)


class PaddedEncoder(nn.Module):
    """Rows of different lengths, pooled over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        padding = tokens_BT == 0
        hidden_BTD = self.layer(self.embed(tokens_BT), src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        return self.head(hidden_BTD.sum(1) / (~padding).sum(1, keepdim=True))  # type: ignore[no-any-return]


def padded(rows: int) -> Any:
    tokens = torch.randint(1, 20, (rows, 9))
    tokens[:, 6:] = 0
    tokens[0, 3:] = 0
    return tokens, torch.randint(0, NUM_CLASSES, (rows,))


class BidirectionalLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out, (hidden, _) = self.body(x_BTD)
        return self.head(torch.cat([hidden[-1], hidden[-2]], 1)) + out.mean((1, 2))[:, None]  # type: ignore[no-any-return]


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 16))
        self.high = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, NUM_CLASSES))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.high(checkpoint(self.low, x_BD, use_reentrant=False))  # type: ignore[no-any-return]


class SquaredRelu(torch.autograd.Function):
    """Its gradient is not that of its value: a graph that derives it anew would be found out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0) ** 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x.clamp(min=0) * 0.9


class OwnGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(6, 16), nn.Linear(16, NUM_CLASSES)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.high(SquaredRelu.apply(self.low(x_BD)))  # type: ignore[no-any-return,no-untyped-call]


def parametrised() -> nn.Module:
    norms = nn.utils.parametrizations
    return nn.Sequential(
        norms.weight_norm(nn.Linear(6, 16)), nn.Tanh(), norms.spectral_norm(nn.Linear(16, 16)), nn.ReLU(),
        nn.Linear(16, NUM_CLASSES),
    )  # fmt: skip


class FourierMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 8, 2) * 0.1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x_BTD: Tensor) -> Tensor:
        low = torch.fft.rfft(x_BTD, dim=1)[:, :4] * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft(low, n=x_BTD.shape[1], dim=1).mean(1))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Two of four experts a row, and a balance loss that couples the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(8, 4), nn.Linear(8, NUM_CLASSES)
        self.weights = nn.Parameter(torch.randn(4, 8, 8) * 0.3)

    def forward(self, batch: Any) -> Tensor:
        x_BD, labels = batch
        scores = self.gate(x_BD).softmax(-1)
        weight, chosen = scores.topk(2, -1)
        mixed = (torch.einsum("bkij,bj->bki", self.weights[chosen], x_BD) * weight[..., None]).sum(1)
        load = F.one_hot(chosen, 4).float().mean((0, 1))
        return F.cross_entropy(self.head(F.silu(mixed)), labels) + 0.01 * (load * scores.mean(0)).sum()


def gradient_penalty(model: nn.Module, x_BD: Tensor) -> Tensor:
    inputs = x_BD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    result: Tensor = model(x_BD).mean() + (gradient.norm(dim=1) - 1).square().mean()
    return result


def inner_step(model: nn.Linear, batch: Any) -> Tensor:
    """The loss after a step of descent on a first loss (MAML)."""
    x, y = batch
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight, create_graph=True)
    return F.cross_entropy(F.linear(x + 0.1, model.weight - 0.1 * gradient, model.bias), y)


class Codebook(nn.Module):
    """Vector quantisation with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(6, 4), nn.Embedding(8, 4), nn.Linear(4, 6)

    def forward(self, x_BD: Tensor) -> Tensor:
        z = self.encoder(x_BD)
        code = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        rebuilt = self.decoder(z + (code - z).detach())
        return F.mse_loss(rebuilt, x_BD) + F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())


class Queue(nn.Module):
    """Momentum-free contrast against a queue of earlier rows, which the step shifts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.register_buffer("queue", F.normalize(torch.randn(16, 8), dim=1))

    def forward(self, x_BD: Tensor) -> Tensor:
        query = F.normalize(self.encoder(x_BD), dim=1)
        key = F.normalize(self.encoder(x_BD + 0.1), dim=1).detach()
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().T], 1) / 0.2
        self.queue.copy_(torch.cat([key, self.queue])[:16])
        return F.cross_entropy(logits, torch.zeros(x_BD.shape[0], dtype=torch.long))


def ranking(model: nn.Module, batch: Any) -> Tensor:
    """Cox's partial likelihood: every row's risk set is all rows that live longer."""
    order = batch[1].argsort(descending=True)
    score = model(batch[0]).squeeze(-1)[order]
    return -(score - score.logcumsumexp(0)).mean()


def halves(model: nn.Module, batch: Any) -> Tensor:
    """Gradients accumulated over parts of the batch, inside the loss."""
    parts = zip(batch[0].chunk(2), batch[1].chunk(2), strict=True)
    return torch.stack([F.cross_entropy(model(x), y) for x, y in parts]).mean()


def mixed_up(model: nn.Module, batch: Any) -> Tensor:
    share, order = torch.rand(()), torch.randperm(batch[0].shape[0])
    out = model(share * batch[0] + (1 - share) * batch[0][order])
    return share * F.cross_entropy(out, batch[1]) + (1 - share) * F.cross_entropy(out, batch[1][order])


class Warp(nn.Module):
    """A spatial transformer: sampled where the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.head = nn.Linear(36, 6), nn.Linear(36, NUM_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        grid = F.affine_grid(
            self.where(image.flatten(1)).view(-1, 2, 3) * 0.1 + identity, list(image.shape), align_corners=False
        )
        return self.head(F.grid_sample(image, grid, align_corners=False).flatten(1))  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, dilation=2, padding=2)
        self.up = nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1)
        self.norm = nn.LocalResponseNorm(2)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.norm(F.hardswish(self.down(image.contiguous(memory_format=torch.channels_last))))
        return F.huber_loss(self.up(hidden), image)


def perceptron(*between: nn.Module, width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), *between, nn.Linear(16, NUM_CLASSES))


CASES: dict[str, Case] = {
    "translator": Case(Translator, own_loss, lambda rows: torch.randint(0, 20, (rows, 7))),
    "padded_encoder": Case(PaddedEncoder, classify, padded),
    "bidirectional_lstm": Case(BidirectionalLstm, classify, labelled(5, 6)),
    "recomputed": Case(Recomputed, classify, labelled(6)),
    "own_gradient": Case(OwnGradient, classify, labelled(6)),
    "parametrised": Case(parametrised, classify, labelled(6)),
    "fourier_mixer": Case(FourierMixer, classify, labelled(10, 8)),
    "experts": Case(Experts, own_loss, labelled(8)),
    "gradient_penalty": Case(lambda: perceptron(nn.Softplus()), gradient_penalty, unlabelled(6)),
    "inner_step": Case(lambda: nn.Linear(6, NUM_CLASSES), inner_step, labelled(6)),
    "codebook": Case(Codebook, own_loss, unlabelled(6)),
    "queue": Case(Queue, own_loss, unlabelled(6)),
    "ranking": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
        ranking,
        lambda rows: (torch.randn(rows, 6), torch.rand(rows)),
    ),
    "halves": Case(lambda: perceptron(nn.ReLU()), halves, labelled(6)),
    "mixed_up": Case(lambda: perceptron(nn.ReLU(), nn.Dropout(0.1)), mixed_up, labelled(6)),
    "warp": Case(Warp, classify, labelled(1, 6, 6)),
    "channels_last": Case(ChannelsLast, own_loss, unlabelled(3, 8, 8)),
}

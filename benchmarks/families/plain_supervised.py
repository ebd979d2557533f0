"""Plain PyTorch models with a supervised loss: dense, convolution, recurrent, graph and recommender nets.

Shapes: B batch, T tokens, D model width, H = W image side, N nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.families.base import Batch, Family, Size, Task, generator

NUM_CLASSES = 10
NUM_FEATURES = 20


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def vector_batches(size: Size, num_features: int = NUM_FEATURES) -> Callable[[int], Batch]:
    """Features [B, num_features] and classes [B]."""

    def batches(seed: int) -> Batch:
        features = torch.randn(size.batch, num_features, generator=generator(seed))
        return features, torch.randint(0, NUM_CLASSES, (size.batch,), generator=generator(seed + 1))

    return batches


def mlp_batchnorm(size: Size) -> Task:
    width = 2 * size.width
    model = nn.Sequential(
        nn.Linear(NUM_FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )  # fmt: skip
    return Task(model=model, loss_fn=cross_entropy, batches=vector_batches(size))


class RecurrentClassifier(nn.Module):
    """An LSTM or GRU over [B, T, F]; the last step is classified."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], width: int, num_layers: int) -> None:
        super().__init__()
        self.recurrent = cell(8, width, num_layers=num_layers, batch_first=True)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        output, _ = self.recurrent(sequence)
        result: torch.Tensor = self.head(output[:, -1])
        return result


def _recurrent(cell: type[nn.LSTM] | type[nn.GRU], num_layers: int) -> Callable[[Size], Task]:
    def build(size: Size) -> Task:
        def batches(seed: int) -> Batch:
            sequence = torch.randn(size.batch, size.length, 8, generator=generator(seed))
            return sequence, torch.randint(0, NUM_CLASSES, (size.batch,), generator=generator(seed + 1))

        return Task(model=RecurrentClassifier(cell, size.width, num_layers), loss_fn=cross_entropy, batches=batches)

    return build


def conv1d(size: Size) -> Task:
    width = size.width
    model = nn.Sequential(
        nn.Conv1d(2, width, 5, padding=2), nn.GELU(), nn.MaxPool1d(2),
        nn.Conv1d(width, width, 5, padding=2, groups=4), nn.GroupNorm(4, width), nn.GELU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES),
    )  # fmt: skip

    def batches(seed: int) -> Batch:
        signal = torch.randn(size.batch, 2, 4 * size.length, generator=generator(seed))
        return signal, torch.randint(0, NUM_CLASSES, (size.batch,), generator=generator(seed + 1))

    return Task(model=model, loss_fn=cross_entropy, batches=batches)


def convolution_block(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


class UNet(nn.Module):
    """Two levels with a skip connection: [B, 1, H, W] -> [B, 2, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = convolution_block(1, width)
        self.bottom = convolution_block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = convolution_block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = self.down(image)
        low = self.bottom(F.max_pool2d(skip, 2))
        result: torch.Tensor = self.head(self.merge(torch.cat([self.up(low), skip], dim=1)))
        return result


def unet(size: Size) -> Task:
    def batches(seed: int) -> Batch:
        image = torch.randn(size.batch, 1, size.image, size.image, generator=generator(seed))
        return image, (image[:, 0] > 0.5).long()

    return Task(model=UNet(size.width // 4), loss_fn=cross_entropy, batches=batches)


class GraphConvolution(nn.Module):
    """Two rounds of mean aggregation over a dense adjacency matrix, which may have a batch dim."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, features: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        mean = adjacency / adjacency.sum(dim=-1, keepdim=True).clamp(min=1)
        hidden = F.relu(mean @ self.first(features))
        result: torch.Tensor = self.head(F.relu(mean @ self.second(hidden)))
        return result


def graph_nodes(size: Size) -> Task:
    """One graph whose nodes are the batch: dim 0 of features [N, F], adjacency [N, N] and labels [N]; N = 4 B."""
    num_nodes = 4 * size.batch

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch["features"], batch["adjacency"]), batch["labels"])

    def batches(seed: int) -> Batch:
        features = torch.randn(num_nodes, NUM_FEATURES, generator=generator(seed))
        adjacency = (torch.rand(num_nodes, num_nodes, generator=generator(seed + 1)) < 0.2).float()
        labels = torch.randint(0, NUM_CLASSES, (num_nodes,), generator=generator(seed + 2))
        return {"features": features, "adjacency": torch.maximum(adjacency, adjacency.T), "labels": labels}

    return Task(model=GraphConvolution(size.width), loss_fn=loss_fn, batches=batches)


def graph_molecules(size: Size) -> Task:
    """B small graphs [B, N, N] with one regression target each: the sum over their nodes."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.mse_loss(model(batch["features"], batch["adjacency"]).sum(dim=(1, 2)), batch["target"])

    def batches(seed: int) -> Batch:
        features = torch.randn(size.batch, size.length, NUM_FEATURES, generator=generator(seed))
        shape = (size.batch, size.length, size.length)
        adjacency = (torch.rand(shape, generator=generator(seed + 1)) < 0.3).float()
        return {"features": features, "adjacency": adjacency, "target": features.mean(dim=(1, 2))}

    rates = {"SGD": 1e-4, "AdamW": 1e-3}
    return Task(model=GraphConvolution(size.width), loss_fn=loss_fn, batches=batches, learning_rates=rates)


class Recommender(nn.Module):
    """Embeddings of categories, pooled bags of items and dense features meet in a small MLP."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.users = nn.Embedding(num_items, width)
        self.items = nn.Embedding(num_items, width, padding_idx=0)
        self.dense = nn.Linear(5, width)
        self.top = nn.Sequential(nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(
        self, user: torch.Tensor, item: torch.Tensor, history: torch.Tensor, dense: torch.Tensor
    ) -> torch.Tensor:
        seen = (history != 0).unsqueeze(-1)
        pooled = (self.items(history) * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1)
        features = [self.users(user), self.items(item), pooled, F.relu(self.dense(dense))]
        result: torch.Tensor = self.top(torch.cat(features, dim=-1)).squeeze(-1)
        return result


def recommender(size: Size) -> Task:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        score = model(batch["user"], batch["item"], batch["history"], batch["dense"])
        return F.binary_cross_entropy_with_logits(score, batch["click"])

    def batches(seed: int) -> Batch:
        draw = generator(seed)
        user, item = torch.randint(1, size.vocabulary, (2, size.batch), generator=draw)
        history = torch.randint(0, size.vocabulary, (size.batch, size.length), generator=draw)
        dense = torch.randn(size.batch, 5, generator=draw)
        click = (torch.rand(size.batch, generator=draw) < 0.5).float()
        return {"user": user, "item": item, "history": history, "dense": dense, "click": click}

    return Task(model=Recommender(size.vocabulary, size.width), loss_fn=loss_fn, batches=batches)


class MaskedTransformer(nn.Module):
    """`nn.TransformerEncoder` over token and position embeddings, output tied to the input embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        nn.init.normal_(self.tokens.weight, std=0.05)  # it also produces the logits
        self.positions = nn.Parameter(torch.randn(size.length, size.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, dim_feedforward=size.hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(self.tokens(tokens) + self.positions))
        return result


def masked_tokens(size: Size) -> Task:
    """Cross-entropy of a few masked tokens: their number differs from row to row."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    def batches(seed: int) -> Batch:
        tokens = torch.randint(2, size.vocabulary, (size.batch, size.length), generator=generator(seed))
        share = torch.linspace(0.1, 0.6, size.batch).unsqueeze(1)
        chosen = torch.rand(tokens.shape, generator=generator(seed + 1)) < share
        chosen[0, 0] = True
        return {"tokens": torch.where(chosen, 1, tokens), "labels": torch.where(chosen, tokens, -100)}

    return Task(model=MaskedTransformer(size), loss_fn=loss_fn, batches=batches)


class MixtureDensity(nn.Module):
    """Weights, means and scales of K Gaussians for each sample (C. Bishop, "Mixture density networks", 1994)."""

    def __init__(self, width: int, num_components: int = 5) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 3 * num_components)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight, mean, log_scale = self.head(self.trunk(inputs)).chunk(3, dim=-1)
        return F.log_softmax(weight, dim=-1), mean, log_scale.clamp(-5, 3)


def mixture_density(size: Size) -> Task:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        log_weight, mean, log_scale = model(batch[0])
        distance = (batch[1].unsqueeze(-1) - mean) * torch.exp(-log_scale)
        return -torch.logsumexp(log_weight - log_scale - 0.5 * distance**2, dim=-1).mean()

    def batches(seed: int) -> Batch:
        inputs = torch.randn(4 * size.batch, 3, generator=generator(seed))
        return inputs, torch.sin(inputs.sum(dim=1))

    return Task(model=MixtureDensity(size.width), loss_fn=loss_fn, batches=batches)


PLAIN_SUPERVISED: tuple[Family, ...] = (
    Family(name="mlp_batchnorm", kind="dense", build=mlp_batchnorm),
    Family(name="lstm", kind="recurrent", build=_recurrent(nn.LSTM, 1)),
    Family(name="gru", kind="recurrent", build=_recurrent(nn.GRU, 2)),
    Family(name="conv1d", kind="conv", build=conv1d),
    Family(name="unet", kind="conv", build=unet),
    Family(name="graph_nodes", kind="graph", build=graph_nodes),
    Family(name="graph_molecules", kind="graph", build=graph_molecules),
    Family(name="recommender", kind="recommender", build=recommender),
    Family(name="masked_tokens", kind="encoder", build=masked_tokens),
    Family(name="mixture_density", kind="dense", build=mixture_density),
)

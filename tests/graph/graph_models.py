"""Small models, losses and batches that cover what a training step may do; each returns (model, loss_fn, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, Callable[[Any, Any], torch.Tensor], Any]


def images(num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num, 3, 8, 8), torch.randint(0, 5, (num,))


def rows(num: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num, 8), torch.randint(0, 4, (num,))


def classify(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def square(model: Any, batch: Any) -> torch.Tensor:
    out = model(batch)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


def mlp() -> Case:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), classify, rows()


def batch_norm_and_dropout() -> Case:
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(16, 4)
    return nn.Sequential(*layers), classify, rows()


def convolution_net() -> Case:
    body = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(96, 5)), classify, images()


def instance_and_group_norm() -> Case:
    body = nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.GroupNorm(2, 6)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)), classify, images()


def eval_mode() -> Case:
    model, loss_fn, batch = convolution_net()
    return model.eval(), loss_fn, batch


def double_precision() -> Case:
    return nn.Linear(8, 4).double(), lambda m, b: m(b.double()).square().sum(), rows()[0]


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.body(self.embedding(tokens), src_mask=mask, is_causal=True))


def tied_language_model() -> Case:
    tokens = torch.randint(0, 20, (3, 7))
    return TiedLanguageModel(), lambda m, b: F.cross_entropy(m(b).flatten(0, 1), b.flatten()), tokens


def frozen_and_unreached() -> Case:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 4), "unused": nn.Linear(3, 3)})
    model["a"].requires_grad_(False)
    return model, lambda m, b: F.cross_entropy(m["b"](m["a"](b[0])), b[1]), rows()


def nested_batch() -> Case:
    batch = {
        "x": [torch.randn(5, 8), (None, torch.randn(5, 8))],
        "scale": 0.5,
        "mode": "sum",
        "weight": torch.tensor(2.0),
    }

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        first, (nothing, second) = batch["x"]
        assert nothing is None and batch["mode"] == "sum"
        return (model(first) * batch["scale"] + model(second) * batch["weight"]).sum()

    return nn.Linear(8, 2), loss_fn, batch


def closed_over_tensors() -> Case:
    weights, teacher = torch.rand(4), nn.Linear(8, 4)
    model, _, batch = mlp()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        out = model(batch[0])
        return F.cross_entropy(out, batch[1], weight=weights) + F.mse_loss(out, teacher(batch[0]).detach())

    return model, loss_fn, batch


class PlainAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.scale = torch.rand(4)  # neither parameter nor buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + torch.tensor([1.0, 2.0, 3.0, 4.0])


def plain_attribute() -> Case:
    return PlainAttribute(), classify, rows()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("unused", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x.mul_(2.0))
        y = x.clone()
        y[:, :4] += 1.0
        y[0].zero_()
        self.count[1] += 1.0
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)  # replaced, not written to
        return y.relu_().view(-1, 4)


def in_place() -> Case:
    return InPlace(), square, torch.randn(6, 8)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8))
        self.head, self.reentrant = nn.Linear(8, 4), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, self.head.weight.sum() * x, use_reentrant=self.reentrant))


def checkpointed() -> Case:
    return Checkpointed(False), classify, rows()


def checkpointed_reentrant() -> Case:
    return Checkpointed(True), classify, rows()


class Straight(torch.autograd.Function):
    """Rounds; its gradient is twice the incoming one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient + 0 * x.cos()


def custom_function() -> Case:
    return nn.Linear(8, 4), lambda m, b: F.cross_entropy(Straight.apply(m(b[0])), b[1]), rows()


def gradient_penalty() -> Case:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x = batch.requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.mean() + (slope.norm(dim=1) - 1).square().mean()

    return model, loss_fn, torch.randn(6, 8)


def detached_parts() -> Case:
    model = nn.ModuleDict({"online": nn.Linear(8, 8), "head": nn.Linear(8, 8)})

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            target = F.normalize(model["online"](batch.flip(0)), dim=1)
        return (model["head"](model["online"](batch)) * target).sum() + model["online"](batch).detach().sum()

    return model, loss_fn, torch.randn(6, 8)


def adversarial() -> Case:
    model = nn.ModuleDict(
        {"generator": nn.Linear(3, 8), "critic": nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 1))}
    )

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        fake = model["generator"](torch.randn(batch.shape[0], 3))
        critic = model["critic"]
        real_loss = F.softplus(-critic(batch)).mean() + F.softplus(critic(fake.detach())).mean()
        for parameter in critic.parameters():
            parameter.requires_grad_(False)
        generator_loss = F.softplus(-critic(fake)).mean()
        for parameter in critic.parameters():
            parameter.requires_grad_(True)
        return real_loss + generator_loss

    return model, loss_fn, torch.randn(6, 8)


def autocast() -> Case:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch[0])
        assert out.dtype is torch.bfloat16
        return F.cross_entropy(out.float(), batch[1])

    return mlp()[0], loss_fn, rows()


def low_precision_loss() -> Case:
    return nn.Linear(8, 4).bfloat16(), lambda m, b: m(b.bfloat16()).square().mean(), torch.randn(6, 8)


def called_twice() -> Case:
    return nn.Linear(8, 8), lambda m, b: m(F.relu(m(b))).square().mean(), torch.randn(6, 8)


def recurrent(kind: str) -> Case:
    model = getattr(nn, kind)(8, 6, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
    return model, square, torch.randn(3, 5, 8)


def lstm() -> Case:
    return recurrent("LSTM")


def gru() -> Case:
    return recurrent("GRU")


def elman() -> Case:
    return recurrent("RNN")


def random_ops() -> Case:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        torch.rand(3)  # drawn and thrown away: it moves the generator
        out = torch.sigmoid(model(batch))
        draws = torch.bernoulli(out.detach()) + torch.randint(0, 3, out.shape) + torch.randn_like(out)
        order = torch.randperm(out.shape[0])
        noise = torch.empty(out.shape).uniform_(-1.0, 1.0) + torch.normal(0.0, 1.0, out.shape)
        sample = torch.multinomial(out.detach(), 2).float().sum(1, keepdim=True)
        return (out[order] * draws + noise * out).mean() + (sample * out).mean()

    return nn.Linear(8, 4), loss_fn, torch.randn(6, 8)


class MovingAverage(nn.Module):
    """A frozen copy that the step itself moves towards the trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(8, 4), nn.Linear(8, 4)
        self.target.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            goal = self.target(x)
        return (self.online(x) - goal).square().mean()


def moving_average() -> Case:
    return MovingAverage(), lambda m, b: m(b), torch.randn(6, 8)


class Routed(nn.Module):
    """Mixture of experts with a dense mask."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mixed = mixed + expert(x) * (weights * (chosen == index)).sum(-1, keepdim=True)
        return mixed


def routed() -> Case:
    return Routed(), square, torch.randn(6, 8)


def weight_norm() -> Case:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    second = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))
    return nn.Sequential(first, nn.ReLU(), second), classify, rows()


def penalty_of_parameters() -> Case:
    model, _, batch = mlp()
    return model, lambda m, b: classify(m, b) + 0.1 * sum(p.square().sum() for p in m.parameters()), batch


class Counting(nn.Module):
    """Counts its calls and keeps its last result, a table and a list: harmless Python state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.calls, self.last, self.table, self.seen = 0, None, None, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.arange(4) / 4
        self.last = self.linear(x)
        self.seen.append(self.last.detach())
        return self.last * self.table


def counting() -> Case:
    return Counting(), classify, rows()


def attention_without_projection() -> Case:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x = model(batch).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(x[0], x[1], x[2], is_causal=True).square().mean()

    return nn.Linear(8, 24), loss_fn, torch.randn(2, 5, 8)


def checked_values() -> Case:
    """Validation of values, which raises or does nothing, as ``torch.distributions`` does it."""

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        mean, spread = model(batch[0]).chunk(2, dim=1)
        if batch[1].max() >= 4:
            raise ValueError("labels must be below 4")
        return -torch.distributions.Normal(mean, spread.exp()).log_prob(batch[1].float()[:, None]).mean()

    return nn.Linear(8, 4), loss_fn, rows()


CASES: tuple[Callable[[], Case], ...] = (
    mlp, batch_norm_and_dropout, convolution_net, instance_and_group_norm, eval_mode, double_precision,
    tied_language_model, frozen_and_unreached, nested_batch, closed_over_tensors, plain_attribute, in_place,
    checkpointed, checkpointed_reentrant, custom_function, gradient_penalty, detached_parts, adversarial, autocast,
    low_precision_loss, called_twice, lstm, gru, elman, random_ops, moving_average, routed, weight_norm,
    penalty_of_parameters, counting, attention_without_projection, checked_values,
)  # fmt: skip

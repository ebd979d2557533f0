"""Plain PyTorch models whose loss is not supervised: generative, energy, contrastive and reinforcement nets.

Shapes: B batch, F features, Z latent width, H = W image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from benchmarks.families.base import Batch, Family, Size, Task, generator
from benchmarks.families.plain_supervised import NUM_FEATURES, convolution_block, vector_batches


def _pixels(size: Size, seed: int) -> torch.Tensor:
    """Binary images as vectors [B, 64]."""
    return (torch.rand(size.batch, 64, generator=generator(seed)) < 0.4).float()


class VariationalAutoencoder(nn.Module):
    """D. Kingma and M. Welling, "Auto-encoding variational Bayes" (2013); draws the noise of the latent itself."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(pixels).chunk(2, dim=-1)
        latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(latent), mean, log_variance


def vae(size: Size) -> Task:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, mean, log_variance = model(batch)
        rebuilt = F.binary_cross_entropy_with_logits(logits, batch, reduction="sum")
        divergence = -0.5 * torch.sum(1 + log_variance - mean**2 - log_variance.exp())
        result: torch.Tensor = (rebuilt + divergence) / batch.shape[0]
        return result

    def batches(seed: int) -> Batch:
        return _pixels(size, seed)

    rates = {"SGD": 1e-3, "AdamW": 1e-3}
    return Task(model=VariationalAutoencoder(2 * size.width, 8), loss_fn=loss_fn, batches=batches, learning_rates=rates)


class Adversaries(nn.Module):
    """Generator and discriminator in one module (I. Goodfellow et al., "Generative adversarial nets", 2014)."""

    def __init__(self, width: int, latent: int = 8) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, NUM_FEATURES))
        self.discriminator = nn.Sequential(nn.Linear(NUM_FEATURES, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


def gan(size: Size) -> Task:
    """One loss for both nets: fakes are detached for the discriminator, and its weights for the generator."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        assert isinstance(model, Adversaries)
        fake = model.generator(torch.randn(batch.shape[0], model.latent))
        real_score, fake_score = model.discriminator(batch), model.discriminator(fake.detach())
        frozen = {name: weight.detach() for name, weight in model.discriminator.named_parameters()}
        fooled = functional_call(model.discriminator, frozen, (fake,))
        return F.softplus(-real_score).mean() + F.softplus(fake_score).mean() + F.softplus(-fooled).mean()

    def batches(seed: int) -> Batch:
        return torch.randn(size.batch, NUM_FEATURES, generator=generator(seed)) * 0.5 + 1

    return Task(model=Adversaries(2 * size.width), loss_fn=loss_fn, batches=batches)


class Denoiser(nn.Module):
    """A small convolution net that is told the noise level: [B, 1, H, W], [B] -> [B, 1, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        shift = self.level(level[:, None])[:, :, None, None]
        hidden = F.silu(self.norm(self.first(image)) + shift)
        result: torch.Tensor = self.head(F.silu(self.second(hidden)))
        return result


def diffusion(size: Size) -> Task:
    """Predict the noise (J. Ho et al., "Denoising diffusion probabilistic models", 2020)."""
    num_levels = 100
    keep = torch.cumprod(1 - torch.linspace(1e-4, 0.02, num_levels), dim=0)

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        time = torch.randint(0, num_levels, (batch.shape[0],))
        noise = torch.randn_like(batch)
        kept = keep[time][:, None, None, None]
        noisy = kept.sqrt() * batch + (1 - kept).sqrt() * noise
        return F.mse_loss(model(noisy, time.float() / num_levels), noise)

    def batches(seed: int) -> Batch:
        return torch.randn(size.batch, 1, size.image // 2, size.image // 2, generator=generator(seed))

    return Task(model=Denoiser(size.width // 2), loss_fn=loss_fn, batches=batches)


class BoltzmannMachine(nn.Module):
    """Restricted Boltzmann machine; `forward` gives the free energy [B] of visible units [B, 64]."""

    def __init__(self, num_hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, num_hidden) * 0.05)
        self.visible_bias = nn.Parameter(torch.zeros(64))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))

    def forward(self, visible: torch.Tensor) -> torch.Tensor:
        return -visible @ self.visible_bias - F.softplus(visible @ self.weight + self.hidden_bias).sum(dim=1)

    @torch.no_grad()
    def sample(self, visible: torch.Tensor) -> torch.Tensor:
        """One step of Gibbs sampling."""
        hidden = torch.bernoulli(torch.sigmoid(visible @ self.weight + self.hidden_bias))
        return torch.bernoulli(torch.sigmoid(hidden @ self.weight.T + self.visible_bias))


def boltzmann(size: Size) -> Task:
    """Contrastive divergence with one step (G. Hinton, "Training products of experts", 2002)."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        assert isinstance(model, BoltzmannMachine)
        result: torch.Tensor = (model(batch) - model(model.sample(batch).detach())).mean()
        return result

    def batches(seed: int) -> Batch:
        return _pixels(size, seed)

    return Task(model=BoltzmannMachine(size.width), loss_fn=loss_fn, batches=batches)


class ActorCritic(nn.Module):
    def __init__(self, width: int, num_actions: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.policy = nn.Linear(width, num_actions)
        self.value = nn.Linear(width, 1)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(state)
        return self.policy(hidden), self.value(hidden).squeeze(-1)


def policy_gradient(size: Size) -> Task:
    """Actions are drawn from the policy in the loss, rewarded by a table, reinforced above a learned baseline."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, value = model(batch["state"])
        log_policy = F.log_softmax(logits, dim=-1)
        action = torch.multinomial(log_policy.detach().exp(), 1)
        reward = batch["rewards"].gather(1, action).squeeze(1)
        advantage = (reward - value).detach()
        reinforced = log_policy.gather(1, action).squeeze(1) * advantage
        entropy = -(log_policy.exp() * log_policy).sum(dim=-1)
        result: torch.Tensor = (-reinforced + 0.5 * (reward - value) ** 2 - 0.01 * entropy).mean()
        return result

    def batches(seed: int) -> Batch:
        state = torch.randn(4 * size.batch, 6, generator=generator(seed))
        return {"state": state, "rewards": torch.randn(4 * size.batch, 4, generator=generator(seed + 1))}

    return Task(model=ActorCritic(size.width), loss_fn=loss_fn, batches=batches)


def proximal_policy(size: Size) -> Task:
    """The clipped objective on recorded actions, advantages normalised over the batch (J. Schulman et al., 2017)."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, value = model(batch["state"])
        log_policy = F.log_softmax(logits, dim=-1).gather(1, batch["action"][:, None]).squeeze(1)
        advantage = (batch["return"] - value).detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        ratio = torch.exp(log_policy - batch["old_log_policy"])
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        result: torch.Tensor = (0.5 * (batch["return"] - value) ** 2 - gain).mean()
        return result

    def batches(seed: int) -> Batch:
        draw = generator(seed)
        num_rows = 4 * size.batch
        return {
            "state": torch.randn(num_rows, 6, generator=draw),
            "action": torch.randint(0, 4, (num_rows,), generator=draw),
            "return": torch.randn(num_rows, generator=draw),
            "old_log_policy": torch.log(0.25 + 0.1 * torch.rand(num_rows, generator=draw)),
        }

    return Task(model=ActorCritic(size.width), loss_fn=loss_fn, batches=batches)


class ContrastiveEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(convolution_block(3, width), nn.MaxPool2d(4), convolution_block(width, width))
        self.head = nn.Linear(width, 16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.features(image).mean(dim=(2, 3))), dim=-1)


def contrastive(size: Size) -> Task:
    """Two views of each image against all others of the batch (T. Chen et al., "SimCLR", 2020)."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        num_rows = batch["first"].shape[0]
        embedding = torch.cat([model(batch["first"]), model(batch["second"])])
        similarity = embedding @ embedding.T / 0.5
        itself = torch.eye(2 * num_rows, dtype=torch.bool)
        partner = (torch.arange(2 * num_rows) + num_rows) % (2 * num_rows)
        return F.cross_entropy(similarity.masked_fill(itself, -1e9), partner)

    def batches(seed: int) -> Batch:
        image = torch.randn(size.batch, 3, size.image // 2, size.image // 2, generator=generator(seed))
        return {"first": image, "second": image + 0.1 * torch.randn(image.shape, generator=generator(seed + 1))}

    return Task(model=ContrastiveEncoder(size.width // 2), loss_fn=loss_fn, batches=batches)


def gradient_penalty(size: Size) -> Task:
    """A critic whose slope is held at 1 (I. Gulrajani et al., 2017): the loss holds a gradient."""
    width = 2 * size.width
    model = nn.Sequential(
        nn.Linear(NUM_FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
    )

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        features, classes = batch
        inputs = features.detach().requires_grad_(True)
        score = model(inputs).squeeze(-1)
        (slope,) = torch.autograd.grad(score.sum(), inputs, create_graph=True)
        penalty = (slope.square().sum(dim=1).add(1e-6).sqrt() - 1).square().mean()
        result: torch.Tensor = (score * torch.where(classes < 5, 1.0, -1.0)).mean() + 10 * penalty
        return result

    rates = {"SGD": 1e-3, "AdamW": 1e-3}
    return Task(model=model, loss_fn=loss_fn, batches=vector_batches(size), learning_rates=rates)


PLAIN_OTHER: tuple[Family, ...] = (
    Family(name="vae", kind="generative", build=vae, draws=True),
    Family(name="gan", kind="generative", build=gan, draws=True),
    Family(name="diffusion", kind="generative", build=diffusion, draws=True),
    Family(name="boltzmann", kind="energy", build=boltzmann, draws=True),
    Family(name="policy_gradient", kind="reinforcement", build=policy_gradient, draws=True),
    Family(name="proximal_policy", kind="reinforcement", build=proximal_policy),
    Family(name="contrastive", kind="contrastive", build=contrastive),
    Family(name="gradient_penalty", kind="energy", build=gradient_penalty),
)

"""The tasks of `benchmarks.connections`: networks whose connections are learnt.

digits    64-100-50-10 perceptron on scikit-learn's digits (1,437 to learn from, 360 to judge by)
noisy     the same with 448 more inputs that say nothing: 512-100-50-10
teacher   one layer of 200 inputs and 50 outputs, on 2,000 samples of another one: tanh of five inputs each, with noise

All methods train by the same optimizer, learning rate, steps, batches and first weights of a seed. These settings were
chosen among ten for digits, and among a few for the teacher, by the scores of RigL, SET and static connections on the
same data that is judged by here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.method_tasks import Batch, digits

STEPS = 1200
UNTIL = STEPS * 3 // 4  # three quarters of the steps, as in the paper of RigL
EVERY = 20
FRACTION = 0.3

NUM_PIXELS, NUM_NOISE = 64, 448
TEACHER_INPUTS, TEACHER_OUTPUTS, TEACHER_FAN_IN, TEACHER_SAMPLES, TEACHER_NOISE = 200, 50, 5, 2000, 0.1


@dataclass(frozen=True)
class Task:
    """What is trained, with which share of its connections."""

    name: str
    density: float
    rows: int = 128  # of a batch
    lr: float = 3e-3  # of Adam, at first; it falls to zero along a cosine

    def model(self, seed: int, widths: tuple[int, int] = (100, 50)) -> Any:
        import torch
        from torch import nn

        torch.manual_seed(seed)
        if self.name == "teacher":
            return nn.Sequential(nn.Linear(TEACHER_INPUTS, TEACHER_OUTPUTS, bias=False), nn.Tanh())
        first, second = widths
        return nn.Sequential(
            nn.Linear(self.num_inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
        )

    @property
    def num_inputs(self) -> int:
        return {"digits": NUM_PIXELS, "noisy": NUM_PIXELS + NUM_NOISE, "teacher": TEACHER_INPUTS}[self.name]

    def small_widths(self, num_parameters: int) -> tuple[int, int]:
        """Of a dense network with about as many parameters, and hidden layers of the same proportions."""

        def count(first: int, second: int) -> int:
            return first * (self.num_inputs + 1) + second * (first + 1) + 10 * (second + 1)

        choices = [(first, max(1, round(first / 2))) for first in range(1, 101)]
        return min(choices, key=lambda widths: abs(count(*widths) - num_parameters))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches for ever."""
        import torch

        x, y = self._data(seed)[:2]
        random = torch.Generator().manual_seed(1000 + seed)
        while True:
            chosen = torch.randint(0, len(x), (self.rows,), generator=random)
            yield x[chosen], y[chosen]

    def judge(self, model: Any, masks: Mapping[str, Any], seed: int) -> dict[str, float]:
        """Digits: percent of right answers (`score`) on data that was not learnt from, and the share of the first
        layer's connections that come from pixels (`real_inputs`). Teacher: precision and recall of its connections."""
        if self.name == "teacher":
            return _found(model[0].weight.detach(), masks, _teacher(seed)[2])
        import torch

        *_, x, y = self._data(seed)
        with torch.no_grad():
            right = (model(x.to(model[0].weight.dtype)).argmax(1) == y).double().mean()
        found = {"score": 100 * float(right)}
        first = masks.get("0.weight")
        if first is not None and self.name == "noisy":
            found["real_inputs"] = float(first[:, :NUM_PIXELS].sum() / first.sum())
        return found

    def _data(self, seed: int) -> tuple[Any, ...]:
        if self.name == "teacher":
            return _teacher(seed)
        return digits(images=False) if self.name == "digits" else _noisy_digits()


def loss_of(model: Any, batch: Batch) -> Any:
    import torch.nn.functional as F

    out, wanted = model(batch[0]), batch[1]
    return F.mse_loss(out, wanted) if wanted.is_floating_point() else F.cross_entropy(out, wanted)


def _found(weight: Any, masks: Mapping[str, Any], truth: Any) -> dict[str, float]:
    """Of a dense weight the largest elements are taken, as many as are true."""
    import torch

    mask = masks.get("0.weight")
    if mask is None:
        mask = torch.zeros_like(truth)
        mask.view(-1)[weight.abs().view(-1).topk(int(truth.sum())).indices] = True
    both = float((mask & truth).sum())
    return {"precision": both / float(mask.sum()), "recall": both / float(truth.sum())}


@cache
def _noisy_digits() -> tuple[Any, Any, Any, Any]:
    """Noise of a normal distribution beside the pixels, as spread as these."""
    import torch

    x, y, x_judged, y_judged = digits(images=False)
    random = torch.Generator().manual_seed(5)
    noise = x.std() * torch.randn(len(x) + len(x_judged), NUM_NOISE, generator=random)
    return torch.cat([x, noise[: len(x)]], 1), y, torch.cat([x_judged, noise[len(x) :]], 1), y_judged


@cache
def _teacher(seed: int) -> tuple[Any, Any, Any]:
    """Samples, and which connections are true."""
    import torch

    random = torch.Generator().manual_seed(100 + seed)
    places = torch.rand(TEACHER_OUTPUTS, TEACHER_INPUTS, generator=random).topk(TEACHER_FAN_IN, dim=1).indices
    truth = torch.zeros(TEACHER_OUTPUTS, TEACHER_INPUTS, dtype=torch.bool).scatter_(1, places, True)
    weight = torch.randn(TEACHER_OUTPUTS, TEACHER_INPUTS, generator=random) * truth
    x = torch.randn(TEACHER_SAMPLES, TEACHER_INPUTS, generator=random)
    noise = TEACHER_NOISE * torch.randn(TEACHER_SAMPLES, TEACHER_OUTPUTS, generator=random)
    return x, torch.tanh(x @ weight.T) + noise, truth


TASKS = {
    "digits, 90 %": Task("digits", 0.1),
    "digits, 97 %": Task("digits", 0.03),
    "teacher": Task("teacher", TEACHER_FAN_IN / TEACHER_INPUTS, rows=500, lr=1e-2),
    "noisy digits, 98 %": Task("noisy", 0.02),
}

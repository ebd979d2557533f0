"""Convolutions in channels last: the same results, everything that leaves lies as before, taken only where they pay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import partita
from partita.cost import layouts
from partita.runtime.segments import fits, python_code

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import assert_trains_alike, compiled, traced

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Net(nn.Module):
    """Convolutions of every kind, with what stands between them in networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.strided = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        hidden = hidden + self.depthwise(hidden)
        hidden = self.up(torch.nn.functional.gelu(self.strided(hidden)))
        hidden = torch.nn.functional.max_pool2d(hidden, 2)
        return self.last(hidden.flatten(1))


def step_of(model: nn.Module):
    """A function that gives the loss and all gradients, and what it takes."""
    names = [name for name, _ in model.named_parameters()]

    def step(x: Tensor, y: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        loss = torch.nn.functional.cross_entropy(found, y)
        return loss, *torch.autograd.grad(loss, values)

    values = [value.detach().clone().requires_grad_() for value in model.parameters()]
    return step, [torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,)), *values]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def chosen(monkeypatch):
    """Has it taken as faster, or not."""

    def set_to(faster: bool) -> None:
        monkeypatch.setattr(layouts.CHOICES, "of", lambda modules, num_threads: list(modules) if faster else [])

    return set_to


@pytest.mark.parametrize("compiles", [False, True])
def test_a_step_of_convolutions_gives_the_same_and_leaves_everything_as_it_lay(net, compiles):
    step, examples = step_of(net)
    module = _joint(step, examples)
    changed = layouts.in_channels_last(module)
    assert changed is not None
    found = layouts.convolutions(changed)
    assert len(found) == len(layouts.convolutions(module)) == 8
    for node in found:
        images = [arg.meta["val"] for arg in node.args[: 2 if node.target is layouts.FORWARD else 3]]
        assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
    values = [example.detach() for example in examples]
    results = compiled(changed, values) if compiles else python_code(changed.graph, changed)(torch.Generator(), *values)
    for result, expected in zip(results, step(*examples), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)
        assert fits(result, expected.stride())


def _joint(step, examples):
    with FakeTensorMode() as mode:
        return make_fx(step)(*[mode.from_tensor(item) for item in examples])


def test_what_reads_memory_as_it_lies_finds_it_as_before():
    def function(x: Tensor, w: Tensor) -> Tensor:
        hidden = torch.conv2d(x, w, padding=1)
        return torch.as_strided(hidden, (2, 36), (36, 1)) + hidden.view(2, 4, 36)[:, 0]

    examples = (torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3))
    module = traced(function, *examples)
    changed = layouts.in_channels_last(module)
    assert changed is not None
    torch.testing.assert_close(changed(*examples), function(*examples))


def test_permuted_results_lie_as_before():
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.conv2d(x, w)
        return hidden.permute(2, 0, 3, 1), hidden

    examples = (torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3))
    changed = layouts.in_channels_last(traced(function, *examples))
    assert changed is not None
    for one, two in zip(changed(*examples), function(*examples), strict=True):
        torch.testing.assert_close(one, two)
        assert one.stride() == two.stride()


def test_results_that_are_no_dense_memory_keep_a_module_as_it_is(chosen):
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w)[:, :2]

    chosen(True)
    module = traced(function, torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3))
    assert layouts.in_channels_last(module) is None
    assert layouts.with_channels_last(module, 1) is module


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.conv1d(x[0], x[0, :, :, :3]), lambda x: torch.conv2d(x.double(), x.double()), torch.neg],
    ids=["one dim", "float64", "none"],
)
def test_a_module_without_such_convolutions_stays_as_it_is(function, chosen):
    chosen(True)
    module = traced(function, torch.randn(3, 3, 5, 5))
    assert layouts.with_channels_last(module, 1) is module


@pytest.mark.parametrize(("other_s", "is_taken"), [(0.5, True), (0.99, False)])
def test_it_is_measured_once_and_taken_where_it_is_clearly_faster(net, monkeypatch, tmp_path, other_s, is_taken):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    measured = []

    def times(node):
        measured.append(node.name)
        return [1.0, other_s]

    monkeypatch.setattr(layouts, "times_of", times)
    layouts.CHOICES.forget()
    try:
        module = _joint(*step_of(net))
        for _ in range(2):
            assert (layouts.with_channels_last(module, 1) is not module) == is_taken
            assert len(measured) == 4, "the backward passes"
        layouts.with_channels_last(module, 2)
        assert len(measured) == 8, "other threads, other times"
    finally:
        layouts.CHOICES.forget()


def test_both_ways_are_timed_for_every_convolution(net):
    module = _joint(*step_of(net))
    for node in layouts.convolutions(module):
        own_s, other_s = layouts.times_of(node)
        assert 0 < own_s < 1 and 0 < other_s < 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_net_trains_alike_in_channels_last(chosen, compiled):
    chosen(True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 8))
    batches = [(torch.randn(8, 3, 8, 8), torch.randn(8, 8)) for _ in range(4)]
    plan = partita.Constraints(data=2, pipeline=1, num_microbatches=1, threads_per_worker=1, compiled=compiled)
    assert_trains_alike(model, batches, plan, rtol=1e-4, atol=1e-5)

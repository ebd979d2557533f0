"""Every family trains in plain PyTorch, is small, and repeats itself given its seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.utils._pytree as pytree

from benchmarks import families
from benchmarks.families import Family, Task
from benchmarks.families.base import SIZES

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and its dependencies

NAMES = [family.name for family in families.FAMILIES]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def train(family: Family, task: Task, num_steps: int) -> list[float]:
    optimizer = families.make_optimizer("SGD", task)
    losses = []
    for index in range(num_steps):
        torch.manual_seed(index)
        optimizer.zero_grad()
        loss = task.loss_fn(task.model, task.batches(index))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_there_are_enough_families_of_every_kind() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 34
    from_transformers = [family for family in families.FAMILIES if family.source == "transformers"]
    assert len(from_transformers) >= 22
    covered = {family.kind for family in from_transformers}
    wanted = {"encoder", "decoder", "encoder-decoder", "vision", "conv", "audio", "mixture-of-experts", "state-space"}
    assert wanted <= covered


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_repeats(name: str) -> None:
    family = families.get(name)
    first, second = family.task(seed=3), family.task(seed=3)
    assert first.num_parameters < 300_000
    losses = train(family, first, 2)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses == train(family, second, 2)
    trainable = [item for item in first.model.named_parameters() if item[1].requires_grad]
    for parameter_name, parameter in trainable:
        assert parameter.grad is not None, f"{parameter_name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), parameter_name
    moved = [parameter.grad.abs().max() > 0 for _, parameter in trainable if parameter.grad is not None]
    assert all(moved)


@pytest.mark.parametrize("name", NAMES)
def test_batches(name: str) -> None:
    task = families.get(name).task()
    leaves, again, other = (pytree.tree_leaves(task.batches(seed)) for seed in (0, 0, 5))
    assert all(torch.equal(one, two) for one, two in zip(leaves, again, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(leaves, other, strict=True))
    assert all(one.shape == two.shape for one, two in zip(leaves, other, strict=True))
    rows = {leaf.shape[0] for leaf in leaves}
    assert len(rows) == 1
    assert rows.pop() % SIZES["tiny"].batch == 0


@pytest.mark.parametrize("name", NAMES)
def test_draws_tells_whether_the_loss_depends_on_the_seed(name: str) -> None:
    family = families.get(name)
    task = family.task()
    batch = task.batches(0)
    losses = set()
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        losses.add(float(task.loss_fn(task.model, batch).detach()))
    assert (len(losses) > 1) == family.draws


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm", "vae"])
def test_small_scale_is_larger(name: str) -> None:
    family = families.get(name)
    tiny, small = family.task("tiny"), family.task("small")
    assert small.num_parameters > tiny.num_parameters
    assert train(family, small, 1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="a family must be one of: bert"):
        families.get("bertt")
    task = families.get("lstm").task()
    with pytest.raises(ValueError, match='optimizer must be "SGD" or "AdamW"'):
        families.make_optimizer("Adam", task)
    assert [family.name for family in families.select("lstm, gru")] == ["lstm", "gru"]
    assert families.select(None) == families.FAMILIES

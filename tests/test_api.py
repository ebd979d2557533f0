"""The public API: its names, what it gives, and how it refuses what cannot be used."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import partita
from partita import Constraints, InputError, PlanError

ALONE = Constraints(num_workers=1, threads_per_worker=1, compiled=False)
TWO = Constraints(data=2, pipeline=1, num_workers=2, threads_per_worker=1, num_microbatches=1, compiled=False)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(rows: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def loss_fn(model: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(pair[0]), pair[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_plainly(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list) -> list[float]:
    losses = []
    for item in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, item)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_all_is_exactly_the_public_names() -> None:
    for name in partita.__all__:
        assert getattr(partita, name) is not None
    public = {name for name in vars(partita) if not name.startswith("_")}
    packages = {name for name in public if type(getattr(partita, name)).__name__ == "module"}
    assert public - packages == set(partita.__all__) - packages
    assert callable(partita.plan), "partita.plan is the function, not the module"


def test_import_before_torch_lets_waiting_threads_sleep() -> None:
    code = "import partita, os; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    clean = {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=120)
    assert done.stdout.split() == ["passive", "0"], done.stderr


@pytest.mark.parametrize("constraints", [ALONE, TWO], ids=["one worker", "two data workers"])
def test_a_scheduler_and_a_partial_last_batch(constraints: Constraints) -> None:
    batches = [batch(8, 1), batch(8, 2), batch(5, 3), batch(8, 4), batch(1, 5)]
    plain, ours = net(), net()
    plain_optimizer, optimizer = sgd(plain), sgd(ours)
    schedulers = [torch.optim.lr_scheduler.StepLR(item, 2, 0.5) for item in (plain_optimizer, optimizer)]
    expected = []
    for item in batches:
        expected += train_plainly(plain, plain_optimizer, [item])
        schedulers[0].step()
    with partita.parallelize(ours, optimizer, loss_fn, batches[0], plan=constraints) as step:
        found = []
        for item in batches:
            result = step(item)
            schedulers[1].step()
            found.append(result.loss)
            assert result.num_samples == item[0].shape[0] and result.samples_per_s > 0
        clone = net()
        step.sync_to(clone)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(clone.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in ours.parameters()]
    wanted = [plain_optimizer.state[p]["momentum_buffer"] for p in plain.parameters()]
    torch.testing.assert_close(momentum, wanted, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_continues_under_another_plan(tmp_path) -> None:
    batches = [batch(8, seed) for seed in range(6)]
    plain = net()
    expected = train_plainly(plain, sgd(plain), batches)
    model = net()
    with partita.parallelize(model, sgd(model), loss_fn, batches[0], plan=TWO) as step:
        for item in batches[:3]:
            step(item)
        step.save(tmp_path)
    other = net()
    with partita.parallelize(other, sgd(other), loss_fn, batches[0], plan=ALONE) as step:
        step.load(tmp_path)
        assert step.num_steps == 3
        assert [step(item).loss for item in batches[3:]] == pytest.approx(expected[3:], rel=1e-5)


def test_the_automatic_plan_measured_plain_pytorch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))  # no plan of an earlier run
    model, optimizer = net(), None
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    with partita.parallelize(model, optimizer, loss_fn, batch(), compile=False) as step:
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random_state)
        for _ in range(20_000):  # turns have more steps the shorter these are
            assert math.isfinite(step(batch()).loss)
            if step.is_settled:
                break
        assert step.is_settled and step.plan.measured_step_time_s is not None
        texts = [item.description for item in step.plan.alternatives]
        assert step.plan.mode == "block" or any("plain PyTorch" in text for text in texts)


def test_plan_without_devices_from_a_meta_model() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    cluster = partita.Cluster.preset("2x1xcpu-16")
    plan = partita.plan(model, loss_fn, batch(64), cluster=cluster)
    assert plan.prediction is not None and plan.prediction.step_time_s >= plan.prediction.lower_bound_s
    assert "plan" in str(plan)


def test_a_model_that_cannot_be_captured_trains_as_one_block() -> None:
    def branching(model: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = loss_fn(model, pair)
        return loss * 2 if loss.item() > 100 else loss

    model = net()
    with pytest.warns(partita.FallbackWarning, match=r"_local_scalar_dense.*test_api.py:\d+"):
        step = partita.parallelize(model, sgd(model), branching, batch(), plan=TWO)
    with step:
        plain = net()
        expected = train_plainly(plain, sgd(plain), [batch(8, 1), batch(8, 2)])
        assert [step(batch(8, 1)).loss, step(batch(8, 2)).loss] == pytest.approx(expected, rel=1e-5)


def test_an_exception_of_the_model_keeps_its_traceback() -> None:
    class Raising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = net(), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            y = self.inner(x)
            if y.sum().item() > -1e9 and self.calls > 3:
                raise RuntimeError("the model broke on purpose")
            return y

    model = Raising()
    with pytest.warns(partita.FallbackWarning):
        step = partita.parallelize(model, sgd(model), loss_fn, batch(), plan=ALONE)
    with step, pytest.raises(RuntimeError, match="on purpose") as caught:
        for _ in range(5):
            step(batch())
    assert any(entry.name == "forward" for entry in caught.traceback)


class TestBadInput:
    def test_empty_batch(self) -> None:
        model = net()
        with pytest.raises(InputError, match="at least one row"):
            partita.parallelize(model, sgd(model), loss_fn, batch(0), plan=ALONE)
        with pytest.raises(InputError, match="at least one tensor"):
            partita.parallelize(model, sgd(model), loss_fn, (), plan=ALONE)
        with partita.parallelize(model, sgd(model), loss_fn, batch(), plan=ALONE) as step:
            with pytest.raises(InputError, match="at least one row"):
                step(batch(0))
            step(batch())  # a refused batch harms nothing

    def test_fewer_rows_than_data_workers(self) -> None:
        model = net()
        with pytest.raises(InputError, match=r"1 rows for\s+data=2"):
            partita.parallelize(model, sgd(model), loss_fn, batch(1), plan=TWO)

    def test_loss_that_is_no_scalar(self) -> None:
        model = net()
        with pytest.raises(InputError, match=r"scalar tensor, but got shape \(8, 3\)"):
            partita.parallelize(model, sgd(model), lambda m, pair: m(pair[0]), batch(), plan=ALONE)
        with pytest.raises(InputError, match="scalar tensor, but got float"):
            partita.parallelize(model, sgd(model), lambda m, pair: 1.0, batch(), plan=ALONE)

    def test_loss_that_does_not_depend_on_the_parameters(self) -> None:
        model = net()
        with pytest.raises(InputError, match="depend on"):
            partita.parallelize(model, sgd(model), lambda m, pair: pair[0].mean(), batch(), plan=ALONE)

    def test_nan_loss_names_the_step_and_if_asked_the_op(self) -> None:
        def logarithm(model: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return model(pair[0]).mean() + torch.log(pair[0]).mean()

        good, bad = (batch()[0].abs(), batch()[1]), batch()
        model = net()
        with partita.parallelize(model, sgd(model), logarithm, good, plan=ALONE) as step:
            step(good)
            with pytest.raises(partita.NonFiniteLossError, match="step 2"):
                step(bad)
        model = net()
        before = copy.deepcopy(model.state_dict())
        with partita.parallelize(model, sgd(model), logarithm, good, plan=TWO, check_finite="op") as step:
            with pytest.raises(partita.NonFiniteLossError, match=r"log.*test_api.py:\d+"):
                step(bad)
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_plan_for_another_model_or_cluster_or_corrupt(self, tmp_path) -> None:
        model = net()
        with partita.parallelize(model, sgd(model), loss_fn, batch(), plan=ALONE) as step:
            step.plan.save(tmp_path / "plan.json")
        other = nn.Linear(6, 3)
        plan = partita.Plan.load(tmp_path / "plan.json")
        with pytest.raises(PlanError, match="another|graph"):
            partita.parallelize(other, sgd(other), loss_fn, batch(), plan=plan)
        elsewhere = partita.plan(model, loss_fn, batch(), cluster=partita.Cluster.preset("2x1xcpu-16"))
        with pytest.raises(PlanError, match="cluster"):
            partita.parallelize(model, sgd(model), loss_fn, batch(), plan=elsewhere)
        (tmp_path / "broken.json").write_text('{"mode": "graph", ')
        with pytest.raises(PlanError, match=r"broken\.json"):
            partita.Plan.load(tmp_path / "broken.json")

    def test_unknown_preset_and_typo_in_a_cluster_file(self, tmp_path) -> None:
        with pytest.raises(partita.ClusterError, match="H100"):
            partita.Cluster.preset("4x8xH1000")
        path = tmp_path / "cluster.toml"
        partita.Cluster.preset("1x1xcpu-4").save(path)
        path.write_text(path.read_text().replace("latency_s", "latencys", 1))
        with pytest.raises(partita.ClusterError, match=r"latencys.*latency_s"):
            partita.Cluster.load(path)

    def test_arguments(self) -> None:
        model = net()
        with pytest.raises(InputError, match="sync"):
            partita.parallelize(model, sgd(model), loss_fn, batch(), sync="sometimes")
        with pytest.raises(InputError, match="plan must be"):
            partita.parallelize(model, sgd(model), loss_fn, batch(), plan="fast")
        stranger = torch.optim.SGD(net().parameters(), lr=0.1)
        with pytest.raises(InputError, match="holds none"):
            partita.parallelize(model, stranger, loss_fn, batch(), plan=ALONE)
        with pytest.raises(InputError, match="closure"):
            partita.parallelize(model, torch.optim.LBFGS(model.parameters()), loss_fn, batch(), plan=ALONE)
        with pytest.raises(InputError, match="described cluster"):
            partita.parallelize(model, sgd(model), loss_fn, batch(), cluster=partita.Cluster.preset("1x1xcpu-4"))

    def test_another_structure(self) -> None:
        model = net()
        with partita.parallelize(model, sgd(model), loss_fn, batch(), plan=ALONE) as step:
            with pytest.raises(InputError, match="structure"):
                step([*batch()])
            with pytest.raises(InputError, match="dims, dtype"):
                step((batch()[0].double(), batch()[1]))

    def test_a_closed_step(self) -> None:
        model = net()
        step = partita.parallelize(model, sgd(model), loss_fn, batch(), plan=ALONE)
        step.close()
        with pytest.raises(partita.StepError, match="closed"):
            step(batch())

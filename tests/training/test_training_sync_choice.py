"""``sync="auto"``: what methods are reckoned to cost, the rule for their steps, and the choice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import auto_job
from test_training_processes import run_job

import partita
from benchmarks.loss_curves import mean_of, steps_to, target_of
from partita.cluster.model import Cluster
from partita.cost.collectives import collective_time_s
from partita.cost.overheads import Overheads
from partita.cost.sums import FREE_SUM, SumCost
from partita.errors import InputError
from partita.plan import Worker
from partita.training.sync import (
    BY_NAME,
    DGC,
    DiLoCo,
    Exact,
    GradientMethod,
    LocalSGD,
    PowerSGD,
    Rounded,
    StreamingDiLoCo,
    TopK,
)
from partita.training.sync.choice import BONUS, Estimate, brief, candidates, decide
from partita.training.sync.method import Part, Peers
from partita.training.sync.pricing import MOST_ELEMENTS, periodic_cost, sum_cost
from partita.training.sync.steps import steps_factor

PARTS = [Part("weight", (96, 64)), Part("bias", (96,)), Part("empty", (0, 3))]
ADAMW = torch.optim.AdamW([torch.zeros(1)])
SGD = torch.optim.SGD([torch.zeros(1)], lr=0.1)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "methods.json"
CURVES = Path(__file__).parents[2] / "benchmarks" / "data" / "loss_curves.json"
REPLICAS = {"local sgd H=5": LocalSGD(every=5), "diloco H=20": DiLoCo(every=20), "diloco H=50": DiLoCo(every=50)}


@pytest.mark.parametrize("name", [name for name, method in BY_NAME.items() if isinstance(method, GradientMethod)])
@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_a_sum_costs_the_bytes_of_its_formula(name: str, num_processes: int) -> None:
    method, peers = BY_NAME[name], Peers(tuple(range(num_processes)), 1)
    assert isinstance(method, GradientMethod)
    cost = sum_cost(method, PARTS, peers)
    assert cost.sent_share == method.sent_bytes(PARTS, peers) / Exact().sent_bytes(PARTS, peers)
    assert (cost.compute_s_per_byte == 0) == (name == "exact")


def test_nothing_costs_nothing() -> None:
    assert sum_cost(Rounded(to="int8"), [], Peers((0, 1), 0)) == SumCost()
    assert sum_cost(Rounded(to="int8"), PARTS, Peers((0,), 0)) == SumCost()


def test_large_models_are_priced_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    method = Rounded(to="int8")
    monkeypatch.setattr(
        Rounded, "sum_of",
        lambda self, parts, peers: made.append(sum(p.num_elements for p in parts)) or Exact().sum_of(parts, peers),
    )  # fmt: skip
    cost = sum_cost(method, [Part(f"{i}", (MOST_ELEMENTS // 4,)) for i in range(40)], Peers((0, 1), 0))
    assert made == [MOST_ELEMENTS] and cost.sent_share == pytest.approx(0.254, abs=1e-3)


@pytest.mark.parametrize(
    "method",
    [LocalSGD(every=3), DiLoCo(every=10, compress=Rounded(to="int4")), StreamingDiLoCo(every=20, fragments=2)],
)
def test_agreements_cost_the_bytes_of_their_formula(method: Any) -> None:
    peers = Peers((0, 1, 2), 0)
    cost = periodic_cost(method, PARTS, peers)
    assert cost.sent_bytes == method.sent_bytes(PARTS, peers) and cost.compute_s > 0
    whole = method.sent_bytes(PARTS, peers) * method.every
    assert whole / 2 < cost.bytes_at_once <= whole


def test_sums_between_processes_take_the_bytes_and_the_computing_of_a_method() -> None:
    cluster = Cluster.preset("2x1xcpu-4")
    group = tuple(Worker(index=i, process=i, machine=i, cores=(0,), stage=0, data=i) for i in range(2))

    def time_s(sums: SumCost, num_bytes: int = 10**6) -> float:
        return collective_time_s(cluster, "all_reduce", num_bytes, group, overheads=Overheads(), sums=sums)

    latency_s = time_s(SumCost(), 0)
    assert time_s(FREE_SUM) == pytest.approx(latency_s)
    assert time_s(SumCost(0.25)) - latency_s == pytest.approx((time_s(SumCost()) - latency_s) / 4)
    assert time_s(SumCost(1.0, 1e-6)) - time_s(SumCost()) == pytest.approx(1.0)
    alone = collective_time_s(cluster, "all_reduce", 10**6, group[:1], overheads=Overheads(), sums=SumCost(1.0, 1e-6))
    assert alone == 0


def test_the_rule_for_steps_fits_what_was_measured_of_a_decoder() -> None:
    """It may be too careful, but hardly too hopeful."""
    rows = {row["method"]: row for row in json.loads(RESULTS.read_text())["rows"] if row["task"] == "chars"}
    known = {
        "bf16": Rounded(to="bf16"), "int8": Rounded(to="int8"), "int4": Rounded(to="int4"),
        "local sgd H=5": LocalSGD(every=5), "local sgd H=21": LocalSGD(every=21),
        "local sgd H=105": LocalSGD(every=105), "diloco H=10": DiLoCo(every=10), "diloco H=20": DiLoCo(every=20),
        "diloco H=50": DiLoCo(every=50), "diloco H=50, int4": DiLoCo(every=50, compress=Rounded(to="int4")),
        "streaming diloco H=50, int4": StreamingDiLoCo(every=50, delay=2),
    }  # fmt: skip
    for name, method in known.items():
        factor = steps_factor(method, 4, ADAMW)
        assert factor is not None
        assert 0.95 < factor / rows[name]["steps_factor"] < 1.1, name


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("task", ["digits", "conv"])
def test_with_sgd_replicas_need_no_more_steps_than_the_rule_says(task: str, num: int) -> None:
    curves = {key.rsplit(", ", 2)[0]: value["curves"] for key, value in json.loads(CURVES.read_text()).items()}
    mean = {name: mean_of(curves[f"{task}, {num} processes, {name}"]) for name in ("exact", *REPLICAS)}
    needed = {name: steps_to(curve, target_of(mean["exact"])) for name, curve in mean.items()}
    for name, method in REPLICAS.items():
        factor, with_adamw, found = steps_factor(method, num, SGD), steps_factor(method, num, ADAMW), needed[name]
        assert factor is not None and with_adamw is not None and factor < with_adamw
        assert found is not None and needed["exact"] is not None and found / needed["exact"] <= factor, name
    assert steps_factor(DiLoCo(every=50), 16, SGD) == pytest.approx(steps_factor(DiLoCo(every=50), 13, ADAMW))


def test_methods_of_which_too_little_is_known_have_no_rule() -> None:
    for method in (TopK(), DGC(), PowerSGD(rank=1), Rounded(to="int8", error_feedback=False), BY_NAME["gossip"]):
        assert steps_factor(method, 2, SGD) is None
    assert steps_factor(PowerSGD(rank=4), 2, ADAMW) is None and steps_factor(PowerSGD(rank=4), 2, SGD) is not None
    assert steps_factor(DiLoCo(every=20, compress=TopK()), 2, SGD) is None
    assert steps_factor(DiLoCo(every=100), 4, SGD) is None and steps_factor(StreamingDiLoCo(), 4, ADAMW) is None


@given(st.integers(1, 1000), st.integers(2, 64))
def test_more_steps_apart_never_need_fewer_steps(every: int, num: int) -> None:
    now, later = (steps_factor(LocalSGD(every=h), num, ADAMW) for h in (every, every + 1))
    more = steps_factor(LocalSGD(every=every), num + 1, ADAMW)
    assert now is not None and later is not None and more is not None
    assert 1 <= now <= later <= num and now <= more


def test_candidates_have_a_rule_and_are_different() -> None:
    for optimizer in (SGD, ADAMW):
        found = candidates(optimizer, 4, replicas=True)
        assert isinstance(found[0], Exact) and len({repr(method) for method in found}) == len(found)
        assert any(isinstance(method, PowerSGD) for method in found) == (optimizer is SGD)
    assert all(isinstance(method, GradientMethod) for method in candidates(SGD, 4, replicas=False))


@given(st.lists(st.tuples(st.floats(1e-4, 1e2), st.floats(1, 4)), min_size=1, max_size=6), st.floats(1e-4, 1e2))
def test_who_reaches_a_loss_first_is_chosen_but_exact_training_for_a_little_more(
    others: list[tuple[float, float]], exact_s: float
) -> None:
    def estimate(method: Any, step_time_s: float, factor: float) -> Estimate:
        return Estimate(method=method, plan="", step_time_s=step_time_s, sent_bytes=0.0, steps_factor=factor)

    estimates = [estimate(LocalSGD(every=i + 1), *other) for i, other in enumerate(others)]
    choice = decide([*estimates, estimate(Exact(), exact_s, 1.0)], "equivalent-loss")
    fastest_s = min(one.time_to_loss_s for one in estimates)
    assert isinstance(choice.method, Exact) == (exact_s * (1 - BONUS) <= fastest_s)
    near = [i for i, one in enumerate(estimates) if one.time_to_loss_s * (1 - BONUS) <= fastest_s]
    assert isinstance(choice.method, Exact) or choice.method == LocalSGD(every=near[0] + 1)
    assert choice.reason and len(choice.explain().splitlines()) == len(others) + 2


def test_a_method_is_told_by_the_settings_that_are_its_own() -> None:
    assert brief(DiLoCo(every=50, compress=Rounded(to="int4"))) == "DiLoCo(every=50, compress=Rounded(to='int4'))"
    assert brief(Exact()) == "Exact()"


def test_a_tolerance_belongs_to_auto() -> None:
    model = auto_job.build()
    arguments: Any = (
        model,
        torch.optim.SGD(model.parameters()),
        auto_job.loss_fn,
        (torch.zeros(4, 64), torch.zeros(4)),
    )
    with pytest.raises(InputError, match='belongs to sync="auto"'):
        partita.parallelize(*arguments, sync="int8", tolerance="exact")
    with pytest.raises(InputError, match="tolerance must be one of"):
        partita.parallelize(*arguments, sync="auto", tolerance="any")  # type: ignore[arg-type]


def test_alone_training_is_exact() -> None:
    model, batch = auto_job.build(), (torch.randn(8, 64), torch.zeros(8, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters())
    with partita.parallelize(
        model, optimizer, auto_job.loss_fn, batch, sync="auto", tolerance="equivalent-loss", plan=partita.Constraints(
            data=1, compiled=False)
    ) as step:  # fmt: skip
        assert step.choice is not None and "one process" in step.choice.reason
        assert isinstance(step.choice.method, Exact)


def test_two_processes_choose_alike_and_train_by_what_they_chose(tmp_path: Path) -> None:
    one, other = run_job("auto", tmp_path, Path(auto_job.__file__))
    assert {name: found["method"] for name, found in one.items()} == {
        name: found["method"] for name, found in other.items()
    }
    are_replicas = one["slow"]["method"].startswith(("DiLoCo", "StreamingDiLoCo", "LocalSGD"))
    assert (one["slow"]["losses"] != other["slow"]["losses"]) == are_replicas  # of each replica's own rows
    assert one["slow, exact"]["method"] == one["slow, by default"]["method"] == "Exact()"
    assert one["slow, one plan"]["method"] in ("Rounded(to='int4', error_feedback=None)",), one["slow, one plan"]["why"]
    assert one["slow, one plan"]["losses"] == other["slow, one plan"]["losses"]
    times = dict(one["slow"]["estimates"])
    first_s, *others_s = times.values()
    assert others_s == sorted(others_s) and len(times) > 5
    assert first_s * (1 - BONUS) <= min(times.values())
    assert one["slow"]["method"] == next(iter(times))

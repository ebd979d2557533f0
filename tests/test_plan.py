"""Plan files, validation and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cluster.model import Cluster, Link, Machine, Process
from partita.errors import InputError, PlanError
from partita.plan import Alternative, Constraints, Plan, Prediction, cluster_fingerprint
from partita.planner import worker_layout


def make_cluster(num_processes: int = 2, cores: int = 2) -> Cluster:
    machine = Machine(name="m", cores=tuple(range(num_processes * cores)), memory_bytes=2**30)
    processes = tuple(
        Process(rank=rank, machine=0, cores=tuple(range(rank * cores, (rank + 1) * cores)))
        for rank in range(num_processes)
    )
    link = Link(bytes_per_s=1e9)
    return Cluster(machines=(machine,), processes=processes, network=link, process_link=link)


def make_plan(data: int = 2, pipeline: int = 2) -> Plan:
    cluster = make_cluster()
    return Plan(
        mode="graph",
        graph_fingerprint="abc",
        cluster_fingerprint=cluster_fingerprint(cluster),
        axes={"pipeline": pipeline, "data": data},
        workers=worker_layout(cluster, data, pipeline, data * pipeline, 1),
        threads_per_worker=1,
        num_microbatches=2,
        stage_starts=tuple(f"op{i}" for i in range(1, pipeline)),
        shares=(3,) * data,
        prediction=Prediction(step_time_s=0.2, lower_bound_s=0.1, uncertainty=0.15, memory_bytes={"0": 1024}),
        alternatives=(
            Alternative(description="other", predicted_step_time_s=0.3, measured_step_time_s=0.4, reason="Slower."),
        ),
        reasons=("It is fast.",),
    )


@given(st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (3, 2)]))
@settings(max_examples=10, deadline=None)
def test_json_round_trip_keeps_everything(mesh: tuple[int, int]) -> None:
    plan = make_plan(*mesh)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    make_plan().save(path)
    assert Plan.load(path) == make_plan()
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_truncation_is_a_plan_error(data: st.DataObject) -> None:
    text = make_plan().to_json()
    end = data.draw(st.integers(0, len(text) - 2))
    with pytest.raises(PlanError, match="corrupt"):
        Plan.from_json(text[:end])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", 99, "version must be 1"),
        ("version", None, "version"),
        ("threads_per_worker", 0, "at least 1"),
        ("threads_per_worker", "two", "threads_per_worker"),
        ("mode", "magic", "mode"),
        ("schedule", "zigzag", "schedule"),
        ("axes", {"pipeline": 3, "data": 2}, "workers"),
        ("axes", {"pipelin": 2, "data": 2}, "axes"),
        ("axes", {"pipeline": 2, "data": 2, "tensor": 2}, "tensor"),
        ("stage_starts", [], "stage_starts"),
        ("shares", [1], "shares"),
        ("shares", [0, 6], "at least 1 row"),
        ("workers", [], "workers"),
        ("num_microbatch", 3, "Did you mean 'num_microbatches'"),
    ],
)
def test_mutated_files_are_refused(field: str, value: Any, words: str) -> None:
    raw = json.loads(make_plan().to_json())
    raw[field] = value
    with pytest.raises(PlanError, match=words):
        Plan.from_json(json.dumps(raw).encode())


def test_two_workers_at_one_coordinate_are_refused() -> None:
    raw = json.loads(make_plan().to_json())
    raw["workers"][1]["data"] = 0
    with pytest.raises(PlanError, match=r"\(0, 0, 0\)"):
        Plan.from_json(json.dumps(raw).encode())


def test_unknown_field_of_a_worker_is_refused() -> None:
    raw = json.loads(make_plan().to_json())
    raw["workers"][1]["colour"] = "red"
    with pytest.raises(PlanError, match="colour"):
        Plan.from_json(json.dumps(raw).encode())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compiled": "yes"}, "compiled must be True, False or None, but got str 'yes'"),
        ({"compiled": 1}, "compiled must be"),
        ({"local_statistics": None}, "local_statistics must be True, False, but got None"),
        ({"stage_starts": 5}, "stage_starts must be a tuple of names"),
        ({"stage_starts": "addmm"}, r"Pass e\.g\. \('addmm',\)"),
        ({"stage_starts": (1,)}, "stage_starts must be"),
    ],
)
def test_constraints_of_the_wrong_type(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Constraints(**options)
    assert Constraints(stage_starts=["addmm"]).stage_starts == ("addmm",)  # type: ignore[arg-type]


def test_what_is_no_path_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for call in (Plan.load, make_plan().save, Cluster.load, Cluster.preset("1x1xcpu-2").save):
        with pytest.raises(InputError, match=r"must be a path.*but got None"):
            call(None)  # type: ignore[operator]
    with pytest.raises(PlanError, match="must be writable"):
        make_plan().save(tmp_path / "file" / "plan.json")


@pytest.mark.parametrize("name", [None, 5])
def test_a_preset_is_a_name(name: Any) -> None:
    with pytest.raises(InputError, match="name of a preset must be a text"):
        Cluster.preset(name)


def test_hash_sees_what_runs_and_not_what_is_told() -> None:
    plan = make_plan()
    assert msgspec.structs.replace(plan, reasons=("x",), measured_step_time_s=3.0).hash == plan.hash
    assert msgspec.structs.replace(plan, compiled=True).hash != plan.hash


def test_another_cluster_is_named() -> None:
    plan = make_plan()
    with pytest.raises(PlanError, match=r"processes \[0, 1\], the cluster has \[0\]"):
        plan.validate(_FakeGraph(), make_cluster(num_processes=1))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="owns cores"):
        plan.validate(_FakeGraph(), make_cluster(cores=1))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="fingerprint"):
        plan.validate(_FakeGraph(), _renamed())  # type: ignore[arg-type]


def _renamed() -> Cluster:
    cluster = make_cluster()
    return msgspec.structs.replace(cluster, machines=(msgspec.structs.replace(cluster.machines[0], cpu="other"),))


class _FakeNode:
    name = "op1"


class _FakeGraph:
    fingerprint = "abc"
    batch_size = 6
    nodes = (_FakeNode(),)


def test_the_right_graph_is_accepted_and_others_are_named() -> None:
    make_plan().validate(_FakeGraph(), make_cluster())  # type: ignore[arg-type]
    other = _FakeGraph()
    other.fingerprint = "zzz"
    with pytest.raises(PlanError, match=r"abc.*zzz"):
        make_plan().validate(other, make_cluster())  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="op9"):
        msgspec.structs.replace(make_plan(), stage_starts=("op9",)).validate(_FakeGraph(), make_cluster())  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="block"):
        make_plan().validate(None, make_cluster())


def test_texts_tell_the_plan() -> None:
    plan = make_plan()
    assert "4 workers: data 2 x pipeline 2" in str(plan)
    text = plan.explain()
    for part in (
        "200 ms",
        "100 ms",
        "gap 50%",
        "15%",
        "It is fast.",
        "other",
        "measured 400 ms",
        "cores 3",
        plan.hash,
    ):
        assert part in text
    assert plan.diff(plan) == ""
    assert plan.diff(msgspec.structs.replace(plan, compiled=True)) == "compiled: false -> true"


@pytest.mark.parametrize("name", ["data", "pipeline", "num_workers", "threads_per_worker", "num_microbatches"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_constraints_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        Constraints(**{name: value})


def test_constraints_must_agree() -> None:
    Constraints(data=2, pipeline=2, tensor=1, num_workers=4)
    with pytest.raises(InputError, match="set it to 4"):
        Constraints(data=2, pipeline=2, num_workers=3)
    with pytest.raises(InputError, match="set it to 8"):
        Constraints(data=2, pipeline=2, tensor=2, num_workers=4)
    with pytest.raises(InputError, match="Did you mean '1f1b'"):
        Constraints(schedule="1f1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiple"):
        Constraints(num_workers=3, data=2)
    with pytest.raises(InputError, match="stage_starts"):
        Constraints(pipeline=3, stage_starts=("a",))

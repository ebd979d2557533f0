"""Rows of unknown files: with facts taken away or replaced by something else they are predicted or refused with the
reason, never anything else; multi-node and mixed rows behave as the machines they describe."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planner.scale.rows import Refusal, measured_step_time_s, ran_out_of_memory
from partita.planner.scale.runs import read_run

NODE: dict[str, Any] = {
    "source": "here", "model": "GPT 3.6B", "layers": 30, "hidden": 3072, "heads": 32, "kv_heads": 32, "ffn": 12288,
    "vocab": None, "seq": 2048, "params_b": 3.6, "gpu": "A100", "n_gpus": 64, "gpus_per_node": 8, "tp": 2, "pp": 2,
    "vpp": 1, "dp": 16, "cp": 1, "ep": 1, "micro_batch": 2, "global_batch": 512, "remat": "full", "dtype": None,
    "zero_fsdp": None, "schedule": "1f1b", "tflops_per_gpu": 100.0, "tokens_per_s_per_gpu": None, "step_time_s": None,
    "mfu": None, "memory_gib": None, "url": "here", "notes": None, "flops_convention": "hardware",
}  # fmt: skip
GROUP = {"machines": 2, "gpus": 4, "gpu": "A100-40GB", "intra_bytes_per_s": 3e11, "inter_bytes_per_s": 1.25e10}
SLOW = GROUP | {"gpu": "V100-16GB", "intra_bytes_per_s": None}
MIXED: dict[str, Any] = NODE | {
    "gpu": "A100 and V100", "n_gpus": 16, "gpus_per_node": 4, "tp": 2, "pp": 4, "dp": 2, "global_batch": 64,
    "micro_batch": 1, "cluster": [GROUP, SLOW], "pipeline_cuts": [10, 20, 28], "step_time_s": 4.0,
}  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([0.5, -1.0, 1e9, math.nan, math.inf]),
    st.sampled_from(["", "none", "8", "A100", "H100", "zero3", "unknown", "out of memory"]),
    st.sampled_from([[], {}, [1, 2], [None], [GROUP, SLOW], [GROUP | {"machines": None}], [{"gpu": 3}]]),
)  # fmt: skip


def _outcome(row: dict[str, Any]) -> tuple[float, float | None] | str:
    try:
        found = read_run(row).predict()
        measured_s = measured_step_time_s(row)
    except Refusal as error:
        return str(error)
    assert math.isfinite(found.step_time_s) and found.step_time_s > 0
    assert math.isfinite(found.peak_memory_bytes) and found.peak_memory_bytes > 0
    assert sum(found.parts.values()) == pytest.approx(found.step_time_s)
    assert measured_s is None or (math.isfinite(measured_s) and measured_s > 0)
    return found.step_time_s, measured_s


@settings(max_examples=200, deadline=None)
@given(row=st.sampled_from([NODE, MIXED]), absent=st.sets(st.sampled_from(sorted(MIXED)), max_size=4))
def test_absent_facts_are_filled_or_refused(row: dict[str, Any], absent: set[str]) -> None:
    outcome = _outcome(row | dict.fromkeys(absent))
    needed = {"layers", "hidden", "heads", "seq", "micro_batch", "global_batch"}
    if isinstance(outcome, str):
        assert outcome and absent & (needed | {"model", "gpu", "n_gpus", "cluster", "tp", "pp", "dp"}), outcome
    else:
        assert not absent & needed


@settings(max_examples=300, deadline=None)
@given(row=st.sampled_from([NODE, MIXED]), changes=st.dictionaries(st.sampled_from(sorted(MIXED)), VALUES, max_size=3))
def test_odd_values_are_refused_not_crashed_on(row: dict[str, Any], changes: dict[str, Any]) -> None:
    _outcome(row | changes)


@settings(max_examples=20, deadline=None)
@given(row=st.sampled_from([NODE | {"cluster": [GROUP | {"machines": 8, "gpus": 8}]}, MIXED]), factor=st.floats(1.1, 9))
def test_faster_links_never_take_longer(row: dict[str, Any], factor: float) -> None:
    for name in ("intra_bytes_per_s", "inter_bytes_per_s"):
        groups = [group | {name: (group[name] or 1e11) * factor} for group in row["cluster"]]
        same = [group | {name: group[name] or 1e11} for group in row["cluster"]]
        faster, before = (read_run(row | {"cluster": one}).predict().step_time_s for one in (groups, same))
        assert faster <= before * (1 + 1e-9)


@pytest.mark.parametrize("gpus", [16, 64, 128, 256, 512])
def test_more_machines_for_the_same_batch_are_faster(gpus: int) -> None:
    row = NODE | {"tp": 8, "pp": 2, "n_gpus": gpus, "dp": gpus // 16}
    more = row | {"n_gpus": 2 * gpus, "dp": gpus // 8}
    assert read_run(more).predict().step_time_s < read_run(row).predict().step_time_s


def test_a_mixed_cluster_is_between_its_kinds() -> None:
    fast, slow = ([GROUP | {"machines": 4, "gpu": gpu}] for gpu in ("A100-40GB", "V100-16GB"))
    even = MIXED | {"pipeline_cuts": None}
    times = [read_run(even | {"cluster": one}).predict().step_time_s for one in (fast, MIXED["cluster"], slow)]
    assert times[0] < times[1] <= times[2] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("notes", "ran_out"),
    [
        ("OOM", True), ("failed: CUDA out of memory.", True), ("out-of-memory at step 1", True), ("OOMs", True),
        ("does not fit", True), ("CUDA error: out of GPU memory", True), ("Room for more", False), (None, False),
        ("memory = params + act", False), ("no OOM seen", False), ("without running out of memory", False),
    ],
)  # fmt: skip
def test_notes_about_memory(notes: str | None, ran_out: bool) -> None:
    assert ran_out_of_memory({"notes": notes}) is ran_out

"""Rows of measured runs: what is filled in, what is refused, mixed clusters, and fits that find planted constants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from partita.cost.calibration import Calibration
from partita.errors import InputError
from partita.planner.scale.fit import fit
from partita.planner.scale.rows import Refusal, measured_step_time_s, read_rows
from partita.planner.scale.runs import Measured, measured_runs, read_run

ROW: dict[str, Any] = {
    "source": "here", "model": "GPT-1.3B", "layers": 24, "hidden": 2048, "heads": 16, "seq": 1024, "gpu": "A100-40GB",
    "n_gpus": 16, "gpus_per_node": 8, "tp": 2, "pp": 4, "dp": 2, "micro_batch": 2, "global_batch": 64, "remat": "full",
    "dtype": "fp16", "schedule": "1f1b", "step_time_s": 1.0,
}  # fmt: skip
LLAMA = ROW | {"model": "Llama-3-8B", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336,
               "gpu": "H100", "dtype": "bf16"}  # fmt: skip


def test_facts_of_the_family_fill_in() -> None:
    run = read_run(ROW)
    assert (run.model.ffn, run.model.vocab, run.model.kv_heads) == (8192, 51200, None)
    assert run.num_microbatches == 16 and run.degrees.num_devices == 16 and run.remat == "full"
    assert {"ffn = 4 hidden", "kv_heads = heads", "vocab = 51200"} <= set(run.assumed)
    assert run.model.dropout and not run.model.fused_attention and not run.overlap_data
    modern = read_run(LLAMA)
    assert modern.model.gated and modern.model.vocab == 128256 and modern.model.fused_attention
    assert modern.split.sequence_parallel and modern.overlap_data


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seq": None}, "seq is absent"),
        ({"layers": None}, "layers is absent"),
        ({"heads": None}, "heads is absent"),
        ({"micro_batch": None}, "micro_batch is absent"),
        ({"global_batch": None}, "global_batch is absent"),
        ({"gpu": "TPU v4"}, "GPU must be one of"),
        ({"gpu": None}, "GPU must be one of"),
        ({"tp": None, "pp": None}, "tp and pp are absent"),
        ({"dp": 4}, "tp x pp x cp x dp = 32, but there are 16"),
        ({"global_batch": 63}, "must divide global_batch 63"),
        ({"ep": 8}, "experts"),
        ({"model": "Mixtral-8x7B"}, "experts"),
        ({"model": "T5-11B"}, "t5 is not a stack"),
        ({"zero_fsdp": "hsdp"}, "hybrid sharding"),
        ({"notes": "LoRA"}, "lora"),
        ({"zero_fsdp": "zero3 +cpu-offload"}, "offload"),
        ({"zero_fsdp": "zero7"}, "zero must be 0 to 3"),
        ({"schedule": "chimera"}, "schedule 'chimera' is not known"),
        ({"remat": "some"}, "remat 'some' is not known"),
        ({"params_b": 13.0}, "params_b is 13.0"),
        ({"layers": 2.5}, "layers must be a whole number"),
        ({"layers": "24"}, "layers must be a whole number"),
        ({"hidden": 1e308}, "hidden must be a whole number"),
        ({"heads": 15}, "heads must divide hidden"),
        ({"model": "Own-1B", "ffn": None}, "ffn is absent"),
        ({"model": "Llama-3-8B", "ffn": 14336}, "kv_heads is absent"),
        ({"pipeline_cuts": [3]}, "pipeline_cuts must name the 3 layers"),
    ],
)
def test_refusals_name_the_fact(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Refusal, match=why):
        read_run(ROW | change).predict()


def test_what_only_the_prediction_sees_is_refused_too() -> None:
    with pytest.raises(Refusal, match="V100-16 must compute in one of"):
        read_run(LLAMA | {"gpu": "V100-16GB"}).predict()
    with pytest.raises(Refusal, match="a block for each chunk"):
        read_run(ROW | {"layers": 3, "vpp": 2, "params_b": None}).predict()


def test_one_absent_degree_follows() -> None:
    assert read_run(ROW | {"dp": None}).degrees.data == 2
    assert read_run(ROW | {"dp": None}).predict() == read_run(ROW).predict()


def test_the_least_recomputation_that_fits() -> None:
    small = read_run(LLAMA | {"remat": None})
    assert small.predict() == read_run(LLAMA | {"remat": "none"}).predict()
    large = LLAMA | {"remat": None, "tp": 1, "pp": 1, "dp": 16, "micro_batch": 16, "global_batch": 256,
                     "zero_fsdp": "zero1", "seq": 8192}  # fmt: skip
    assert read_run(large).predict() == read_run(large | {"remat": "full"}).predict()


def test_mixed_clusters_and_cuts() -> None:
    fast = {"machines": 1, "gpus": 8, "gpu": "A100-40GB", "intra_bytes_per_s": 3e11, "inter_bytes_per_s": 1.25e10}
    slow = {"machines": 2, "gpus": 4, "gpu": "T4", "intra_bytes_per_s": None, "inter_bytes_per_s": 1.25e10}
    mixed = ROW | {"cluster": [fast, slow], "gpu": "A100 and T4"}
    run = read_run(mixed)
    assert [group.kind.gpu.name for group in run.fabric.groups] == ["A100-40", "T4"]
    assert [group.network.bytes_per_s for group in run.fabric.groups] == [1.25e10] * 2
    even = run.predict().step_time_s
    assert read_run(mixed | {"pipeline_cuts": [7, 13, 19]}).predict().step_time_s == pytest.approx(even)
    uneven = read_run(mixed | {"pipeline_cuts": [0, 11, 21, 23]})  # the first stage's own beginning may be listed
    assert uneven.cuts == (11, 21, 23) and uneven.predict().step_time_s < even
    assert read_run(mixed | {"n_gpus": None}).predict().step_time_s == pytest.approx(even)
    assert read_run(mixed | {"cluster": [fast, fast]}).predict().step_time_s < even


def test_memory_is_that_of_each_stage_and_its_kind() -> None:
    large = {"machines": 1, "gpus": 8, "gpu": "A100-80GB"}
    small = {"machines": 1, "gpus": 8, "gpu": "T4"}  # 15 GiB
    base = ROW | {"tp": 1, "pp": 2, "dp": 8, "pipeline_cuts": [24], "params_b": None}
    for cluster, fits in (([large, small], True), ([small, large], False)):
        run = read_run(base | {"cluster": cluster})
        found = run.predict()
        assert found.memory_bytes[0] > 15 * 2**30 > found.memory_bytes[1]
        assert run.fits(found) is fits


def test_the_slowest_stage_of_two_kinds_sets_the_pace() -> None:
    kinds = [{"machines": 1, "gpus": 8, "gpu": gpu, "inter_bytes_per_s": 2.5e10} for gpu in ("A100-80GB", "T4")]
    base = ROW | {"tp": 1, "pp": 2, "dp": 8, "params_b": None}

    def per_microbatch(cluster: list[dict[str, Any]], cut: int) -> float:
        times = [
            read_run(base | {"cluster": cluster, "pipeline_cuts": [cut], "global_batch": 16 * count}).predict()
            for count in (32, 64)
        ]
        return (times[1].step_time_s - times[0].step_time_s) / 32

    for cut in (4, 13, 23):
        # The T4s' stage (the last) is the slower one or as slow as the first on T4s; sends differ in their latency.
        alike = [per_microbatch([kind] * 2, cut) for kind in kinds]
        assert alike[0] < per_microbatch(kinds, cut) <= alike[1] * 1.001
    # T4s hold the end of the model: each layer that moves there adds one and the same time.
    steps = [per_microbatch(kinds, cut) for cut in (4, 8, 12)]
    assert steps[0] - steps[1] == pytest.approx(steps[1] - steps[2], rel=0.02) and steps[0] > steps[2]


def test_measured_times() -> None:
    assert measured_step_time_s(ROW) == 1.0
    tokens = ROW | {"step_time_s": None, "tokens_per_s_per_gpu": 4096}
    assert measured_step_time_s(tokens) == pytest.approx(1.0)
    # 96 B s l h^2 (1 + s / 6 h + V / 16 l h) with recomputation counted (Narayanan et al. 2021).
    b, s, layers, h, vocab = 64, 1024, 24, 2048, 51200
    flops = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    rate = ROW | {"step_time_s": None, "tflops_per_gpu": 100, "flops_convention": "hardware"}
    assert measured_step_time_s(rate) == pytest.approx(flops / (100e12 * 16), rel=0.01)
    assert measured_step_time_s(rate | {"flops_convention": None}) is None


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([ROW, ROW | {"seq": None}, ROW | {"step_time_s": None}]))
    found, refused = measured_runs(path)
    assert len(found) == 1 and found[0].source == "here"
    assert refused == ["row 1: seq is absent", "row 2: no measured time"]
    for text in ("{", "{}", "[1]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"runs\.json must"):
            read_rows(path)


def test_a_fit_finds_planted_constants() -> None:
    truth = Calibration().with_constants("ampere", matmul=0.65, link=0.6, launch_s=3e-5)
    rows = [
        ROW
        | {
            "layers": layers,
            "hidden": hidden,
            "tp": tp,
            "pp": 16 // tp // 2,
            "micro_batch": size,
            "params_b": None,
        }
        for layers, hidden in ((8, 1024), (16, 4096), (24, 8192))
        for tp in (1, 2, 4, 8)
        for size in (1, 8)
    ]
    measured = [Measured(run=run, step_time_s=run.predict(truth).step_time_s) for run in map(read_run, rows)]
    found = fit(measured)
    assert found.num_runs == len(rows)
    assert found.error_after < 0.02 < found.error_before
    assert found.calibration.of("ampere").matmul == pytest.approx(0.65, rel=0.05)
    assert found.calibration.of("hopper") == Calibration().of("hopper")  # nothing says anything about it
    with pytest.raises(InputError, match="at least one measured run"):
        fit([])

"""Steps at scale: what each axis does to time and memory, published memories, errors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cluster.presets import GPU_KINDS
from partita.cost.calibration import Calibration
from partita.cost.networks import Fabric, NodeGroup
from partita.errors import ClusterError, InputError
from partita.planner.scale.step import Degrees, Remat, State, StepPrediction, predict_step
from partita.planner.scale.transformer import Split, Transformer, chunks_of

MODEL = Transformer(layers=24, hidden=2048, heads=16, ffn=8192, vocab=51200, seq=2048, dtype="float16")
HALF = State(gradient_bytes=2.0, exchange_bytes=2.0)


def _fabric(num_gpus: int, kind: str = "A100-80") -> Fabric:
    return Fabric(groups=(NodeGroup.of(GPU_KINDS[kind], num_gpus),))


def _step(degrees: Degrees, *, model: Transformer = MODEL, fabric: Fabric | None = None, micro_batch: int = 1,
          sequence_parallel: bool = False, num_microbatches: int = 8, **options: object) -> StepPrediction:  # fmt: skip
    split = Split(tensor=degrees.tensor, context=degrees.context, micro_batch=micro_batch,
                  sequence_parallel=sequence_parallel)  # fmt: skip
    chunks = chunks_of(model, split, num_chunks=degrees.pipeline * degrees.virtual)
    return predict_step(
        chunks, degrees, fabric or _fabric(degrees.num_devices), num_microbatches=num_microbatches,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_parts_sum_to_the_step() -> None:
    for degrees in (Degrees(data=8), Degrees(data=2, tensor=4, pipeline=4), Degrees(pipeline=4, virtual=3)):
        schedule = "interleaved" if degrees.virtual > 1 else "1f1b"
        found = _step(degrees, schedule=schedule)
        assert sum(found.parts.values()) == pytest.approx(found.step_time_s)
        assert all(part >= -1e-9 for part in found.parts.values())
        assert len(found.memory_bytes) == degrees.pipeline


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 32), data=st.sampled_from([1, 2, 8, 16]), tensor=st.sampled_from([1, 2, 4]))
def test_more_microbatches_take_longer(m: int, data: int, tensor: int) -> None:
    degrees = Degrees(data=data, tensor=tensor, pipeline=2)
    assert _step(degrees, num_microbatches=m + 1).step_time_s > _step(degrees, num_microbatches=m).step_time_s


def test_recomputation_trades_memory_for_time() -> None:
    remats: tuple[Remat, ...] = ("none", "selective", "full")
    found = [_step(Degrees(data=8), remat=remat, micro_batch=8) for remat in remats]
    assert found[0].step_time_s < found[1].step_time_s < found[2].step_time_s
    assert found[0].peak_memory_bytes > found[1].peak_memory_bytes > found[2].peak_memory_bytes


def test_sharding_over_data_trades_memory_for_time() -> None:
    memories = [_step(Degrees(data=8), remat="full", zero=zero).peak_memory_bytes for zero in range(4)]
    assert memories == sorted(memories, reverse=True) and len(set(memories)) == 4
    assert _step(Degrees(data=64), zero=3).step_time_s > _step(Degrees(data=64), zero=1).step_time_s


def test_schedules_hold_different_numbers_of_microbatches() -> None:
    gpipe = _step(Degrees(pipeline=4), num_microbatches=16, schedule="gpipe")
    one = _step(Degrees(pipeline=4), num_microbatches=16, schedule="1f1b")
    assert gpipe.peak_memory_bytes > one.peak_memory_bytes
    assert one.memory_bytes[1] > one.memory_bytes[2]  # earlier stages hold more
    zero = _step(Degrees(pipeline=4), num_microbatches=16, schedule="zero_bubble")
    assert zero.step_time_s < one.step_time_s


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "p", "v", "m", "memory_gib"),
    [(48, 6144, 64, 1, 1, 1, 55.1), (96, 12288, 96, 8, 3, 64, 57.9), (105, 20480, 128, 35, 3, 280, 54.7)],
)
def test_published_memory(layers: int, hidden: int, heads: int, p: int, v: int, m: int, memory_gib: float) -> None:
    """Korthikanti et al. 2022, figure 1 and table 3: selective recomputation with sequence parallelism, t = 8."""
    model = Transformer(layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocab=51200, seq=2048,
                        fused_attention=False, fused_loss=False, dropout=True, dtype="float16")  # fmt: skip
    found = _step(
        Degrees(tensor=8, pipeline=p, virtual=v), model=model, micro_batch=4 if p == 1 else 1, sequence_parallel=True,
        num_microbatches=m, remat="selective", schedule="interleaved" if v > 1 else "1f1b", state=HALF,
    )  # fmt: skip
    assert found.peak_memory_bytes / 2**30 == pytest.approx(memory_gib, rel=0.1)


def test_a_slower_kind_slows_its_stage() -> None:
    fast, slow = (NodeGroup.of(GPU_KINDS[name], 8, 8) for name in ("A100-80", "V100-32"))
    degrees = Degrees(data=8, pipeline=2)
    times = [
        _step(degrees, fabric=Fabric(groups=groups)).step_time_s
        for groups in ((fast, fast), (fast, slow), (slow, slow))
    ]
    assert times[0] < times[1] <= times[2] * 1.001
    chunks = chunks_of(MODEL, Split(), num_chunks=2, cuts=(18,))
    uneven = predict_step(chunks, degrees, Fabric(groups=(fast, slow)), num_microbatches=8)
    assert uneven.step_time_s < times[1]


def test_a_compiler_takes_the_host_away() -> None:
    small = Transformer(layers=12, hidden=256, heads=4, ffn=1024, vocab=1000, seq=128)
    assert _step(Degrees(), model=small, compiled=True).step_time_s < 0.5 * _step(Degrees(), model=small).step_time_s


def test_each_forward_pass_waits_for_its_batch() -> None:
    launch_s = Calibration().of("ampere").launch_s
    plain, fetching = (_step(Degrees(), input_launches=count, num_microbatches=4).step_time_s for count in (0, 1000))
    assert 4 * 1000 * launch_s <= fetching - plain <= 1.25 * 4 * 1000 * launch_s  # the soft maximum adds to it
    assert _step(Degrees(), input_launches=1000, compiled=True) == _step(Degrees(), compiled=True)


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="take 16 GPUs, but the fabric has 8"):
        _step(Degrees(data=16), fabric=_fabric(8))
    with pytest.raises(InputError, match="pipeline x virtual = 2 chunks, but got 1"):
        predict_step(chunks_of(MODEL, Split(), num_chunks=1), Degrees(pipeline=2), _fabric(2), num_microbatches=1)
    with pytest.raises(InputError, match="zero 0 to 3"):
        _step(Degrees(), zero=4)
    with pytest.raises(ClusterError, match="must compute in one of"):
        _step(Degrees(), model=Transformer(layers=1, hidden=64, heads=1, ffn=256, vocab=8, seq=8),
              fabric=_fabric(1, "V100-16"))  # fmt: skip

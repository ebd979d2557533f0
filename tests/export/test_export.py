"""Other engines' configurations read back as the plan they were written from."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import InputError
from partita.export import (
    TrainingLayout,
    layout_of,
    read_deepspeed,
    read_megatron,
    read_torchtitan,
    to_deepspeed,
    to_megatron,
    to_torchtitan,
)
from partita.planner.scale.plan import plan_at_scale
from tests.planner import scale_models as models

degree = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def layouts(draw: st.DrawFn) -> TrainingLayout:
    pipeline, virtual, data, micro = draw(degree), draw(st.sampled_from([1, 2, 3])), draw(degree), draw(degree)
    chunks = pipeline * (virtual if pipeline > 1 else 1)
    even = draw(st.booleans())
    count = st.integers(1, 4)
    layers = (draw(count),) * chunks if even else tuple(draw(count) for _ in range(chunks))
    tensor = draw(degree)
    return TrainingLayout(
        data=data, tensor=tensor, pipeline=pipeline, context=draw(degree), num_layers=layers, micro_batch=micro,
        global_batch=data * micro * draw(st.integers(1, 6)),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        zero=draw(st.sampled_from([0, 1, 2, 3])) if data > 1 else 0,
        sequence_parallel=tensor > 1 and draw(st.booleans()),
    )  # fmt: skip


@given(layouts())
def test_megatron_reads_back(layout: TrainingLayout) -> None:
    if layout.zero >= 2 and layout.pipeline > 1:
        with pytest.raises(InputError, match="ZeRO 0 or 1"):
            to_megatron(layout)
        return
    assert read_megatron(to_megatron(layout), num_devices=layout.num_devices) == layout


@given(layouts())
def test_torchtitan_reads_back(layout: TrainingLayout) -> None:
    if layout.zero == 1 or (layout.tensor > 1 and not layout.sequence_parallel):
        with pytest.raises(InputError, match="torchtitan needs"):
            to_torchtitan(layout)
        return
    assert read_torchtitan(to_torchtitan(layout)) == layout


@given(layouts())
def test_deepspeed_reads_back(layout: TrainingLayout) -> None:
    try:
        text = to_deepspeed(layout)
    except InputError as error:
        assert "DeepSpeed needs" in str(error) and "ScaleConstraints(" in str(error)
        return
    devices, layers = layout.num_devices, sum(layout.num_layers)
    assert read_deepspeed(text, num_devices=devices, num_layers=layers) == layout


def test_words_of_the_engines() -> None:
    layout = TrainingLayout(
        data=2, tensor=4, pipeline=2, context=1, num_layers=(3, 2, 2, 1), micro_batch=1, global_batch=8,
        recompute="full", zero=1, sequence_parallel=True,
    )  # fmt: skip
    arguments = to_megatron(layout)
    assert arguments[arguments.index("--pipeline-model-parallel-layout") + 1] == "Et*3|t*2|t*2|t*1L"
    assert "--use-distributed-optimizer" in arguments and "--sequence-parallel" in arguments
    with pytest.raises(InputError, match="ZeRO 0, 2 or 3"):
        to_torchtitan(layout)


def test_a_plan_can_be_exported() -> None:
    solution = plan_at_scale(*models.gpt(), None, models.fabric("H100", 16))
    layout = layout_of(solution)
    assert layout.num_devices == solution.num_devices
    assert read_megatron(to_megatron(layout), num_devices=layout.num_devices) == layout


def test_broken_files_are_refused() -> None:
    with pytest.raises(InputError, match="JSON"):
        read_deepspeed("{", num_devices=1, num_layers=1)
    with pytest.raises(InputError, match="TOML"):
        read_torchtitan("= 3")
    with pytest.raises(InputError, match="--num-layers"):
        read_megatron([], num_devices=1)
    assert tomllib.loads("a = 1") == json.loads('{"a": 1}')

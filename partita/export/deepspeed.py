"""DeepSpeed's JSON (``deepspeed/runtime/config.py``): a plan as configuration, and a configuration as a plan.

The world size is no entry: data parallelism is what remains of it. A pipeline has equal stages, one chunk each, and
ZeRO 0 or 1 (``PipelineEngine`` refuses more). Tensor parallelism (``autotp_size``) has no sequence parallelism;
``sequence_parallel_size`` is DeepSpeed-Ulysses, our context axis. Recomputation is every block or none.
"""

from __future__ import annotations

import json
from typing import Any

from partita.errors import InputError
from partita.export.layout import TrainingLayout, refuse


def to_deepspeed(layout: TrainingLayout) -> str:
    """The configuration that trains as ``layout`` says.

    Raises:
        InputError: the plan has what DeepSpeed does not; the message names the constraint that avoids it.
    """
    checks = (
        (layout.virtual == 1, "one chunk for each stage", f"{layout.virtual}", "virtual=1"),
        (layout.is_even, "equal stages", f"stages of {layout.num_layers} blocks", "another pipeline degree"),
        (layout.zero <= 1 or layout.pipeline == 1, "ZeRO 0 or 1 with a pipeline", f"ZeRO {layout.zero}", "zero=1"),
        (layout.recompute != "selective", "no or full recomputation", "selective", "recompute='full'"),
        (
            not (layout.sequence_parallel and layout.tensor > 1),
            "whole values between tensor-parallel blocks", "sequence parallelism", "sequence_parallel=False",
        ),
    )  # fmt: skip
    for holds, must, given, change in checks:
        if not holds:
            raise refuse("DeepSpeed", must, given, f"Plan with ScaleConstraints({change}).")
    config: dict[str, Any] = {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.num_microbatches,
        "zero_optimization": {"stage": layout.zero},
        "pipeline": {
            "stages": layout.pipeline,
            "partition": "uniform",
            "activation_checkpoint_interval": int(layout.recompute == "full"),
        },
        "tensor_parallel": {"autotp_size": layout.tensor},
        "sequence_parallel_size": layout.context,
    }
    return json.dumps(config, indent=2) + "\n"


def read_deepspeed(text: str, *, num_devices: int, num_layers: int) -> TrainingLayout:
    """What a configuration means for a model of ``num_layers`` blocks on ``num_devices``.

    Raises:
        InputError: it is no JSON, a needed entry is absent, or the numbers do not fit each other.
    """
    try:
        config = json.loads(text)
        pipeline = config.get("pipeline", {})
        stages = pipeline.get("stages", 1)
        tensor = config.get("tensor_parallel", {}).get("autotp_size", 1) or 1
        context = config.get("sequence_parallel_size", 1)
        micro, total = config["train_micro_batch_size_per_gpu"], config["train_batch_size"]
        accumulated = config.get("gradient_accumulation_steps", 1)
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise InputError(
            f"a DeepSpeed configuration must be JSON with the entries of a plan, but {error!r}."
        ) from error
    data, rest = divmod(num_devices, tensor * stages * context)
    if rest or num_layers % stages or micro * accumulated * data != total:
        raise InputError(
            f"degrees must divide {num_devices} devices, stages {num_layers} blocks, and micro-batch x accumulation x "
            f"data be the batch, but got tensor {tensor}, stages {stages}, context {context}, {micro} x {accumulated} "
            f"x {data} and {total}."
        )
    return TrainingLayout(
        data=data,
        tensor=tensor,
        pipeline=stages,
        context=context,
        num_layers=(num_layers // stages,) * stages,
        micro_batch=micro,
        global_batch=total,
        recompute="full" if pipeline.get("activation_checkpoint_interval", 0) else "none",
        zero=config.get("zero_optimization", {}).get("stage", 0),
        sequence_parallel=False,
    )

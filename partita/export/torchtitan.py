"""torchtitan's TOML (``torchtitan/config/job_config.py``): a plan as configuration, and a configuration as a plan.

Tensor parallelism there is always sequence parallel. The data axis is either replicated or fully sharded: parameters
gathered again for the backward pass (ZeRO-3, ``fsdp_reshard_after_forward = "always"``) or kept after the forward pass
(ZeRO-2, ``"never"``). With a pipeline, a rank's local batch is one step's micro-batches; without, gradients are
accumulated until ``global_batch_size``. Chunks are lists of module names.
"""

from __future__ import annotations

import tomllib
from typing import Any

import tomli_w

from partita.errors import InputError
from partita.export.layout import TrainingLayout, refuse

_RESHARD = {2: "never", 3: "always"}
_FIRST, _LAST = ["tok_embeddings"], ["norm", "output"]


def to_torchtitan(layout: TrainingLayout) -> str:
    """The sections ``training``, ``parallelism`` and ``activation_checkpoint`` that train as ``layout`` says.

    Raises:
        InputError: ZeRO-1, or tensor without sequence parallelism, which torchtitan does not have.
    """
    if layout.zero == 1 and layout.data > 1:
        raise refuse(
            "torchtitan",
            "ZeRO 0, 2 or 3",
            "ZeRO 1",
            "Plan with ScaleConstraints(zero=2), or zero=3 without a pipeline.",
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise refuse(
            "torchtitan", "sequence parallelism with tensor parallelism", "none",
            "Plan with ScaleConstraints(sequence_parallel=True).",
        )  # fmt: skip
    sharded = layout.zero >= 2
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": 1 if sharded else layout.data,
        "data_parallel_shard_degree": layout.data if sharded else 1,
        "tensor_parallel_degree": layout.tensor,
        "context_parallel_degree": layout.context,
        "pipeline_parallel_degree": layout.pipeline,
    }
    if sharded:
        parallelism["fsdp_reshard_after_forward"] = _RESHARD[layout.zero]
    local = layout.micro_batch
    if layout.pipeline > 1:
        local = layout.micro_batch * layout.num_microbatches
        parallelism["pipeline_parallel_microbatch_size"] = layout.micro_batch
        parallelism["pipeline_parallel_schedule"] = "Interleaved1F1B" if layout.virtual > 1 else "1F1B"
    parallelism["module_fqns_per_model_part"] = _modules(layout.num_layers)
    return tomli_w.dumps(
        {
            "training": {"local_batch_size": local, "global_batch_size": layout.global_batch},
            "parallelism": parallelism,
            "activation_checkpoint": {"mode": layout.recompute},
        }
    )


def read_torchtitan(text: str) -> TrainingLayout:
    """What a configuration means.

    Raises:
        InputError: it is no TOML, or a needed entry is absent.
    """
    try:
        sections = tomllib.loads(text)
        training, parallelism = sections["training"], sections["parallelism"]
        pipeline = parallelism.get("pipeline_parallel_degree", 1)
        replicas, shards = (parallelism.get(f"data_parallel_{k}_degree", 1) for k in ("replicate", "shard"))
        reshard = parallelism.get("fsdp_reshard_after_forward", "always")
        micro = parallelism["pipeline_parallel_microbatch_size"] if pipeline > 1 else training["local_batch_size"]
        tensor = parallelism.get("tensor_parallel_degree", 1)
        return TrainingLayout(
            data=replicas * shards,
            tensor=tensor,
            pipeline=pipeline,
            context=parallelism.get("context_parallel_degree", 1),
            num_layers=tuple(
                sum(name.startswith("layers.") for name in part) for part in parallelism["module_fqns_per_model_part"]
            ),
            micro_batch=micro,
            global_batch=training["global_batch_size"],
            recompute=sections.get("activation_checkpoint", {}).get("mode", "selective"),
            zero=0 if shards == 1 else 2 if reshard == "never" else 3,
            sequence_parallel=tensor > 1,
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"a torchtitan configuration must be TOML with the entries of a plan, but {error!r}."
        ) from error


def _modules(num_layers: tuple[int, ...]) -> list[list[str]]:
    parts, start = [], 0
    for index, count in enumerate(num_layers):
        own = [f"layers.{number}" for number in range(start, start + count)]
        parts.append([*(_FIRST if index == 0 else []), *own, *(_LAST if index == len(num_layers) - 1 else [])])
        start += count
    return parts

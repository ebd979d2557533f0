"""Megatron-LM's command line (``megatron/training/arguments.py``): a plan as arguments, and arguments as a plan.

Data parallelism has no argument: it is what remains of the world size. Unequal chunks are written as
``--pipeline-model-parallel-layout``: chunks in model order, parted by ``|``; ``E`` embedding, ``t`` block (``t*3``
three),
``L`` loss. ZeRO-1 is the distributed optimizer; ZeRO-2 and 3 are Megatron-FSDP's sharding strategies, which have no
pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

from partita.errors import InputError
from partita.export.layout import TrainingLayout, refuse

_STRATEGIES = {2: "optim_grads", 3: "optim_grads_params"}
_FLAGS = frozenset({"--sequence-parallel", "--use-distributed-optimizer", "--use-megatron-fsdp"})
_SINGLE = {
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--context-parallel-size": "1",
    "--num-layers-per-virtual-pipeline-stage": "",
    "--num-layers": "",
    "--pipeline-model-parallel-layout": "",
    "--micro-batch-size": "",
    "--global-batch-size": "",
    "--recompute-granularity": "",
    "--recompute-method": "",
    "--recompute-num-layers": "",
    "--data-parallel-sharding-strategy": "no_shard",
}


def to_megatron(layout: TrainingLayout) -> list[str]:
    """Arguments of ``pretrain_gpt.py`` that train as ``layout`` says.

    Raises:
        InputError: ZeRO 2 or 3 together with a pipeline, which Megatron-LM does not have.

    Example:
        >>> layout = TrainingLayout(data=1, tensor=2, pipeline=1, context=1, num_layers=(4,), micro_batch=1,
        ...     global_batch=8, recompute="none", zero=0, sequence_parallel=True)
        >>> read_megatron(to_megatron(layout), num_devices=2) == layout
        True
    """
    if layout.zero >= 2 and layout.pipeline > 1:
        raise refuse(
            "Megatron-LM", "ZeRO 0 or 1 with a pipeline", f"ZeRO {layout.zero} and {layout.pipeline} stages",
            "Plan with ScaleConstraints(zero=1) or pipeline=1.",
        )  # fmt: skip
    arguments = [
        "--tensor-model-parallel-size", str(layout.tensor),
        "--pipeline-model-parallel-size", str(layout.pipeline),
        "--context-parallel-size", str(layout.context),
        "--num-layers", str(sum(layout.num_layers)),
        "--micro-batch-size", str(layout.micro_batch),
        "--global-batch-size", str(layout.global_batch),
    ]  # fmt: skip
    if not layout.is_even:
        arguments += ["--pipeline-model-parallel-layout", _layout_text(layout.num_layers)]
    elif layout.virtual > 1:
        arguments += ["--num-layers-per-virtual-pipeline-stage", str(layout.num_layers[0])]
    if layout.sequence_parallel:
        arguments.append("--sequence-parallel")
    if layout.recompute != "none":
        arguments += ["--recompute-granularity", layout.recompute]
    if layout.recompute == "full":
        arguments += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    if layout.zero >= 1:
        arguments.append("--use-distributed-optimizer")
    if layout.zero >= 2:
        arguments += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", _STRATEGIES[layout.zero]]
    return arguments


def read_megatron(arguments: Sequence[str], *, num_devices: int) -> TrainingLayout:
    """What ``arguments`` mean on ``num_devices``; arguments about other matters are passed over.

    Raises:
        InputError: a needed argument is absent, or the numbers do not fit each other.
    """
    values, flags = dict(_SINGLE), set()
    for index, text in enumerate(arguments):
        if text in _FLAGS:
            flags.add(text)
        elif text in values and index + 1 < len(arguments):
            values[text] = arguments[index + 1]
    for name in ("--num-layers", "--micro-batch-size", "--global-batch-size"):
        if not values[name]:
            raise InputError(f"the arguments must give {name}, but do not.")
    tensor, pipeline, context = (
        int(values[name])
        for name in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
    )
    data, rest = divmod(num_devices, tensor * pipeline * context)
    if rest or data < 1:
        raise InputError(
            f"tensor x pipeline x context must divide {num_devices}, but is {tensor * pipeline * context}."
        )
    strategy = values["--data-parallel-sharding-strategy"] if "--use-megatron-fsdp" in flags else "no_shard"
    zero = next((stage for stage, name in _STRATEGIES.items() if name == strategy), 0)
    return TrainingLayout(
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        num_layers=_chunks(values, pipeline),
        micro_batch=int(values["--micro-batch-size"]),
        global_batch=int(values["--global-batch-size"]),
        recompute=values["--recompute-granularity"] or "none",
        zero=zero or int("--use-distributed-optimizer" in flags),
        sequence_parallel="--sequence-parallel" in flags,
    )


def _layout_text(num_layers: Sequence[int]) -> str:
    chunks = [f"t*{count}" if count else "" for count in num_layers]
    chunks[0] = f"E{chunks[0]}"
    chunks[-1] = f"{chunks[-1]}L"
    return "|".join(chunks)


def _chunks(values: dict[str, str], pipeline: int) -> tuple[int, ...]:
    total = int(values["--num-layers"])
    text = values["--pipeline-model-parallel-layout"]
    if text:
        found = tuple(_count(part.strip("EL,")) for part in text.split("|"))
    else:
        per_chunk = int(values["--num-layers-per-virtual-pipeline-stage"] or -(-total // pipeline))
        found = (per_chunk,) * (total // per_chunk)
    if sum(found) != total or len(found) % pipeline:
        raise InputError(f"{total} layers must fill the chunks of {pipeline} stages, but the chunks are {found}.")
    return found


def _count(part: str) -> int:
    if not part:
        return 0
    name, _, number = part.partition("*")
    if set(name) != {"t"}:
        raise InputError(f"a chunk must be of the form 't*3' or 'ttt', but is {part!r}.")
    return int(number) if number else len(name)

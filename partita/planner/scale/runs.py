"""Measured training runs of large models as rows of JSON, and what each of them is to `predict_step`.

A row has the fields of `benchmarks/data/published/README.md`. What it leaves out is filled only from facts that follow
from the row itself or from public definitions; each is listed in `Run.assumed`:

* degrees that are absent are 1, but for one that follows from the number of GPUs;
* no `ffn`: four times the hidden size, for models called GPT or MPT (Brown et al. 2020; MPT's configuration), checked
  against `params_b`;
* no `vocab`: the public tokenizer's of the family (`FAMILIES`); no `kv_heads`: as many as heads, for GPT and MPT;
* no `dtype`: half precision (two bytes), which is one and the same rate on every GPU with tensor cores;
* no `remat`: the least whose predicted memory fits the GPU (the run did run);
* no sharding named: plain data parallelism.

What cannot be had this way raises `Refusal` with the reason: models with experts whose sizes the row does not give,
adapters, offloading, no sequence length, no number of microbatches, contradictory numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from partita.cluster.model import Link
from partita.cluster.names import gpu_from_text
from partita.cost.calibration import Calibration
from partita.cost.networks import Fabric, NodeGroup
from partita.errors import ClusterError, InputError
from partita.planner.scale.schedules import Schedule
from partita.planner.scale.step import Degrees, Remat, State, StepPrediction, predict_step
from partita.planner.scale.transformer import Split, Transformer, chunks_of

Row = Mapping[str, Any]
TOLERANCE = 0.2  # of the parameters that the sizes give against `params_b`


class Refusal(InputError):
    """A row that lacks what a prediction needs, or contradicts itself."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What models of one name share. Sources: the models' published configurations."""

    pattern: str
    vocab: int | None
    gated: bool = False
    bias: bool = True
    rotary: bool = False
    tied: bool = True
    dropout: bool = False


FAMILIES: tuple[Family, ...] = (
    # Touvron et al. 2023; Dubey et al. 2024 (Llama 3: 128,256 tokens)
    Family(pattern=r"llama[-_ ]?2", vocab=32000, gated=True, bias=False, rotary=True, tied=False),
    Family(pattern=r"llama[-_ ]?3", vocab=128256, gated=True, bias=False, rotary=True, tied=False),
    Family(pattern=r"llama|mistral|mixtral|qwen|yi-", vocab=None, gated=True, bias=False, rotary=True, tied=False),
    # Nemotron-4 (Parmar et al. 2024): squared ReLU, rotary positions, 256,000 tokens, no biases
    Family(pattern=r"nemotron", vocab=256000, bias=False, rotary=True, tied=False),
    # MosaicML MPT: no biases, tied; GPT-NeoX tokenizer padded to 50,368
    Family(pattern=r"\bmpt", vocab=50368, bias=False),
    # GPT-2's tokenizer (50,257) padded to a multiple of 128 x tensor ways: 51,200 in Megatron-LM's runs
    Family(pattern=r"gpt[-_ ]?3", vocab=51200),
    Family(pattern=r"gpt|megatron|bert|opt\b", vocab=51200, dropout=True),
)
MODERN = ("hopper", "blackwell", "ada", "cdna3")
LOW = {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn",
       "fp4": "float4_e2m1fn"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run, ready for `predict`. `remat` None: the least that fits."""

    model: Transformer
    split: Split
    degrees: Degrees
    fabric: Fabric
    num_microbatches: int
    schedule: Schedule
    remat: Remat | None
    zero: int
    state: State
    overlap_data: bool
    compiled: bool
    cuts: tuple[int, ...] | None
    assumed: tuple[str, ...]

    def predict(self, calibration: Calibration | None = None) -> StepPrediction:
        """Time and memory of the run's step.

        Raises:
            Refusal: sizes, degrees and machines do not fit each other, or a GPU lacks the dtype.
        """
        try:
            if self.remat is not None:
                return self._predict(self.remat, calibration)
            limit = min(group.kind.gpu.memory_bytes for group in self.fabric.groups)
            tried: tuple[Remat, ...] = ("none", "selective", "full")
            for remat in tried:
                found = self._predict(remat, calibration)
                if found.peak_memory_bytes <= limit:
                    break
            return found
        except (InputError, ClusterError) as error:
            raise Refusal(str(error)) from error

    def _predict(self, remat: Remat, calibration: Calibration | None) -> StepPrediction:
        num_chunks = self.degrees.pipeline * self.degrees.virtual
        return predict_step(
            chunks_of(self.model, self.split, num_chunks=num_chunks, cuts=self.cuts),
            self.degrees,
            self.fabric,
            num_microbatches=self.num_microbatches,
            schedule=self.schedule,
            remat=remat,
            zero=self.zero,
            state=self.state,
            overlap_data=self.overlap_data,
            compiled=self.compiled,
            calibration=calibration,
        )


def read_run(row: Row) -> Run:
    """The run that `row` describes.

    Raises:
        Refusal: a fact is absent or contradictory; the message names it.
    """
    assumed: list[str] = []
    notes = _text(row, "notes").lower()
    for word, why in (("lora", "only adapters are trained, and their sizes are absent"),
                      ("offload", "what is offloaded, and to which memory, is absent")):  # fmt: skip
        if word in f"{_text(row, 'model')} {_text(row, 'zero_fsdp')} {_text(row, 'remat')}".lower():
            raise Refusal(f"{word}: {why}")
    fabric = _fabric(row)
    generations = {group.kind.generation for group in fabric.groups}
    modern = generations <= set(MODERN)
    model = _model(row, modern, notes, assumed)
    degrees = _degrees(row, assumed)
    if degrees.num_devices > fabric.num_gpus:
        raise Refusal(f"tp x pp x cp x dp = {degrees.num_devices} GPUs, but there are {fabric.num_gpus}")
    micro_batch, num_microbatches = _microbatches(row, degrees)
    zero, state = _sharding(row, modern, assumed)
    sequence_parallel = degrees.tensor > 1 and "no sequence parallel" not in notes and (
        modern or "sequence parallel" in notes or "selective" in _text(row, "remat")
    )  # fmt: skip
    cuts = row.get("pipeline_cuts")
    return Run(
        model=model,
        split=Split(
            tensor=degrees.tensor,
            context=degrees.context,
            micro_batch=micro_batch,
            sequence_parallel=sequence_parallel,
        ),
        degrees=degrees,
        fabric=fabric,
        num_microbatches=num_microbatches,
        schedule=_schedule(row, degrees),
        remat=_remat(row, assumed),
        zero=zero,
        state=state,
        overlap_data=modern or zero >= 2,
        compiled=False,
        cuts=_cuts(cuts, degrees) if cuts else None,
        assumed=tuple(assumed),
    )


def measured_step_time_s(row: Row) -> float | None:
    """The measured seconds of one step: given, or from tokens per second, or from flop/s by the source's convention.

    Flops: 72 B s l h^2 (1 + s / 6 h + V / 12 l h), four thirds of the first two terms where recomputation counts
    (Narayanan et al. 2021, appendix A); for gated models the same sum over their own matrices.
    """
    if row.get("step_time_s"):
        return float(row["step_time_s"])
    batch, seq, gpus = row.get("global_batch"), row.get("seq"), row.get("n_gpus")
    if not (batch and seq and gpus):
        return None
    if row.get("tokens_per_s_per_gpu"):
        return float(batch) * seq / (float(row["tokens_per_s_per_gpu"]) * gpus)
    rate, convention = row.get("tflops_per_gpu"), row.get("flops_convention")
    if not rate or not convention:
        return None
    try:
        model = _model(row, True, "", [])
    except Refusal:
        return None
    tokens = float(batch) * seq
    block = 2.0 * tokens * model.layers * (model.block_parameters + 2.0 * seq * model.hidden)
    head = 2.0 * tokens * model.vocab * model.hidden
    flops = (4 if str(convention).startswith("hardware") else 3) * block + 3 * head
    return flops / (float(rate) * 1e12 * gpus)


def _text(row: Row, name: str) -> str:
    return str(row.get(name) or "").lower() if name != "gpu" else str(row.get(name) or "")


def _integer(row: Row, name: str) -> int | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise Refusal(f"{name} must be a whole number of at least 1, but is {value!r}")
    return int(value)


def _need(row: Row, name: str) -> int:
    value = _integer(row, name)
    if value is None:
        raise Refusal(f"{name} is absent")
    return value


def _fabric(row: Row) -> Fabric:
    try:
        if row.get("cluster"):
            return Fabric(groups=tuple(_group(entry) for entry in row["cluster"]))
        kind = gpu_from_text(_text(row, "gpu"))
        return Fabric(groups=(NodeGroup.of(kind, _need(row, "n_gpus"), _integer(row, "gpus_per_node")),))
    except ClusterError as error:
        raise Refusal(str(error)) from error


def _group(entry: Row) -> NodeGroup:
    """Machines of one kind; `gpus` are those of one machine, links in bytes a second where they are given."""
    kind = gpu_from_text(str(entry.get("gpu") or ""))
    machines, gpus = _need(entry, "machines"), _need(entry, "gpus")
    group = NodeGroup.of(kind, machines * gpus, gpus)
    link, network = entry.get("intra_bytes_per_s"), entry.get("inter_bytes_per_s")
    return replace(
        group,
        link=Link(bytes_per_s=float(link), latency_s=group.link.latency_s) if link else group.link,
        network=Link(bytes_per_s=float(network), latency_s=group.network.latency_s) if network else group.network,
    )


def _model(row: Row, modern: bool, notes: str, assumed: list[str]) -> Transformer:
    name = _text(row, "model")
    family = next((one for one in FAMILIES if re.search(one.pattern, name)), None)
    if (_integer(row, "ep") or 1) > 1:
        raise Refusal("the model has experts, but their number, sizes and how many a token takes are absent")
    layers, hidden, heads, seq = (_need(row, field) for field in ("layers", "hidden", "heads", "seq"))
    plain = family is not None and not family.gated
    ffn = _integer(row, "ffn")
    if ffn is None:
        if not plain:
            raise Refusal("ffn is absent")
        ffn = 4 * hidden
        assumed.append("ffn = 4 hidden")
    kv_heads = _integer(row, "kv_heads")
    if kv_heads is None:
        if not plain:
            raise Refusal("kv_heads is absent")
        assumed.append("kv_heads = heads")
    vocab = _integer(row, "vocab")
    if vocab is None:
        if family is None or family.vocab is None:
            raise Refusal("vocab is absent")
        vocab = family.vocab
        assumed.append(f"vocab = {vocab}")
    gated = family.gated if family is not None else ffn != 4 * hidden
    dtype = _dtype(row, assumed)
    fused = "flash" in notes or modern or dtype == "bfloat16"
    if hidden % heads:
        raise Refusal(f"heads must divide hidden, but {heads} does not divide {hidden}")
    model = Transformer(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab, seq=seq, gated=gated,
        bias=family.bias if family else not gated, rotary=family.rotary if family else gated,
        tied=family.tied if family else not gated, dropout=bool(family and family.dropout and not fused),
        fused_attention=fused, fused_loss=fused, dtype=dtype,
    )  # fmt: skip
    billions = row.get("params_b")
    if billions and not 1 - TOLERANCE < model.num_parameters / (float(billions) * 1e9) < 1 + TOLERANCE:
        raise Refusal(f"the sizes give {model.num_parameters / 1e9:.3g} billion parameters, but params_b is {billions}")
    return model


def _dtype(row: Row, assumed: list[str]) -> str:
    text = _text(row, "dtype")
    low = next((value for key, value in LOW.items() if key in text), None)
    if low:
        return low
    if "bf16" in text or "bfloat16" in text:
        return "bfloat16"
    if not text:
        assumed.append("dtype = half precision")
    elif "32" in text:
        return "float32"
    return "float16"


def _degrees(row: Row, assumed: list[str]) -> Degrees:
    gpus = _need(row, "n_gpus")
    given = {name: _integer(row, name) for name in ("tp", "pp", "cp", "dp")}
    absent = [name for name in ("tp", "pp", "dp") if given[name] is None]
    known = 1
    for value in given.values():
        known *= value or 1
    if len(absent) > 1:
        raise Refusal(f"{' and '.join(absent)} are absent")
    if absent:
        if gpus % known:
            raise Refusal(f"{absent[0]} is absent, and the other degrees do not divide {gpus} GPUs")
        given[absent[0]] = gpus // known
        assumed.append(f"{absent[0]} = {gpus // known}")
    elif known != gpus:
        raise Refusal(f"tp x pp x cp x dp = {known}, but there are {gpus} GPUs")
    return Degrees(
        data=given["dp"] or 1,
        tensor=given["tp"] or 1,
        pipeline=given["pp"] or 1,
        virtual=(_integer(row, "vpp") or 1) if (given["pp"] or 1) > 1 else 1,
        context=given["cp"] or 1,
    )


def _microbatches(row: Row, degrees: Degrees) -> tuple[int, int]:
    batch, size = _need(row, "global_batch"), _need(row, "micro_batch")
    if batch % (size * degrees.data):
        raise Refusal(f"micro_batch x dp = {size * degrees.data} must divide global_batch {batch}")
    return size, batch // (size * degrees.data)


def _sharding(row: Row, modern: bool, assumed: list[str]) -> tuple[int, State]:
    text = _text(row, "zero_fsdp")
    zero = 0
    if "fsdp" in text:
        zero = 2 if "shard_grad_op" in text else 3
    elif "hsdp" in text or "hybrid" in text:
        raise Refusal("how many GPUs share the parameters in hybrid sharding is absent")
    elif match := re.search(r"zero[-_ ]?(\d)", text):
        zero = int(match[1])
        if zero > 3:
            raise Refusal(f"zero must be 0 to 3, but is {zero}")
    elif text == "ddp" or (not text and modern):
        # NeMo and Megatron-Bridge run Megatron's distributed optimizer under this name.
        zero = 1
        assumed.append("optimizer state sharded over data")
    elif not text:
        assumed.append("plain data parallelism")
    half = not modern and ("bf16" not in text and "bfloat16" not in _text(row, "dtype"))
    exchange = 2.0 if "pure" in text or (half and zero < 3) else 4.0
    return zero, State(gradient_bytes=2.0 if half and zero < 3 else 4.0, exchange_bytes=exchange)


def _schedule(row: Row, degrees: Degrees) -> Schedule:
    text = _text(row, "schedule")
    if degrees.pipeline == 1 or text in ("", "none"):
        return "interleaved" if degrees.virtual > 1 else "1f1b"
    if "gpipe" in text:
        return "gpipe"
    if "zero" in text or text.startswith("zb"):
        if degrees.virtual > 1:
            raise Refusal(f"schedule {text} with {degrees.virtual} chunks a stage is not known")
        return "zero_bubble"
    if "1f1b" in text:
        return "interleaved" if degrees.virtual > 1 else "1f1b"
    raise Refusal(f"schedule {text!r} is not known")


def _remat(row: Row, assumed: list[str]) -> Remat | None:
    text = _text(row, "remat")
    if not text:
        assumed.append("the least recomputation that fits")
        return None
    if text.startswith("none"):
        return "none"
    if "selective" in text:
        return "selective"
    if "full" in text or "layer" in text or "uniform" in text or text in ("yes", "true"):
        return "full"
    raise Refusal(f"remat {text!r} is not known")


def _cuts(cuts: Any, degrees: Degrees) -> tuple[int, ...]:
    numbers = [int(cut) for cut in cuts]
    expected = degrees.pipeline * degrees.virtual - 1
    if len(numbers) == expected + 1 and numbers[0] == 0:  # the first stage's own beginning may be listed
        numbers = numbers[1:]
    elif len(numbers) == expected + 2 and numbers[0] == 0:
        numbers = numbers[1:-1]
    if len(numbers) != expected:
        raise Refusal(f"pipeline_cuts must name the {expected} layers where later stages begin, but are {list(cuts)}")
    return tuple(numbers)

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
from pathlib import Path
from typing import Any

from partita.cluster.model import Link
from partita.cluster.names import gpu_from_text
from partita.cost.calibration import Calibration
from partita.cost.networks import Fabric, NodeGroup
from partita.errors import ClusterError, InputError
from partita.planner.scale.rows import (
    Refusal,
    Row,
    integer_of,
    measured_step_time_s,
    needed,
    positive_of,
    read_model,
    read_rows,
    text_of,
)
from partita.planner.scale.schedules import Schedule
from partita.planner.scale.step import Degrees, Remat, State, StepPrediction, predict_step
from partita.planner.scale.transformer import INPUT_LAUNCHES, Split, Transformer, chunks_of

MODERN = ("hopper", "blackwell", "blackwell_ultra", "ada", "cdna3")
UNKNOWN = {  # words that name what a row cannot say enough about
    "lora": "only adapters are trained, and their sizes are absent",
    "offload": "what is offloaded, and to which memory, is absent",
    "packed sequence": "the lengths of the packed sequences are absent",
    "misconfigured": "the source says itself that the sizes it gives are not those it ran",
}


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
            tried: tuple[Remat, ...] = ("none", "selective", "full")
            for remat in tried:
                found = self._predict(remat, calibration)
                if self.fits(found):
                    break
            return found
        except (InputError, ClusterError) as error:
            raise Refusal(str(error)) from error

    def fits(self, found: StepPrediction) -> bool:
        """Whether each stage's memory fits the smallest GPU that the stage runs on."""
        span = self.degrees.stage_devices
        return all(
            used <= min(g.kind.gpu.memory_bytes for g in self.fabric.groups_of(stage * span, (stage + 1) * span - 1))
            for stage, used in enumerate(found.memory_bytes)
        )

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
            input_launches=INPUT_LAUNCHES,
            calibration=calibration,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run, its measured step time and where it comes from."""

    run: Run
    step_time_s: float
    source: str = ""


def measured_runs(path: Path) -> tuple[list[Measured], list[str]]:
    """The runs of a file that have a measured time and can be predicted, and why the other rows are not among them.

    Raises:
        InputError: the file is not a JSON list of objects.
    """
    found, refused = [], []
    for index, row in enumerate(read_rows(path)):
        try:
            run = read_run(row)
            run.predict()
            time_s = measured_step_time_s(row)
        except Refusal as error:
            refused.append(f"row {index}: {error}")
            continue
        if time_s is None:
            refused.append(f"row {index}: no measured time")
        else:
            found.append(Measured(run=run, step_time_s=time_s, source=str(row.get("source") or "")))
    return found, refused


def read_run(row: Row) -> Run:
    """The run that `row` describes.

    Raises:
        Refusal: a fact is absent or contradictory; the message names it.
    """
    assumed: list[str] = []
    notes = text_of(row, "notes").lower()
    for word, why in UNKNOWN.items():
        if word in f"{text_of(row, 'model')} {text_of(row, 'zero_fsdp')} {text_of(row, 'remat')} {notes}":
            raise Refusal(f"{word}: {why}")
    fabric = _fabric(row)
    generations = {group.kind.generation for group in fabric.groups}
    modern = generations <= set(MODERN)
    model = read_model(row, modern, notes, assumed)
    degrees = _degrees(row, assumed)
    if degrees.num_devices > fabric.num_gpus:
        raise Refusal(f"tp x pp x cp x dp = {degrees.num_devices} GPUs, but there are {fabric.num_gpus}")
    micro_batch, num_microbatches = _microbatches(row, degrees)
    zero, state = _sharding(row, modern, assumed)
    sequence_parallel = degrees.tensor > 1 and "no sequence parallel" not in notes and (
        modern or "sequence parallel" in notes or "selective" in text_of(row, "remat")
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


def _fabric(row: Row) -> Fabric:
    try:
        if row.get("cluster"):
            return Fabric(groups=tuple(_group(entry) for entry in _entries(row)))
        kind = gpu_from_text(text_of(row, "gpu"))
        return Fabric(groups=(NodeGroup.of(kind, needed(row, "n_gpus"), integer_of(row, "gpus_per_node")),))
    except ClusterError as error:
        raise Refusal(str(error)) from error


def _entries(row: Row) -> list[Row]:
    entries = row["cluster"]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise Refusal(f"cluster must be a list of objects, one for each kind of machine, but is {entries!r:.80}")
    return entries


def _group(entry: Row) -> NodeGroup:
    """Machines of one kind; `gpus` are those of one machine, links in bytes a second where they are given."""
    kind = gpu_from_text(str(entry.get("gpu") or ""))
    machines, gpus = needed(entry, "machines"), needed(entry, "gpus")
    group = NodeGroup.of(kind, machines * gpus, gpus)
    link, network = positive_of(entry, "intra_bytes_per_s"), positive_of(entry, "inter_bytes_per_s")
    return replace(
        group,
        link=Link(bytes_per_s=link, latency_s=group.link.latency_s) if link else group.link,
        network=Link(bytes_per_s=network, latency_s=group.network.latency_s) if network else group.network,
    )


def _degrees(row: Row, assumed: list[str]) -> Degrees:
    gpus = integer_of(row, "n_gpus")
    if gpus is None and row.get("cluster"):
        gpus = sum(needed(entry, "machines") * needed(entry, "gpus") for entry in _entries(row))
        assumed.append(f"n_gpus = {gpus}")
    gpus = gpus or needed(row, "n_gpus")
    given = {name: integer_of(row, name) for name in ("tp", "pp", "cp", "dp")}
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
        virtual=(integer_of(row, "vpp") or 1) if (given["pp"] or 1) > 1 else 1,
        context=given["cp"] or 1,
    )


def _microbatches(row: Row, degrees: Degrees) -> tuple[int, int]:
    batch, size = needed(row, "global_batch"), needed(row, "micro_batch")
    if batch % (size * degrees.data):
        raise Refusal(f"micro_batch x dp = {size * degrees.data} must divide global_batch {batch}")
    return size, batch // (size * degrees.data)


def _sharding(row: Row, modern: bool, assumed: list[str]) -> tuple[int, State]:
    text = text_of(row, "zero_fsdp")
    zero = 0
    if "hsdp" in text or "hybrid" in text:
        raise Refusal("how many GPUs share the parameters in hybrid sharding is absent")
    if "fsdp" in text:
        zero = 2 if "shard_grad_op" in text else 3
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
    half = not modern and ("bf16" not in text and "bfloat16" not in text_of(row, "dtype"))
    exchange = 2.0 if "pure" in text or (half and zero < 3) else 4.0
    return zero, State(gradient_bytes=2.0 if half and zero < 3 else 4.0, exchange_bytes=exchange)


def _schedule(row: Row, degrees: Degrees) -> Schedule:
    text = text_of(row, "schedule")
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
    text = text_of(row, "remat")
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
    if not isinstance(cuts, list) or not all(isinstance(cut, int) and not isinstance(cut, bool) for cut in cuts):
        raise Refusal(f"pipeline_cuts must be a list of layer numbers, but is {cuts!r:.80}")
    numbers = list(cuts)
    expected = degrees.pipeline * degrees.virtual - 1
    if len(numbers) == expected + 1 and numbers[0] == 0:  # the first stage's own beginning may be listed
        numbers = numbers[1:]
    elif len(numbers) == expected + 2 and numbers[0] == 0:
        numbers = numbers[1:-1]
    if len(numbers) != expected:
        raise Refusal(f"pipeline_cuts must name the {expected} layers where later stages begin, but are {list(cuts)}")
    return tuple(numbers)

"""What a row of a measured run says about its model: `Transformer`, and the measured time in seconds.

Facts that the row leaves out come from the published configuration of its family (`FAMILIES`), and are named;
everything else that is absent is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partita.errors import InputError
from partita.planner.scale.transformer import Transformer

Row = Mapping[str, Any]
LARGEST = 10**9  # of any whole number in a row: products of a few of them stay finite
TOLERANCE = 0.2  # of the parameters that the sizes give against `params_b`


class Refusal(InputError):
    """A row that lacks what a prediction needs, or contradicts itself."""


# Names of models with experts, and of models that are no stack of equal decoder (or encoder) blocks.
EXPERTS = r"moe\b|mixtral|deepseek|dbrx|kimi|gpt[-_ ]?oss|\dx\d+b|[-_]a\d+b|nemotron[-_]3[-_]"
OTHER = r"\bt5|\bbart|\bvit\b|swin|resnet|unet|\bdit\b|diffusion|\bmamba|whisper|clip"


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
LOW = {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn",
       "fp4": "float4_e2m1fn"}  # fmt: skip


def measured_step_time_s(row: Row) -> float | None:
    """The measured seconds of one step: given, or from tokens per second, or from flop/s by the source's convention.

    Flops: 72 B s l h^2 (1 + s / 6 h + V / 12 l h), four thirds of the first two terms where recomputation counts
    (Narayanan et al. 2021, appendix A); for gated models the same sum over their own matrices. Raises `Refusal` where
    a figure is no positive number.
    """
    if given := positive_of(row, "step_time_s"):
        return given
    batch, seq, gpus = (integer_of(row, name) for name in ("global_batch", "seq", "n_gpus"))
    if not (batch and seq and gpus):
        return None
    if tokens_per_s := positive_of(row, "tokens_per_s_per_gpu"):
        return batch * seq / (tokens_per_s * gpus)
    rate, convention = positive_of(row, "tflops_per_gpu"), text_of(row, "flops_convention")
    if not rate or not convention:
        return None
    try:
        model = read_model(row, True, "", [])
    except Refusal:
        return None
    tokens = float(batch) * seq
    block = 2.0 * tokens * model.layers * (model.block_parameters + 2.0 * seq * model.hidden)
    head = 2.0 * tokens * model.vocab * model.hidden
    flops = (4 if convention.startswith("hardware") else 3) * block + 3 * head
    return float(flops / (rate * 1e12 * gpus))


def text_of(row: Row, name: str) -> str:
    """A field as lower-case text; empty where it is absent. Names of GPUs keep their case."""
    return str(row.get(name) or "").lower() if name != "gpu" else str(row.get(name) or "")


def integer_of(row: Row, name: str) -> int | None:
    """A field as a whole number of at least 1, or None where it is absent."""
    value = row.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or not 1 <= value <= LARGEST:
        raise Refusal(f"{name} must be a whole number of at least 1 and at most {LARGEST:g}, but is {value!r:.40}")
    return int(value)


def positive_of(row: Row, name: str) -> float | None:
    """A field as a positive number, or None where it is absent or 0 (some sources write 0 for "not measured")."""
    value = row.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise Refusal(f"{name} must be a positive number, but is {value!r}")
    return float(value)


def needed(row: Row, name: str) -> int:
    """The same for a field that must be there."""
    value = integer_of(row, name)
    if value is None:
        raise Refusal(f"{name} is absent")
    return value


def read_model(row: Row, modern: bool, notes: str, assumed: list[str]) -> Transformer:
    """The model of a row; `modern`: its GPUs are of a generation whose software fuses attention. Adds to `assumed`."""
    name = text_of(row, "model")
    family = next((one for one in FAMILIES if re.search(one.pattern, name)), None)
    if (integer_of(row, "ep") or 1) > 1 or re.search(EXPERTS, name):
        raise Refusal("the model has experts, but their number, sizes and how many a token takes are absent")
    if found := re.search(OTHER, name):
        raise Refusal(f"{found[0]} is not a stack of equal transformer blocks, and how its parts differ is absent")
    layers, hidden, heads, seq = (needed(row, field) for field in ("layers", "hidden", "heads", "seq"))
    plain = family is not None and not family.gated
    ffn = integer_of(row, "ffn")
    if ffn is None:
        if not plain:
            raise Refusal("ffn is absent")
        ffn = 4 * hidden
        assumed.append("ffn = 4 hidden")
    kv_heads = integer_of(row, "kv_heads")
    if kv_heads is None:
        if not plain:
            raise Refusal("kv_heads is absent")
        assumed.append("kv_heads = heads")
    vocab = integer_of(row, "vocab")
    if vocab is None:
        if family is None or family.vocab is None:
            raise Refusal("vocab is absent")
        vocab = family.vocab
        assumed.append(f"vocab = {vocab}")
    gated = family.gated if family is not None else ffn != 4 * hidden
    dtype = _dtype(row, assumed)
    fused = "flash" in notes or modern or dtype == "bfloat16"
    # Fully sharded PyTorch modules ("fsdp2 full", "fsdp FULL_SHARD ..."; Megatron's own is plain "fsdp") run eagerly
    # unless the row says that they are compiled (torchtitan's float8 always is); Megatron's kernels are fused.
    sharding = text_of(row, "zero_fsdp")
    pytorch = "fsdp" in sharding and sharding != "fsdp"
    eager = "eager" in notes or (pytorch and "compile" not in notes and "float8" not in text_of(row, "dtype"))
    if hidden % heads:
        raise Refusal(f"heads must divide hidden, but {heads} does not divide {hidden}")
    model = Transformer(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab, seq=seq, gated=gated,
        bias=family.bias if family else not gated, rotary=family.rotary if family else gated,
        tied=family.tied if family else not gated, dropout=bool(family and family.dropout and not fused),
        fused_attention=fused, fused=not eager,
        tuned_attention=not pytorch, fused_loss=fused and not (pytorch and gated), dtype=dtype,
    )  # fmt: skip
    billions = positive_of(row, "params_b")
    if billions and not 1 - TOLERANCE < model.num_parameters / (billions * 1e9) < 1 + TOLERANCE:
        raise Refusal(f"the sizes give {model.num_parameters / 1e9:.3g} billion parameters, but params_b is {billions}")
    return model


def _dtype(row: Row, assumed: list[str]) -> str:
    text = text_of(row, "dtype")
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of measured runs.

    Raises:
        InputError: the file cannot be read, or is not a JSON list of objects.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} must be a readable JSON file, but: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold a JSON list of objects, one for each run.")
    return rows


OUT_OF_MEMORY = (
    r"\boom(?:s|ed|-ed)?\b|\b(?:out[- ]of|insufficient|not enough)[- ](?:[a-z]+ )?memory\b"
    r"|\b(?:does not|doesn't|did not|didn't) fit\b"
)
DENIED = r"\b(?:no|not|without|avoids?|never)\b[^,.;]*$"


def ran_out_of_memory(row: Row) -> bool:
    """Whether the notes say that the run did not fit its GPUs ("OOM", "out of memory"), and do not deny it.

    >>> [ran_out_of_memory({"notes": notes}) for notes in ("(OOM)", "more room", "ran without OOM", None)]
    [True, False, False, False]
    """
    notes = text_of(row, "notes")
    return any(not re.search(DENIED, notes[: hit.start()]) for hit in re.finditer(OUT_OF_MEMORY, notes))

"""A task from a published model's configuration file: shapes alone, nothing is downloaded and no weights are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partita.cli.target import Target
from partita.errors import InputError


def task_of_config(path: Path, *, batch_size: int, seq: int | None, dtype: str = "bfloat16") -> Target:
    """A causal language model on ``meta`` with the loss of the next token, as `transformers` builds it.

    Args:
        path: a model's ``config.json``.
        batch_size: sequences of one step.
        seq: tokens of a sequence; None: as many as the model has positions.
        dtype: of parameters, a name of torch's.

    Raises:
        InputError: `transformers` is not there, the file is no configuration of it, or the model is no causal one.
    """
    import torch

    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"--config needs the package transformers, which is not installed: {error}. Install partita[bench], or "
            "give a TARGET."
        ) from error
    config = _config(path, transformers)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"--dtype must be a floating type of torch, e.g. bfloat16, but got {dtype!r}.")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    length = seq if seq is not None else most
    if not isinstance(length, int) or length < 2 or batch_size < 1:
        raise InputError(
            f"--seq must be at least 2 tokens and --global-batch at least 1, but got {length} and {batch_size}."
        )
    if isinstance(most, int) and length > most:
        raise InputError(f"--seq must be at most the model's {most} positions, but got {length}.")
    make: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        try:
            model: Any = make.from_config(config, dtype=kind)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{str(path)!r} must configure a causal language model, but transformers has none for it: "
                f"{str(error).splitlines()[0]}"
            ) from error
        ids = torch.zeros(batch_size, length, dtype=torch.long)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    model.train()
    return Target(model, next_token_loss, (ids, ids), None)


def next_token_loss(model: Any, batch: Any) -> Any:
    """Cross entropy of each next token, over the model's own logits."""
    import torch.nn.functional as F

    ids, targets = batch
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _config(path: Path, transformers: Any) -> Any:
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--config must be a readable file, but {str(path)!r} is not: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config must be a model's config.json, but {str(path)!r} is no JSON: {error}.") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"--config must name its model_type, as a config.json does, but {str(path)!r} does not.")
    try:
        return transformers.AutoConfig.for_model(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"transformers must know the model of {str(path)!r}, but: {str(error).splitlines()[0]}"
        ) from error

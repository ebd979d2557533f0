"""Helpers to build `transformers` models from a config, without any download."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.families.base import Batch, LossFn


def build_model(model: str, config: str, *, keep_dropout: bool = False, **settings: Any) -> nn.Module:
    """`transformers.<model>(transformers.<config>(**settings))`.

    Unless `keep_dropout`, every dropout probability of the config and of its nested configs is set to 0. Layer dropout
    is always 0: it decides in Python, from Python's own random numbers, which layers run.
    """
    import transformers

    # Its notices (optional kernels that are not installed) would drown the tables.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config_value = getattr(transformers, config)(**settings)
    _clear_dropout(config_value, keep_dropout=keep_dropout)
    built = getattr(transformers, model)(config_value)
    assert isinstance(built, nn.Module)
    return built


def _clear_dropout(config: Any, *, keep_dropout: bool) -> None:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _clear_dropout(value, keep_dropout=keep_dropout)
        elif isinstance(value, float) and ("layerdrop" in name or ("drop" in name and not keep_dropout)):
            setattr(config, name, 0.0)


def own_loss(**constant: Any) -> LossFn:
    """The loss that the `transformers` model computes itself from its labels; the batch holds its keyword arguments."""

    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        return model(**batch, **constant).loss

    return loss_fn

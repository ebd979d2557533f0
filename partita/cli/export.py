"""`partita export PLAN`: a plan for described GPUs as the configuration of an engine that runs it."""

from __future__ import annotations

import json as json_text
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import tyro

from partita.cli.output import print_json
from partita.errors import InputError
from partita.plan import Plan

Engine = Literal["megatron", "torchtitan", "deepspeed"]


def export(
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")],
    /,
    *,
    to: Engine,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Write a plan for described GPUs as Megatron-LM's arguments, torchtitan's TOML or DeepSpeed's JSON.

    Args:
        path: the plan file (of `partita plan --cluster 128x8xH100 --out FILE`).
        to: the engine.
        out: write here instead of standard output.
        json: print the configuration as JSON (arguments as a list).
    """
    from partita.export import layout_of_plan, to_deepspeed, to_megatron, to_torchtitan

    layout = layout_of_plan(Plan.load(path))
    value: object
    if to == "megatron":
        value = to_megatron(layout)
        text = shlex.join(value) + "\n"
    elif to == "torchtitan":
        text = to_torchtitan(layout)
        value = tomllib.loads(text)
    else:
        text = to_deepspeed(layout)
        value = json_text.loads(text)
    if out is not None:
        _write(out, text)
    if json:
        print_json({"engine": to, "configuration": value, "num_devices": layout.num_devices})
    elif out is None:
        sys.stdout.write(text)
    else:
        print(f"saved to {out}")
    return 0


def _write(out: Path, text: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    except OSError as error:
        raise InputError(f"--out must name a place for a file, but {str(out)!r} is none: {error.strerror}.") from error

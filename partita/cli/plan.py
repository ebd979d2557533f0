"""`partita plan TARGET`: the fastest plan for a model, on this machine or on a described cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from partita.cli.output import is_first
from partita.cli.target import Target, load_cluster, load_target
from partita.errors import InputError
from partita.plan import Constraints

FIXED = Constraints()


def task_of(target: str | None, config: Path | None, global_batch: int | None, seq: int | None) -> Target:
    """The task of TARGET, or of a configuration file.

    Raises:
        InputError: both are given, or neither, or what belongs to the other.
    """
    if (target is None) == (config is None):
        got = "both" if target is not None else "neither"
        raise InputError(f"give either a TARGET (file.py:function) or --config FILE, but got {got}.")
    if target is not None:
        if global_batch is not None or seq is not None:
            raise InputError("--global-batch and --seq belong to --config; a TARGET's batch has its own shape.")
        return load_target(target)
    if global_batch is None:
        raise InputError("--config needs --global-batch, the sequences of one step, e.g. --global-batch 1024.")
    from partita.cli.config import task_of_config

    assert config is not None
    return task_of_config(config, batch_size=global_batch, seq=seq)


def plan(
    target: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TARGET]")] = None,
    /,
    *,
    config: Path | None = None,
    global_batch: int | None = None,
    seq: int | None = None,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="FILE|PRESET")] = None,
    out: str | None = None,
    explain: bool = False,
    constraints: Annotated[Constraints, tyro.conf.arg(name="")] = FIXED,
    json: bool = False,
) -> int:
    """The plan that is predicted to be fastest for a model; nothing is trained.

    Args:
        target: file.py:function that returns (model, loss_fn, batch[, optimizer]).
        config: instead of a target, a config.json of transformers: a causal language model in bfloat16, from its
            shapes alone, trained with Adam in mixed precision. For described clusters of GPUs.
        global_batch: with --config, sequences of one step.
        seq: with --config, tokens of a sequence; default: the model's positions.
        cluster: a TOML file or a preset; default: this machine, or all machines of the running job.
        out: save the plan to this file.
        explain: print the long explanation.
        constraints: corners of the plan space to fix.
        json: print the plan as JSON.
    """
    import partita

    where = load_cluster(cluster)
    task = task_of(target, config, global_batch, seq)
    found = partita.plan(
        task.model, task.loss_fn, task.batch, optimizer=task.optimizer, cluster=where, constraints=constraints
    )
    if not is_first():
        return 0
    if out is not None:
        found.save(out)
    if json:
        sys.stdout.write(found.to_json().decode() + "\n")
    else:
        print(found.explain() if explain else str(found))
        if out is not None:
            print(f"saved to {out}")
    return 0

"""Which weights whose connections are learnt are stored and multiplied by their blocks, and which as masked ones.

The form is the method's `form`. Under "auto" a layer is one of blocks where its blocks were measured to be faster than
dense products, with the rows that a worker gets; under "blocks" wherever it can be. Rank 0 measures and decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from partita.cluster import Cluster
from partita.cost.sums import EXACT_SUM
from partita.errors import CaptureError, InputError
from partita.graph import Graph
from partita.plan import Constraints, Plan
from partita.training.block_form import BlockForm, BlockUse
from partita.training.choosing import shared_sum_cost
from partita.training.connecting import BlockLayer, Connecting
from partita.training.optimizers import kind_of
from partita.training.setup import StepSetup
from partita.training.sync import Masked

Wanted = Plan | Constraints


def in_blocks(setup: StepSetup, batch: Any, wanted: Wanted) -> tuple[StepSetup, Graph | None]:
    """The setup with the layers in blocks that are to be, and the step on the batch where that is captured already; all
    processes call it.

    Args:
        setup: its masks are the first ones.
        batch: a global batch.
        wanted: the plan, or what it must be like.

    Raises:
        InputError: the method wants blocks, and no layer can be of blocks; says why.
    """
    connecting = setup.connecting
    if connecting is None or connecting.method.form == "masked" or connecting.method.block is None:
        return setup, None
    why: dict[str, str] = {}  # why weights are masked, by name
    reason = _why_none(setup, connecting, wanted)
    possible = None if reason else _possible(setup, connecting, why)
    form: BlockForm | None = None
    graph: Graph | None = None
    times: dict[str, str] = {}
    if possible is not None:
        try:
            graph = dataclasses.replace(setup, blocks=possible).capture(batch)
        except CaptureError as error:
            reason = f"the step cannot be captured with blocks: {error}"
        else:
            form, times = _chosen(setup, connecting, possible, graph, wanted, why)
    if form is not possible:
        graph = None if form is None else dataclasses.replace(setup, blocks=form).capture(batch)
    if graph is not None and not _is_of_plan(graph, connecting, wanted):
        form, graph, reason = None, None, "the plan that was given is one of masked weights"
    if form is None and connecting.method.form == "blocks":
        listed = reason or "; ".join(f"{name} {text}" for name, text in why.items())
        raise InputError(
            f'form="blocks" needs layers that can be computed by their blocks, but there is none: {listed}. Pass '
            'form="auto", which masks the others'
        )
    return _with(setup, connecting, form, _explained(connecting, reason, times, why)), graph


def _why_none(setup: StepSetup, connecting: Connecting, wanted: Wanted) -> str:
    """Why no weight can be in blocks; "" if one may be."""
    if not connecting.method.keeps_numbers:
        return f"{connecting.method.name} changes how many blocks of inputs a block of outputs reads"
    if kind_of(setup.optimizer) != "element":
        return f"{type(setup.optimizer).__name__} sees weights as wholes"
    if isinstance(wanted, Plan) and wanted.mode == "block":
        return "the plan that was given is plain PyTorch"
    return ""


def _possible(setup: StepSetup, connecting: Connecting, why: dict[str, str]) -> BlockForm | None:
    """All weights that can be in blocks, as far as the model tells; fills `why` for the others."""
    users: dict[int, int] = {}
    for _, item in setup.model.named_parameters(remove_duplicate=False):
        users[id(item)] = users.get(id(item), 0) + 1
    names = []
    for name, weight in connecting.parameters.items():
        module = setup.model.get_submodule(name.rpartition(".")[0])
        text = _why_masked(module, weight, users[id(weight)], bool(connecting.masks[name].all()))
        if text:
            why[name] = text
        else:
            names.append(name)
    block = connecting.method.block
    assert block is not None
    return BlockForm(setup.model, setup.optimizer, connecting, names, block) if names else None


def _why_masked(module: nn.Module, weight: nn.Parameter, num_users: int, is_full: bool) -> str:
    if type(module) is not nn.Linear or module._parameters.get("weight") is not weight or "forward" in vars(module):
        return "is not that of a plain nn.Linear"
    if num_users > 1:
        return "belongs to several layers"
    if weight.dtype is not torch.float32 or weight.device.type != "cpu" or not weight.is_contiguous():
        return "is not a contiguous one of float32 on the CPU"
    if weight._backward_hooks:
        return "has hooks"
    return "has all its blocks" if is_full else ""


def _chosen(
    setup: StepSetup,
    connecting: Connecting,
    form: BlockForm,
    graph: Graph,
    wanted: Wanted,
    why: dict[str, str],
) -> tuple[BlockForm | None, dict[str, str]]:
    """The form with those layers only whose blocks are faster, and what was measured of these, in words."""
    uses = form.uses(graph)
    why |= dict.fromkeys(form.names - uses.keys(), "is not read by its layer alone")
    times: dict[str, str] = {}
    if connecting.method.form == "auto":
        why |= {name: "is not computed in float32, which is not measured" for name, use in uses.items() if use.is_cast}
        known = {name: use for name, use in uses.items() if not use.is_cast}
        measured = _measured(setup, connecting, known, wanted) if setup.team.rank == 0 else {}
        for name, forms_s in setup.team.from_first(measured).items():
            ratio = forms_s["dense"] / forms_s["blocks"]
            text = f"{forms_s['blocks'] * 1e3:.3g} ms by blocks, {forms_s['dense'] * 1e3:.3g} ms dense"
            if min(forms_s, key=forms_s.__getitem__) == "blocks":
                times[name] = f"{ratio:.1f} times as fast ({text})"
            else:
                why[name] = f"is at least as fast so ({text})"
    names = [name for name in uses if name in times or connecting.method.form == "blocks"]
    if len(names) == len(form.names):
        return form, times
    assert connecting.method.block is not None
    found = BlockForm(setup.model, setup.optimizer, connecting, names, connecting.method.block) if names else None
    return found, times


def _measured(
    setup: StepSetup, connecting: Connecting, uses: Mapping[str, BlockUse], wanted: Wanted
) -> dict[str, dict[str, float]]:
    """Seconds of each layer in each form, for the rows of one worker of a data axis over all cores, or as `wanted`."""
    if isinstance(wanted, Plan):
        num_workers, num_threads = wanted.axes.get("data", 1), wanted.threads_per_worker
    else:
        num_threads = wanted.threads_per_worker or 1
        num_cores = sum(len(process.cores) for process in setup.cluster.processes)
        num_workers = wanted.data or wanted.num_workers or max(num_cores // num_threads, 1)
    found = {}
    for name, use in uses.items():
        (out_features, in_features), block = connecting.masks[name].shape, connecting.method.block
        assert block is not None
        layer = BlockLayer(
            num_rows=-(-use.num_rows // num_workers),
            in_features=in_features,
            out_features=out_features,
            block=block,
            num_inputs=int(connecting.masks[name][0].sum()) // block[1],
            needs_input_gradient=use.needs_input_gradient,
        )
        found[name] = dict(connecting.method.times_s(layer, num_threads=num_threads))
    return found


def _is_of_plan(graph: Graph, connecting: Connecting, wanted: Wanted) -> bool:
    """Whether a given plan, if there is one, is of the step with these blocks. Whoever insists on blocks is told when
    the plan is validated."""
    insists = connecting.method.form == "blocks"
    return insists or not isinstance(wanted, Plan) or graph.fingerprint == wanted.graph_fingerprint


def _with(setup: StepSetup, connecting: Connecting, form: BlockForm | None, explained: tuple[str, ...]) -> StepSetup:
    if form is None:
        return dataclasses.replace(setup, explained=explained)
    # All gradients of the steps after which connections are chosen travel, so these need no masks.
    masked = dataclasses.replace(setup, sync=None, sums=EXACT_SUM)
    found = dataclasses.replace(
        setup,
        blocks=form,
        masked=masked,
        explained=explained,
        sync=None,
        sums=EXACT_SUM,
        cluster=_with_less_memory(setup.cluster, _kept_bytes(setup, connecting, form)),
    )
    others = {name: mask for name, mask in connecting.travelling.items() if name not in form.names}
    if not others or setup.team.is_alone:
        return found
    method = Masked(masks=others)
    with found.in_form():
        return dataclasses.replace(found, sync=method, sums=shared_sum_cost(method, found))


def _kept_bytes(setup: StepSetup, connecting: Connecting, form: BlockForm) -> int:
    """Of a process, for weights in blocks as dense ones: these, their states, and in the steps after which connections
    are chosen by them their gradients, one that is made and one that is kept."""
    num_elements = sum(connecting.masks[name].numel() for name in form.names)
    num_values = 1 + 2 * connecting.method.needs_gradients
    return int(num_elements * (4 * num_values + setup.facts.state_bytes_per_element))


def _with_less_memory(cluster: Cluster, num_bytes: int) -> Cluster:
    """The cluster as plans see it whose processes need so many bytes for something else."""
    return msgspec.structs.replace(
        cluster,
        processes=tuple(
            msgspec.structs.replace(process, memory_bytes=max(process.memory_bytes - num_bytes, 1))
            if process.memory_bytes
            else process
            for process in cluster.processes
        ),
    )


def _explained(
    connecting: Connecting, reason: str, times: Mapping[str, str], why: Mapping[str, str]
) -> tuple[str, ...]:
    if reason:
        return (f"weights are masked, not in blocks: {reason}",)
    names = [name for name in connecting.masks if name not in why]
    lines = [f"{name} is computed by its blocks{f': {times[name]}' if name in times else ''}" for name in names]
    return (*lines, *(f"{name} is masked: it {text}" for name, text in why.items()))

"""Plans for described clusters of GPUs: which requests they answer, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from partita.cluster import Cluster
from partita.constraints import Constraints
from partita.cost.networks import Fabric
from partita.errors import InfeasibleError
from partita.graph.checks import check_model
from partita.plan import Plan, cluster_fingerprint
from partita.planner.scale.as_plan import plan_of, scale_constraints
from partita.planner.scale.helps import smallest_change
from partita.planner.scale.plan import ScalePlanner


def is_described_gpus(cluster: Cluster) -> bool:
    """Whether plans for `cluster` are layouts: it is not here, and its machines have GPUs."""
    return not cluster.is_here and any(machine.gpus for machine in cluster.machines)


def described_planner(
    model: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: Any, optimizer: torch.optim.Optimizer | None
) -> ScalePlanner:
    """What plans `model` on any described GPUs.

    Raises:
        InputError, CaptureError: the step cannot be captured; says why.
    """
    check_model(model)
    return ScalePlanner(model, loss_fn, batch, optimizer)


def described_plan(planner: ScalePlanner, cluster: Cluster, constraints: Constraints) -> Plan:
    """The plan of mode "layout" that is predicted to be fastest.

    Raises:
        InfeasibleError: nothing fits; names the binding limit and the smallest change that helps.
        InputError: the constraints fix what such plans do not have.
        ClusterError: a machine has no GPU of a known kind.
    """
    wanted = scale_constraints(constraints, planner.batch_size)
    fabric = Fabric.of_cluster(cluster)
    try:
        solution = planner.plan(fabric, wanted)
    except InfeasibleError as error:
        change = smallest_change(planner, fabric, wanted)
        raise InfeasibleError(f"{error} {change}" if change else str(error)) from error
    return plan_of(solution, fabric, cluster_fingerprint=cluster_fingerprint(cluster))

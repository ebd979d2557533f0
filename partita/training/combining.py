"""Which arguments of `parallelize` go together: methods of synchronisation, elastic jobs, precision."""

from __future__ import annotations

import torch

from partita.arguments import told
from partita.cluster.job import current_job
from partita.errors import InputError
from partita.training.checkpoint.settings import Checkpoints
from partita.training.connecting import Connections
from partita.training.elastic_replicas import check_elastic_method
from partita.training.membership import Elastic
from partita.training.sync import Exact, Method, ReplicaMethod, method_of
from partita.training.sync.choice import TOLERANCES


def wanted_method(sync: object, tolerance: object) -> Method | None:
    """The method that is asked for; None: one is to be chosen.

    Raises:
        InputError: there is no such method or tolerance, or a tolerance is given where nothing is chosen.
    """
    if tolerance is not None and tolerance not in TOLERANCES:
        raise InputError(f"tolerance must be one of {TOLERANCES} or None, but got {told(tolerance)}")
    if sync == "auto":
        return None
    if tolerance is not None:
        raise InputError(f'tolerance belongs to sync="auto", which chooses within it, but got sync={sync!r}')
    return method_of(sync)


def check_elastic(elastic: object, method: Method | None, checkpoints: Checkpoints | None) -> None:
    """Whether processes of this job may come and go.

    Raises:
        InputError: `elastic` is no `Elastic`, or does not go with the method, the checkpoints or how this was started.
    """
    if elastic is None:
        return
    if not isinstance(elastic, Elastic):
        raise InputError(
            f"elastic must be partita.Elastic or None, but got {told(elastic)}. Pass e.g. partita.Elastic("
            'lighthouse="http://10.0.0.1:29510").'
        )
    if method is None:
        raise InputError(
            'elastic training needs a method that is known beforehand: sync="exact" or partita.sync.DiLoCo()'
        )
    check_elastic_method(method)
    job = current_job()
    if job is not None:
        raise InputError(
            f"processes of an elastic job must be started each by itself (python train.py), but {job.launcher} says "
            f"that this is one of {job.world_size}. Start it without, or with one process a launcher"
        )
    if checkpoints is not None and checkpoints.memory is not None:
        raise InputError(
            "copies in memory are for jobs whose processes end together, but this one is elastic: there a living "
            "process gives its state. Leave Checkpoints(memory=...) out"
        )


def check_connections(connections: object, method: Method | None, elastic: object) -> None:
    """Whether connections can be learnt in this job.

    Raises:
        InputError: it is no method that learns them, or does not go with how processes are brought together.
    """
    if connections is None:
        return
    if not isinstance(connections, Connections):
        raise InputError(
            f"connections must be a method that learns them or None, but got {told(connections)}. Pass e.g. "
            "partita.connections.RigL(density=0.1, until=1500)"
        )
    if elastic is not None or not isinstance(method, Exact):
        what = "elastic" if elastic is not None else f"sync={'auto' if method is None else method.name!r}"
        raise InputError(
            "connections must go with processes that train as one and sum gradients exactly (only of the connections "
            f'that are there), but got {what} as well; drop it, or pass sync="exact"'
        )


def check_method(
    method: Method | None,
    optimizer: torch.optim.Optimizer,
    tolerance: object,
    elastic: object,
    *,
    masters: bool,
    scales: bool,
) -> None:
    """Whether the method goes with the optimizer, masters and a scale of the loss. Whoever changes weights or applies
    gradients besides the optimizer knows neither masters nor a scale.

    Raises:
        InputError: it does not.
    """
    if method is not None:
        method.check(optimizer)
    if method is None and (masters or scales) and tolerance == "equivalent-loss":
        raise InputError(
            'master_weights and loss_scale must go with a method that is known beforehand, but got sync="auto" with '
            'tolerance="equivalent-loss"; name the method, or leave the tolerance out'
        )
    method = method or Exact()
    asked = "master_weights" if masters else "loss_scale"
    if (masters or scales) and (elastic is not None or isinstance(method, ReplicaMethod)):
        what = "elastic" if elastic is not None else f"sync={method.name!r}"
        raise InputError(f"{asked} must go with processes that train as one, but got {what} as well; drop one of them")
    if scales and not isinstance(method, Exact):
        raise InputError(
            f'loss_scale must go with sync="exact", but got {method.name!r}: a step that is skipped would leave '
            "infinities in what it keeps for later steps; drop one of them, or train in bfloat16, which needs no scale"
        )

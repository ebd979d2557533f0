"""Plans of one architecture at any width, from captures at two widths.

Every extent of a captured op is taken as an affine function of the width for fixed rows, and of the rows for fixed
width;
a third capture checks the fit. Ops and placements are those of the first width; a degree whose shares are not whole
at the width asked for is refused. So a plan at a new width captures nothing and solves no programme.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from partita.cluster.model import Cluster
from partita.cost.networks import Fabric
from partita.errors import InputError
from partita.planner.scale.plan import ScalePlanner
from partita.planner.scale.search import Searcher
from partita.planner.scale.solution import ScaleConstraints, ScaleSolution
from partita.planner.scale.works import WorkMaker, at_width, fitted


class WidthPlanner:
    """Plans ``make(width)`` for any width.

    Args:
        make: gives the model (best on ``meta``) of a width; only extents may depend on the width.
        widths: two widths at which the model is captured, and a third at which the fit is checked.
        loss_fn, batch, optimizer: as of `ScalePlanner`.

    Raises:
        InputError: ops depend on the width, or extents are not affine in it.

    Example:
        >>> plans = WidthPlanner(gpt_of_width, (4096, 8192, 12288), loss_fn, batch)  # doctest: +SKIP
        >>> plans.plan(10240, Cluster.preset("128x8xH100"))  # doctest: +SKIP
    """

    def __init__(
        self,
        make: Callable[[int], nn.Module],
        widths: Sequence[int],
        loss_fn: Callable[[Any, Any], Any],
        batch: Any,
        optimizer: torch.optim.Optimizer | str | None = None,
    ) -> None:
        if len(set(widths)) != 3:
            raise InputError(f"three different widths are needed (two to fit, one to check), but got {tuple(widths)}.")
        self.widths = tuple(widths)
        planners = [ScalePlanner(make(width), loss_fn, batch, optimizer) for width in widths]
        self.base = planners[0]
        keys = self.base.model.programs[0]
        for other, width in zip(planners[1:], widths[1:], strict=True):
            names = [op.call.name for op in other.model.programs[0].ops]
            if names != [op.call.name for op in keys.ops] or len(other.model.chain) != len(self.base.model.chain):
                raise InputError(
                    f"only extents may depend on the width, but the ops at {width} are not those at {widths[0]}."
                )
        fits = [fitted(keys, one.model.programs[0], one.model.programs[1], one.model.rows) for one in planners]
        self._narrow, self._wide = fits[0], fits[1]
        self._check(fits[2])

    def _check(self, third: Any) -> None:
        predicted = at_width(self._narrow, self._wide, self._share(self.widths[2]))
        for value, (base, slopes) in third.items():
            ours = (*predicted[value][0], *predicted[value][1])
            if any(abs(a - b) > 1e-6 * max(1.0, abs(b)) for a, b in zip(ours, (*base, *slopes), strict=True)):
                raise InputError(
                    f"every extent must be affine in the width, but at {self.widths[2]} {value.name} is {tuple(base)}, "
                    f"not {tuple(predicted[value][0])}. Plan such a model anew for each width."
                )

    def _share(self, width: int) -> float:
        return (width - self.widths[0]) / (self.widths[1] - self.widths[0])

    def plan(self, width: int, cluster: Cluster | Fabric, constraints: ScaleConstraints | None = None) -> ScaleSolution:
        """The fastest way to train the model of ``width`` on ``cluster``.

        Raises:
            InfeasibleError, ClusterError: as `ScalePlanner.plan`.
        """
        started_s = time.monotonic()
        return self._planner(width).plan_from(cluster, constraints, started_s, "quick")

    def _planner(self, width: int) -> ScalePlanner:
        shapes = at_width(self._narrow, self._wide, self._share(width))
        planner = object.__new__(ScalePlanner)
        planner.__dict__.update(self.base.__dict__)
        planner.maker = WorkMaker(self.base.model, self.base.maker.solver, shapes)
        planner.searcher = Searcher(
            maker=planner.maker, chain=self.base.searcher.chain, state=self.base.state, batch=self.base.batch_size
        )
        planner.num_parameters = self._parameters(planner)
        planner.capture_s = 0.0
        planner.is_prepared = True
        return planner

    def _parameters(self, planner: ScalePlanner) -> float:
        """Of all blocks; a tied parameter counts in every piece that reads it, as on stages of its own."""
        model, maker = planner.model, planner.maker
        per_piece = [
            sum(math.prod(maker.shape(value, (), 1)) for value in maker.parameters(piece)) for piece in model.pieces
        ]
        return float(sum(per_piece[piece] for piece, _ in model.chain))

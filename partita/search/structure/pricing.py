"""Learning widths while training: every unit has a price.

The penalty adds to the loss, for each width, its price times the sum over its units of the root mean square of what
makes the unit (a group lasso). The price is what the resource would save without one unit, in shares of all of it, so
expensive units must earn more. Units that are not worth it shrink, and `worth` tells how many are left; `filled` scales
what is left until the resource is used up, as MorphNet does in turns (Gordon et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from partita.arguments import check_number
from partita.errors import InputError
from partita.search.structure.network import Network

Resource = Literal["parameters", "flops"]


class WidthPrices:
    """What the units of a network cost.

    Args:
        network: the network as it is when training starts.
        strength: of the penalty; about the size of the loss divided by the number of widths, to begin with.
        resource: what is to be saved.
        widths: names of the widths that may shrink; None: all.

    Example:
        >>> prices = WidthPrices(network, strength=0.1, resource="flops")
        >>> loss_fn = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + prices.penalty(model)
        >>> ...                                                          # train
        >>> sizes = prices.worth(model)
        >>> smaller = pruned(Network(model, args), sizes)
    """

    def __init__(
        self,
        network: Network,
        *,
        strength: float,
        resource: Resource = "parameters",
        widths: list[str] | None = None,
    ) -> None:
        check_number(strength, "strength", least=0)
        if resource not in ("parameters", "flops"):
            raise InputError(f'resource must be "parameters" or "flops", but got {resource!r}')
        self._network, self._resource = network, resource
        total = self._cost({})
        self._groups = {}
        for name in network.widths if widths is None else widths:
            size = network.width(name).size
            outgoing = set(network.outgoing(name))
            made = [(tensor, dim, network.units(name, tensor, dim)) for tensor, dim in network.uses(name)
                    if tensor in network.parameters and (tensor, dim) not in outgoing]  # fmt: skip
            if size > 1 and made:
                price = strength * size * (total - self._cost({name: size - 1})) / total
                self._groups[name] = (price / size, made)

    def _cost(self, sizes: Mapping[str, int]) -> int:
        network = self._network
        return network.num_parameters(sizes) if self._resource == "parameters" else network.num_flops(sizes)

    def penalty(self, model: nn.Module) -> Tensor:
        """To be added to the loss of ``model`` (whose parameters have the network's names)."""
        found = [
            price * sizes.sum() for (price, _), sizes in zip(self._groups.values(), self._sizes(model), strict=True)
        ]
        return torch.stack(found).sum()

    def _sizes(self, model: nn.Module) -> list[Tensor]:
        """The root mean square of each unit."""
        found = []
        for name, (_, made) in self._groups.items():
            squares, count = torch.zeros(self._network.width(name).size), 0
            for tensor, dim, units in made:
                value = model.get_parameter(tensor)
                per_entry = value.movedim(dim, 0).flatten(1).square().sum(1) if value.ndim > 1 else value.square()
                mine = (units >= 0).nonzero().flatten().to(value.device)
                squares = squares.to(value).index_add(0, units[units >= 0].to(value.device), per_entry[mine])
                count += value.numel() // value.shape[dim]
            found.append((squares / count + 1e-16).sqrt())
        return found

    def worth(self, model: nn.Module, least: float = 0.05) -> dict[str, int]:
        """How many units of each width are worth their price.

        Args:
            least: a unit counts if its size is at least this share of its width's largest.
        """
        check_number(least, "least", above=0, most=1)
        with torch.no_grad():
            return {name: max(1, int((sizes >= least * sizes.max()).sum()))
                    for name, sizes in zip(self._groups, self._sizes(model), strict=True)}  # fmt: skip

    def filled(self, sizes: Mapping[str, int], budget: int) -> dict[str, int]:
        """``sizes`` times one factor, the largest with which the resource is at most ``budget``.

        Raises:
            InputError: a budget too small for any.
        """
        scaled = {name: 1 for name in sizes}
        if self._cost(scaled) > budget:
            raise InputError(f"the budget must be at least {self._cost(scaled)} {self._resource}, but is {budget}")
        low, high = 0.0, 1.0
        while self._cost(_scaled(sizes, high)) <= budget and high < 2**16:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(_scaled(sizes, middle)) <= budget else (low, middle)
        return _scaled(sizes, low)


def _scaled(sizes: Mapping[str, int], factor: float) -> dict[str, int]:
    return {name: max(1, int(size * factor)) for name, size in sizes.items()}

"""Methods that learn which connections a network has.

    t        steps made,  T  `until`: connections change before it,  ΔT  `every`
    n_l      connections of a group of layer l,  d_l its density (`densities`)
    f(t)     share that is replaced at t:  α/2 (1 + cos(π t / T)),  α  `fraction`

    static       n_l connections at random, for good
    SET          every ΔT the f(t) n_l smallest weights leave, as many connections come at random
    RigL         as SET, but those come whose gradients are largest
    magnitude    all connections at first; every ΔT after `since` the smallest weights leave, so that the density is
                 d_l + (1 - d_l) (1 - (t - since) / (T - since))^3

Sources: SET Mocanu et al. 2018; RigL Evci et al. 2020, algorithm 1 and section 3; gradual magnitude pruning Zhu and
Gupta 2017, section 3. In blocks a unit's weight and gradient are the norms of its elements. Connections that come have
weight zero and no optimizer state. With `crossing`, growth has a price where it makes inputs cross devices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import get_args

import torch
from torch import Generator, Tensor, nn

from partita.arguments import check_number
from partita.errors import InputError
from partita.search.connections.choosing import grown_GU, kept_of, random_GU, top_GU
from partita.search.connections.crossing import prices_OI
from partita.search.connections.densities import Distribution, check_density, layer_densities, num_kept
from partita.search.connections.grain import Grain
from partita.search.connections.layers import connections_of
from partita.training.connecting import Block, BlockLayer, Connections, Cut, Form, Masks, Tensors


@dataclass(frozen=True, kw_only=True)
class Learnt(Connections):
    """What all methods share.

    Args:
        density: of all connections that the layers may have, the share that they have (in the end).
        distribution: how that is dealt to layers: "erk" or "uniform".
        block: outputs and inputs of a block, which is then what a connection is; None: single elements.
        form: how weights in blocks are stored and multiplied: "masked" as dense ones with zeros, "blocks" by the blocks
            that are there alone, wherever a layer can be, "auto" so where that was measured to be faster.
        dense: patterns of parameters' names that stay dense, e.g. ``("head.*",)``.
        seed: of the random choices.
    """

    density: float
    distribution: Distribution = "erk"
    block: Block | None = None
    dense: Sequence[str] = ()
    form: Form = "auto"
    seed: int = 0
    grain: Grain = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_density(self.density, self.distribution)
        check_number(self.seed, "seed", least=0, whole=True)
        if isinstance(self.dense, str):
            raise InputError(f"dense must be a sequence of patterns, but got {self.dense!r}: pass ({self.dense!r},)")
        object.__setattr__(self, "grain", Grain(self.block))
        if self.form not in get_args(Form):
            raise InputError(f"form must be one of {get_args(Form)}, but got {self.form!r}")
        if self.form == "blocks" and (self.block is None or not self.keeps_numbers):
            raise InputError(
                'form="blocks" needs blocks of which each block of outputs reads as many all the time, but '
                f"{self.name} has {'single elements' if self.block is None else 'fewer and fewer'}. "
                'Pass block=(64, 64) to SET, RigL or Static, or form="masked"'
            )

    @property
    def keeps_numbers(self) -> bool:
        return self.block is not None

    def times_s(self, layer: BlockLayer, *, num_threads: int) -> Mapping[str, float]:
        from partita.search.blocks.forms import fastest_form  # which needs the grain of connections itself

        found = fastest_form(
            layer.num_rows, layer.in_features, layer.out_features, layer.block, layer.num_inputs,
            needs_input_gradient=layer.needs_input_gradient, num_threads=num_threads,
        )  # fmt: skip
        return {"blocks": found.blocks_s, "dense": found.dense_s, "masked": found.masked_s}

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return connections_of(model, dense=self.dense, grain=self.grain)

    def start(self, weights: Tensors, random: Generator) -> Masks:
        kept = self._num_kept(weights)
        return {
            name: self._mask(weight, random_GU(*self._extents(weight), kept[name], random))
            for name, weight in weights.items()
        }

    def changed(
        self,
        step: int,
        weights: Tensors,
        gradients: Tensors,
        masks: Masks,
        random: Generator,
        cuts: Mapping[str, Cut] = MappingProxyType({}),
    ) -> Masks:
        return dict(masks)

    def _densities(self, weights: Tensors) -> dict[str, float]:
        return layer_densities({n: tuple(w.shape) for n, w in weights.items()}, self.density, self.distribution)

    def _num_kept(self, weights: Tensors) -> dict[str, int]:
        """Units of each group of each layer."""
        found = self._densities(weights)
        return {name: num_kept(found[name], self._extents(weight)[1]) for name, weight in weights.items()}

    def _extents(self, weight: Tensor) -> tuple[int, int]:
        """Groups, and units of each."""
        shape = tuple(weight.shape)
        return self.grain.num_groups(shape), self.grain.num_units(shape)

    def _mask(self, weight: Tensor, chosen_GU: Tensor) -> Tensor:
        return self.grain.mask_of(chosen_GU, tuple(weight.shape))


@dataclass(frozen=True, kw_only=True)
class Static(Learnt):
    """Random connections that stay.

    Example:
        >>> step = partita.parallelize(model, optimizer, loss_fn, batch, connections=Static(density=0.1))
    """

    @property
    def name(self) -> str:
        return "static"

    def is_due(self, step: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Changing(Learnt):
    """What methods share whose connections change while training.

    Args:
        until: steps after which they stay as they are; three quarters of the training in the paper of RigL.
        every: steps between changes.
    """

    until: int
    every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.until, "until", least=1, whole=True)
        check_number(self.every, "every", least=1, whole=True)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 and 0 < step < self.until


@dataclass(frozen=True, kw_only=True)
class Replacing(Changing):
    """What SET and RigL share.

    Args:
        fraction: of a layer's connections that the first change replaces; later ones replace fewer.
        crossing: what a connection is kept from coming by if it makes an input cross from one device to another that
            does not yet: its growth is divided by ``1 + crossing`` (`partita.search.connections.crossing`). It depends
            on the plan, and has an effect where that cuts the widths of layers.
    """

    fraction: float = 0.3
    crossing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.fraction, "fraction", above=0, most=1)
        check_number(self.crossing, "crossing", least=0)

    @property
    def prices_crossing(self) -> bool:
        return self.crossing > 0

    @abstractmethod
    def growth_GU(self, name: str, weight: Tensor, gradients: Tensors, random: Generator) -> Tensor:
        """How much each unit ought to come."""

    def changed(
        self,
        step: int,
        weights: Tensors,
        gradients: Tensors,
        masks: Masks,
        random: Generator,
        cuts: Mapping[str, Cut] = MappingProxyType({}),
    ) -> Masks:
        share = self.fraction / 2 * (1 + math.cos(math.pi * step / self.until))
        found = {}
        for name, weight in weights.items():
            chosen_GU = self.grain.chosen_GU(masks[name])
            num = int(share * int(chosen_GU[0].sum()))
            kept_GU = kept_of(chosen_GU, self.grain.scores_GU(weight), num)
            growth_GU = self.growth_GU(name, weight, gradients, random)
            if self.crossing and name in cuts:
                prices = prices_OI(self._mask(weight, kept_GU), cuts[name])
                growth_GU = growth_GU / (1 + self.crossing * self.grain.units(prices).mean(2))
            found[name] = self._mask(weight, grown_GU(kept_GU, growth_GU, num))
        return found


@dataclass(frozen=True, kw_only=True)
class SET(Replacing):
    """Small weights leave, random connections come (Mocanu et al. 2018).

    Example:
        >>> step = partita.parallelize(model, optimizer, loss_fn, batch, connections=SET(density=0.1, until=1500))
    """

    @property
    def name(self) -> str:
        return "set"

    def growth_GU(self, name: str, weight: Tensor, gradients: Tensors, random: Generator) -> Tensor:
        return torch.rand(self._extents(weight), generator=random)


@dataclass(frozen=True, kw_only=True)
class RigL(Replacing):
    """Small weights leave, connections with large gradients come (Evci et al. 2020).

    Example:
        >>> step = partita.parallelize(model, optimizer, loss_fn, batch, connections=RigL(density=0.1, until=1500))
    """

    @property
    def name(self) -> str:
        return "rigl"

    @property
    def needs_gradients(self) -> bool:
        return True

    def growth_GU(self, name: str, weight: Tensor, gradients: Tensors, random: Generator) -> Tensor:
        return self.grain.scores_GU(gradients[name])


@dataclass(frozen=True, kw_only=True)
class Magnitude(Changing):
    """Small weights leave little by little, until as many are there as the density says (Zhu and Gupta 2017).

    Args:
        since: steps before the first leave.
    """

    since: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.since, "since", least=0, whole=True)
        if self.since >= self.until:
            raise InputError(f"since < until must hold, but got since={self.since}, until={self.until}")

    @property
    def name(self) -> str:
        return "magnitude"

    @property
    def keeps_numbers(self) -> bool:
        return False

    def is_due(self, step: int) -> bool:
        return step == self.until or (super().is_due(step) and step > self.since)

    def start(self, weights: Tensors, random: Generator) -> Masks:
        return {name: self._mask(weight, weight.new_ones(self._extents(weight)).bool().cpu())
                for name, weight in weights.items()}  # fmt: skip

    def changed(
        self,
        step: int,
        weights: Tensors,
        gradients: Tensors,
        masks: Masks,
        random: Generator,
        cuts: Mapping[str, Cut] = MappingProxyType({}),
    ) -> Masks:
        done = min(1.0, (step - self.since) / (self.until - self.since))
        found = {}
        for name, density in self._densities(weights).items():
            weight, chosen_GU = weights[name], self.grain.chosen_GU(masks[name])
            num = num_kept(density + (1 - density) * (1 - done) ** 3, chosen_GU.shape[1])
            scores_GU = self.grain.scores_GU(weight).masked_fill(~chosen_GU, -1)
            found[name] = self._mask(weight, top_GU(scores_GU, min(num, int(chosen_GU[0].sum()))))
        return found

"""Connections in training: which elements of weights a model has, and the method that changes them now and then.

A weight outside of its mask is zero. It stays so because its gradient is zeroed where a worker has all of it, before it
is clipped and applied, and since its optimizer state is zero as well: an element-wise optimizer then leaves it where it
is. Others may not (Muon makes a whole matrix of what it gets), so their weights are zeroed again after each step.

Workers see the gradients of all elements, so a method that wants those has them of a step that is made anyway, under
every plan; where weights are in blocks (`partita.training.block_form`), that one step is made with masked weights.
Rank 0 decides; masks are the same on all processes, which is checked whenever they have changed.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn

from partita.errors import CheckpointError
from partita.program.instructions import Box, Slice
from partita.training.job import Team

Tensors = Mapping[str, Tensor]
Masks = dict[str, Tensor]  # parameter -> bool, in its shape
Block = tuple[int, int]  # outputs, inputs
Form = Literal["auto", "masked", "blocks"]


@dataclass(frozen=True, kw_only=True)
class BlockLayer:
    """A linear layer of which each block of outputs reads `num_inputs` blocks of inputs, for so many rows."""

    num_rows: int
    in_features: int
    out_features: int
    block: Block
    num_inputs: int
    needs_input_gradient: bool


@dataclass(frozen=True)
class Cut:
    """How many of a layer's outputs, and of its inputs, each device has, in order."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]


class Connections(abc.ABC):
    """The contract of methods that learn connections. They are pure: everything that changes is given to them, and all
    tensors are in the memory of the processor.

    `block` is what a connection is (None: an element), `form` how weights are stored and multiplied: with zeros where
    nothing is ("masked"), by their blocks alone ("blocks"), or as is faster ("auto")."""

    seed: int
    block: Block | None = None
    form: Form = "masked"

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As in messages."""

    @abc.abstractmethod
    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters whose elements are connections, by their first names.

        Raises:
            InputError: the model has none.
        """

    @abc.abstractmethod
    def start(self, weights: Tensors, random: Generator) -> Masks:
        """The first connections."""

    @abc.abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether connections may change after so many steps."""

    @property
    def needs_gradients(self) -> bool:
        """Whether `changed` wants gradients of all elements."""
        return False

    @property
    def keeps_numbers(self) -> bool:
        """Whether every block of outputs reads as many blocks of inputs all the time, so that these may be stored."""
        return False

    def times_s(self, layer: BlockLayer, *, num_threads: int) -> Mapping[str, float]:
        """Seconds that a layer takes here as "dense", "masked" and "blocks"; asked where the form is "auto"."""
        raise NotImplementedError

    @property
    def prices_crossing(self) -> bool:
        """Whether `changed` wants cuts."""
        return False

    @abc.abstractmethod
    def changed(
        self,
        step: int,
        weights: Tensors,
        gradients: Tensors,
        masks: Masks,
        random: Generator,
        cuts: Mapping[str, Cut] = MappingProxyType({}),
    ) -> Masks:
        """The connections from then on. `gradients` are those of the last step, before they were clipped; empty unless
        they are needed. `cuts` are those of layers that lie on several devices; empty unless they are wanted."""


class Connecting:
    """The connections of one training: masks, in use by all workers of the process, and the method that changes them.

    `masks` are changed in place. `travelling` says which elements of gradients must be summed over processes in the
    step that comes: those under the masks, or all where the method will want them.

    Args:
        method: what decides.
        model: is zeroed outside of the first connections, once `begin` is called.
        team: the processes of the job.
    """

    def __init__(self, method: Connections, model: nn.Module, team: Team) -> None:
        self.method, self._team = method, team
        self.parameters = method.parameters_of(model)
        self.masks: Masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        self.travelling = {name: mask.clone() for name, mask in self.masks.items()}
        self.version = 0  # of the masks
        self.wants_gradients = False  # of all elements, in the step that comes
        self._gradients: dict[str, Tensor] = {}
        self._random = Generator().manual_seed(method.seed)

    @property
    def density(self) -> float:
        """The share of the elements that may be connections which are."""
        return sum(int(mask.sum()) for mask in self.masks.values()) / sum(mask.numel() for mask in self.masks.values())

    @property
    def shown(self) -> Tensors:
        """The masks, for whoever looks at them."""
        return MappingProxyType(self.masks)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the first connections; weights must be the same on all processes."""
        self._take(self.method.start(_on_cpu(self.parameters), self._random) if self._decides else self.masks)
        self.clean(optimizer)

    def before_step(self, step: int) -> None:
        """Gets ready for step number `step`, counted from 1."""
        self.wants_gradients = self.method.needs_gradients and self.method.is_due(step)
        if self.wants_gradients:
            for mask in self.travelling.values():
                mask.fill_(True)

    def take_gradient(self, name: str, box: Box | None, gradient: Tensor) -> None:
        """The gradient of the part of a parameter in `box`."""
        held = self._gradients.get(name)
        if held is None:
            held = self._gradients[name] = torch.zeros_like(self.masks[name], dtype=torch.float32)
        (held if box is None else box.of(held)).copy_(gradient)

    def change(
        self, step: int, sources: Mapping[str, Mapping[int, Box | None]], cuts: Mapping[str, Cut]
    ) -> tuple[int, int]:
        """Lets the method change the connections after step number `step`: how many have left and come. `sources` says
        which processes have which parts of weights and gradients, of those that rank 0 has not."""
        gradients, self._gradients = self._gradients, {}
        self._bring_together(sources, gradients)
        before = {name: mask.clone() for name, mask in self.masks.items()}
        decided = self.masks
        if self._decides:
            weights, masks = _on_cpu(self.parameters), _on_cpu(self.masks)
            decided = self.method.changed(step, weights, _on_cpu(gradients), masks, self._random, cuts)
        self._take(decided)
        left = sum(int((old & ~self.masks[name]).sum()) for name, old in before.items())
        come = sum(int((self.masks[name] & ~old).sum()) for name, old in before.items())
        return left, come

    @torch.no_grad()
    def clean(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes weights, and states of the optimizer in their shape, outside of the masks."""
        self.clean_weights()
        for name, parameter in self.parameters.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(self.masks[name])

    @torch.no_grad()
    def clean_weights(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.mul_(self.masks[name])

    def state_dict(self) -> dict[str, Any]:
        masks = {name: _packed(mask) for name, mask in self.masks.items()}
        return {"method": repr(self.method), "masks": masks, "random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from saved connections, whichever method has found them.

        Raises:
            CheckpointError: they are not those of this model.
        """
        saved = state["masks"]
        wrong = saved.keys() ^ self.masks.keys() or [
            name for name, mask in self.masks.items() if len(saved[name]) != (mask.numel() + 7) // 8
        ]
        if wrong:
            raise CheckpointError(
                f"saved connections must be those of the layers that have some here, but {sorted(wrong)[:5]} differ. "
                "Is another model trained, or are other layers kept dense?"
            )
        for name, mask in self.masks.items():
            mask.copy_(_unpacked(saved[name], mask.shape))
        self._random.set_state(state["random"])
        self._changed()

    # Inside ----------------------------------------------------------------------------------------------------------

    @property
    def _decides(self) -> bool:
        return self._team.rank == 0

    def _bring_together(self, sources: Mapping[str, Mapping[int, Box | None]], gradients: Mapping[str, Tensor]) -> None:
        """Every process has what rank 0 needs to decide."""
        for name, by_process in sources.items():
            values = [self.parameters[name].detach(), *([gradients[name]] if gradients else [])]
            for process, box in by_process.items():
                parts = values if box is None else [box.of(value) for value in values]
                self._team.spread(parts, source=process)

    def _take(self, decided: Masks) -> None:
        """Takes what rank 0 has decided."""
        for name, mask in self.masks.items():
            packed = _packed(decided[name])
            self._team.spread([packed])
            mask.copy_(_unpacked(packed, mask.shape))
        self._changed()
        if not self._team.is_alone:
            digest = hashlib.sha256(b"".join(_packed(mask).numpy().tobytes() for mask in self.masks.values()))
            self._team.require_equal(digest.hexdigest(), "connections")

    def _changed(self) -> None:
        self.version += 1
        for name, mask in self.masks.items():
            self.travelling[name].copy_(mask)


class GradientFilter:
    """Zeroes the gradients that the workers of one process have, outside of the masks.

    Args:
        connecting: has the masks.
        held: parameter -> its part that this process stores, where it does not store all of it; slices are then of
            that part.
        without: parameters of which nothing else is stored than what is there.
    """

    def __init__(self, connecting: Connecting, held: Mapping[str, Box], without: Collection[str] = ()) -> None:
        self._connecting, self._held, self._without = connecting, dict(held), without
        self._version = -1
        self._masks: dict[int, tuple[Sequence[Slice], list[Tensor | None]]] = {}  # by identity of the slices
        self._gradients: dict[str, Tensor] = {}  # of all elements of what is stored here, flat

    def before_step(self) -> None:
        """Called before workers run."""
        if self._version != self._connecting.version:
            self._masks.clear()
            self._version = self._connecting.version
        self._gradients = {}
        if self._connecting.wants_gradients:
            for name, mask in self._connecting.masks.items():
                held = self._held.get(name)
                self._gradients[name] = torch.zeros(mask.numel() if held is None else held.num_elements)

    def __call__(self, slices: Sequence[Slice], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of slices, flat or in a parameter's shape; called by workers, each for slices of its own."""
        for place, gradient in zip(slices, gradients, strict=True):
            kept = self._gradients.get(place.parameter)
            if kept is not None:
                kept[place.start : place.end] = gradient.reshape(-1)
        return [
            gradient if mask is None else gradient * mask.view(gradient.shape)
            for gradient, mask in zip(gradients, self._masks_of(slices), strict=True)
        ]

    def after_step(self) -> None:
        """Gives what was kept to whoever wants it."""
        for name, kept in self._gradients.items():
            box = self._held.get(name)
            shape = self._connecting.masks[name].shape if box is None else box.lengths
            self._connecting.take_gradient(name, box, kept.view(shape))
        self._gradients = {}

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Zeroes the gradients that the parameters have."""
        for name, mask in self._connecting.masks.items():
            gradient = parameters[name].grad
            if gradient is not None:
                if self._connecting.wants_gradients:
                    self._connecting.take_gradient(name, None, gradient)
                gradient.mul_(mask)

    def _masks_of(self, slices: Sequence[Slice]) -> list[Tensor | None]:
        known = self._masks.get(id(slices))
        if known is None or known[0] is not slices:
            known = self._masks[id(slices)] = (slices, [self._mask_of(place) for place in slices])
        return known[1]

    def _mask_of(self, place: Slice) -> Tensor | None:
        mask = self._connecting.masks.get(place.parameter)
        if mask is None or place.parameter in self._without:
            return None
        box = self._held.get(place.parameter)
        return (mask if box is None else box.of(mask)).reshape(-1)[place.start : place.end]


def _on_cpu(values: Tensors) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in values.items()}


def _packed(mask: Tensor) -> Tensor:
    """Eight elements in a byte."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy()))


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=shape.numel())).view(shape).bool()

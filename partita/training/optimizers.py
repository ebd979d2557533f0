"""The user's optimizer applied piece by piece.

The user's `torch.optim.Optimizer` stays the owner of options and state; what runs are clones of it ("shards") over
slices of the parameters, one per worker. Three kinds of optimizers are told apart by an experiment (`kind_of`):

* "element": every element is updated by itself (SGD, Adam, ...): shards work on flat slices.
* "parameter": every parameter is updated by itself (Muon, Adafactor, ...): shards work on whole parameters.
* "coupled": parameters influence each other (a norm over all of them): the user's own optimizer steps once, in the
  calling thread, after all gradients are there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from partita.cost.memory import STATE_ELEMENTS
from partita.errors import InputError
from partita.graph import Graph
from partita.plan import Plan
from partita.program import ProgramSet, lower
from partita.program.instructions import Box, Slice
from partita.program.ownership import UpdateCosts
from partita.training.averages import Average
from partita.training.fused import FusedUpdate
from partita.training.masters import ENTRY as MASTER
from partita.training.masters import HALF, new_master, take_master, widened
from partita.training.torch_adapter import clone_optimizer, has_own_step, options_of

Kind = Literal["element", "parameter", "coupled"]
Layout = Mapping[int, tuple[tuple[Slice, ...], ...]]  # worker -> the slices of each of its updates
_Key = int  # of a worker's update: hashing hundreds of slices in every step takes as long as updating them
Pieces = Callable[[torch.Tensor], list[torch.Tensor]]

_KINDS: dict[tuple[object, ...], tuple[Kind, bool]] = {}


def check_optimizer(optimizer: object, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Raise `InputError` unless `optimizer` works without a closure and holds some of `parameters` and no others."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer must be a torch.optim.Optimizer, but got {type(optimizer).__name__}. Pass e.g. "
            "torch.optim.AdamW(model.parameters())."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"optimizer must make a step from one gradient, but {type(optimizer).__name__} needs a closure that "
            "evaluates the loss several times a step. Use another optimizer, e.g. torch.optim.AdamW."
        )
    ours = {id(parameter) for parameter in parameters.values()}
    held = [item for group in optimizer.param_groups for item in group["params"]]
    foreign = [tuple(item.shape) for item in held if id(item) not in ours]
    if len(foreign) == len(held):
        raise InputError(
            "optimizer must hold parameters of the model, but holds none of them. Create it after the model, from "
            "model.parameters()."
        )
    if foreign:
        raise InputError(
            f"optimizer must hold parameters of the model only, but {len(foreign)} of {len(held)} are not (shapes "
            f"{foreign[:3]}) and would never be updated. Put all modules that are trained into the one that is given "
            "as model, or give the others an optimizer of their own."
        )


def kind_of(optimizer: torch.optim.Optimizer) -> Kind:
    """How far the parameters' elements are independent under this optimizer, found by running it for three steps on
    small tensors whole and in pieces. An experiment that raises counts as dependent. Cached by class and options.

    An optimizer with step hooks, or with another function in the place of its ``step`` (clipping of gradients, clamping
    of weights), is taken as coupled: its own step runs, once, with all gradients there."""
    if has_own_step(optimizer):
        return "coupled"
    ranking: tuple[Kind, ...] = ("element", "parameter", "coupled")
    return max((_experiment(optimizer, group)[0] for group in optimizer.param_groups), key=ranking.index)


def fused_agrees(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the class has a fused variant for the CPU that gives the same update within 1e-6 and the user left the
    choice of the variant open in every group."""
    return all(
        "fused" in group
        and group["fused"] is None
        and group.get("foreach") is None
        and not group.get("differentiable")
        and _experiment(optimizer, group)[1]
        for group in optimizer.param_groups
    )


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [item for group in optimizer.param_groups for item in group["params"]]


@contextlib.contextmanager
def by_fused_kernels(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Meanwhile the optimizer (of which `fused_agrees`) steps by its fused kernels, which make no values on the way.

    They take dense floating-point values, and want all parameters to have a state or none to; what else there is, steps
    as it always did.
    """
    stepped = [(item, item.grad) for item in _parameters_of(optimizer) if item.grad is not None]
    are_dense = all(_fusible(item) and gradient.layout is torch.strided for item, gradient in stepped)
    groups = optimizer.param_groups if are_dense and _is_uniform(optimizer, [item for item, _ in stepped]) else []
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = None


@dataclass(frozen=True)
class OptimizerFacts:
    """What planning needs to know of an optimizer; `optimizer` itself where there is one.

    `update_values`: how many values of a slice's size an update makes on the way. Fused variants make none, most others
    one at a time. `whole_parameters`: each is updated, and its gradient summed over processes, by one worker, as
    `costs` says. `clips`: the norm of all gradients is known before any update. `masters`: half-precision parameters
    have some. These and an average of the weights count as states.
    """

    name: str = "SGD"
    state_bytes_per_element: float = 0.0
    kind: Kind = "element"
    update_values: int = 0
    whole_parameters: bool = False
    clips: bool = False
    costs: UpdateCosts = UpdateCosts()  # noqa: RUF009 - a frozen value
    masters: bool = False
    optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def of(
        cls,
        optimizer: torch.optim.Optimizer | None,
        *,
        whole_parameters: bool = False,
        clips: bool = False,
        averages: bool = False,
        costs: UpdateCosts | None = None,
        masters: bool = False,
    ) -> OptimizerFacts:
        """`whole_parameters`: they must be whole for another reason than the optimizer."""
        if optimizer is None:
            return cls(whole_parameters=whole_parameters, clips=clips)
        kind = kind_of(optimizer)
        return cls(
            name=type(optimizer).__name__,
            # Of a float32 element's size: states of a master are twice as wide as its weight.
            state_bytes_per_element=4.0 * (state_elements(optimizer) + averages + masters) * (1 + masters),
            kind=kind,
            update_values=0 if kind == "element" and fused_agrees(optimizer) else 1,
            whole_parameters=whole_parameters or kind != "element",
            clips=clips,
            costs=costs or UpdateCosts(),
            masters=masters,
            optimizer=optimizer,
        )

    def lowered(self, graph: Graph, plan: Plan) -> ProgramSet:
        """The programs of a plan for training with the optimizer."""
        return lower(graph, plan, whole_parameters=self.whole_parameters, clips=self.clips, costs=self.costs)


def state_elements(optimizer: torch.optim.Optimizer) -> int:
    """Elements of state for an element of a parameter (of the group with the most), counted after a step on a small
    tensor. Counters and factors, whose shape is not the parameter's, count nothing. An optimizer that cannot make the
    step counts by its class, or as one with two states."""
    most = 0
    for group in optimizer.param_groups:
        tensor = torch.nn.Parameter(torch.zeros(4, 6))
        tensor.grad = torch.ones(4, 6)
        try:
            with torch.random.fork_rng(devices=[]):
                clone = clone_optimizer(optimizer, [{**options_of(group), "params": [tensor]}])
                clone.step()
        except Exception:  # whatever a user's class raises on other tensors than its own
            return STATE_ELEMENTS.get(type(optimizer).__name__, 2)
        state = clone.state.get(tensor, {}).values()
        most = max(most, sum(isinstance(item, torch.Tensor) and item.shape == tensor.shape for item in state))
    return most


def _experiment(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> tuple[Kind, bool]:
    options = {name: value for name, value in options_of(group).items() if name not in ("lr", "initial_lr")}
    key = (type(optimizer), *sorted((name, repr(value)) for name, value in options.items()))
    if key not in _KINDS:
        whole = _trial(optimizer, group, lambda tensor: [tensor], together=True)
        if whole is None:
            _KINDS[key] = ("coupled", False)
        else:
            kind: Kind = "coupled"
            if _equal(whole, _trial(optimizer, group, lambda tensor: [tensor], together=False)):
                kind = "parameter"
                if _equal(whole, _trial(optimizer, group, _halves, together=False)):
                    kind = "element"
            fused = "fused" in group and _equal(
                whole, _trial(optimizer, {**group, "fused": True}, _halves, together=False)
            )
            _KINDS[key] = (kind, fused)
    return _KINDS[key]


def _halves(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.view(-1)
    return [flat[: flat.numel() // 3], flat[flat.numel() // 3 :]]


def _trial(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], pieces: Pieces, *, together: bool
) -> list[torch.Tensor] | None:
    """The change of two small parameters after three steps, or None if the optimizer cannot do it. The learning rate is
    0.01 whatever the user's is (a warm-up may start at 0), the gradients' scales differ by element, tensor and step."""
    generator = torch.Generator().manual_seed(11)
    tensors = [torch.randn(4, 6, generator=generator), torch.randn(5, 3, generator=generator)]
    before = [tensor.clone() for tensor in tensors]
    parts = [[torch.nn.Parameter(piece) for piece in pieces(tensor)] for tensor in tensors]
    options = options_of(group)
    if "lr" in options:
        options["lr"] = torch.full_like(options["lr"], 0.01) if isinstance(options["lr"], torch.Tensor) else 0.01
    flat = [part for several in parts for part in several]
    try:
        with torch.random.fork_rng(devices=[]):
            runs = [
                clone_optimizer(optimizer, [{**options, "params": params}])
                for params in ([flat] if together else [[part] for part in flat])
            ]
            for step in range(3):
                for tensor, several in zip(tensors, parts, strict=True):
                    gradient = torch.randn(tensor.shape, generator=generator)
                    gradient *= torch.logspace(-2, 2, gradient.numel()).view_as(gradient) * 3.0**step
                    for part, piece in zip(several, pieces(gradient), strict=True):
                        part.grad = piece.clone()
                for run in runs:
                    run.step()
    except Exception:  # whatever a user's class raises on pieces: it does not work on pieces
        return None
    return [after - start for after, start in zip(tensors, before, strict=True)]


def _equal(first: list[torch.Tensor], second: list[torch.Tensor] | None) -> bool:
    return second is not None and all(
        torch.allclose(one, two, rtol=1e-5, atol=1e-7) for one, two in zip(first, second, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One slice as the shard sees it: `tensor` shares the parameter's storage, or is the master of `weight`, which
    does."""

    place: Slice
    tensor: torch.nn.Parameter
    group: int
    weight: torch.Tensor | None = None


def _is_uniform(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether all of the parameters have a state, or none has."""
    held = [bool(optimizer.state.get(item)) for item in parameters]
    return all(held) or not any(held)


class OptimizerShards:
    """The user's optimizer, spread over workers and their updates: each has a clone of its own, since a clone may count
    how often it was asked to step.

    `layout` gives the slices of each local worker's updates; `whole` keeps slices of whole parameters in their own
    shape. State that the user's optimizer already has is taken over; `collect` brings it back, after which both share
    storage. With `decay` an average of the weights is part of the state; with `masters` half-precision parameters have
    masters there, which are updated instead and rounded. Where `parameters` holds only a part of a user's parameter,
    `parts` gives the user's own and the box of it.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> layout = {0: ((Slice("weight", 0, 3),),), 1: ((Slice("weight", 3, 4),),)}
        >>> shards = OptimizerShards(optimizer, dict(model.named_parameters()), layout, whole=False)
        >>> shards.refresh_options()
        >>> shards.update(1, layout[1][0], [torch.ones(1)])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, torch.nn.Parameter],
        layout: Layout,
        *,
        whole: bool,
        parts: Mapping[str, tuple[torch.nn.Parameter, Box]] | None = None,
        decay: float | None = None,
        masters: bool = False,
    ) -> None:
        self._optimizer, self._parameters, self._whole = optimizer, parameters, whole
        self._decay, self._masters = decay, masters
        self._casts = any(item.dtype in HALF for item in parameters.values())  # gradients may be wider or narrower
        self._rounded: dict[_Key, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}  # weights and their masters
        self._averages: dict[_Key, Average] = {}
        self._parts = parts or {}
        self._part_state: dict[str, dict[str, Any]] = {name: {} for name in self._parts}
        self._num_uniform = 0  # steps in a row before which all parameters had a state, or none had
        self._fused = not whole and fused_agrees(optimizer) and all(_fusible(item) for item in parameters.values())
        groups = {id(item): number for number, group in enumerate(optimizer.param_groups) for item in group["params"]}
        self._pieces: dict[_Key, dict[Slice, _Piece]] = {}
        self._shards: dict[_Key, tuple[torch.optim.Optimizer, tuple[int, ...]]] = {}
        self._fused_updates: dict[_Key, FusedUpdate] = {}
        own_updates = dict.fromkeys((worker, slices) for worker, updates in layout.items() for slices in updates)
        self._keys = {update: key for key, update in enumerate(own_updates)}
        self._known: dict[tuple[int, int], tuple[Sequence[Slice], _Key]] = {}  # by worker and identity
        for (_, slices), key in self._keys.items():
            held = {
                place: self._piece(place, groups[id(self._user(place.parameter))])
                for place in slices
                if id(self._user(place.parameter)) in groups
            }
            self._pieces[key] = held
            numbers = tuple(sorted({piece.group for piece in held.values()}))
            if numbers:
                own = [
                    {"params": [piece.tensor for piece in held.values() if piece.group == number]} for number in numbers
                ]
                self._shards[key] = (clone_optimizer(optimizer, own), numbers)
        self.load()
        self.refresh_options()

    def refresh_options(self) -> None:
        """Copy the options (learning rates, ...) of the user's groups; call it before each step."""
        # Fused kernels want all parameters to have a state or none to: a layer that was thawed has none yet.
        settled = self._num_uniform > 1
        uniform = settled or all(_is_uniform(shard, _parameters_of(shard)) for shard, _ in self._shards.values())
        self._num_uniform = self._num_uniform + 1 if uniform else 0
        for shard, numbers in self._shards.values():
            for own, number in zip(shard.param_groups, numbers, strict=True):
                own.update(options_of(self._optimizer.param_groups[number]))
                if self._fused:
                    own["fused"] = uniform

    def update(self, worker: int, slices: Sequence[Slice], gradients: Sequence[torch.Tensor]) -> None:
        """Apply the optimizer to `slices` with their gradients, flat or, of whole parameters, in the parameter's shape.
        Called in the worker's thread."""
        key = self._key(worker, slices)
        if key not in self._shards:
            return
        if self._casts:
            held = self._pieces[key]
            gradients = [gradient.to(held[place].tensor.dtype) if place in held else gradient
                         for place, gradient in zip(slices, gradients, strict=True)]  # fmt: skip
        fused = self._fused_updates.get(key)
        if fused is None or not fused(gradients):
            self._update(key, slices, gradients)
        if self._masters:
            self._round(key)
        if self._decay is not None:
            average = self._averages.get(key)
            if average is None:
                tensors = [piece.tensor for piece in self._pieces[key].values()]
                average = self._averages[key] = Average(self._shards[key][0], tensors, self._decay)
            average()

    def _round(self, key: _Key) -> None:
        """Brings the weights to their masters."""
        known = self._rounded.get(key)
        if known is None:
            state = self._shards[key][0].state
            pairs = [(p.weight, p.tensor) for p in self._pieces[key].values() if p.weight is not None]
            for _, master in pairs:  # not before the first update: an optimizer makes what is missing in an empty state
                state[master][MASTER] = master.detach()
            known = self._rounded[key] = [w for w, _ in pairs], [master.detach() for _, master in pairs]
        if known[0]:
            torch._foreach_copy_(*known)

    def _key(self, worker: int, slices: Sequence[Slice]) -> _Key:
        known = self._known.get((worker, id(slices)))
        if known is None or known[0] is not slices:
            known = self._known[worker, id(slices)] = (slices, self._keys.get((worker, tuple(slices)), -1))
        return known[1]

    def _update(self, key: _Key, slices: Sequence[Slice], gradients: Sequence[torch.Tensor]) -> None:
        """By the optimizer's own step; the next ones may go directly to its kernel."""
        held = self._pieces[key]
        for place, gradient in zip(slices, gradients, strict=True):
            piece = held.get(place)
            if piece is not None:
                piece.tensor.grad = gradient.view(piece.tensor.shape)
        shard = self._shards[key][0]
        shard.step()
        for piece in held.values():
            piece.tensor.grad = None
        parameters = [held[place].tensor if place in held else None for place in slices]
        fused = None if self._whole else FusedUpdate.of(shard, parameters, gradients)
        if fused is not None:
            self._fused_updates[key] = fused
        else:
            self._fused_updates.pop(key, None)

    def load(self) -> None:
        """Take the state from the user's optimizer. Tensors of the parameter's shape are shared, others are copied."""
        self._num_uniform = 0
        self._forget()
        for name, (parameter, box) in self._parts.items():
            self._part_state[name] = cut_state(self._optimizer.state.get(parameter) or {}, parameter, box)
        for piece, shard in self._all_pieces():
            name = piece.place.parameter
            state = self._part_state.get(name) or self._optimizer.state.get(self._parameters[name])
            shard.state.pop(piece.tensor, None)
            own = {key: self._cut(piece, value) for key, value in state.items()} if state else {}
            if piece.weight is not None:
                own = widened(own, piece.weight)
                take_master(piece.tensor, piece.weight, own)
            if own:
                shard.state[piece.tensor] = own

    def _forget(self) -> None:
        """What is made of states and masters as they lie now."""
        self._fused_updates.clear()
        self._averages.clear()
        self._rounded.clear()

    def collect(self) -> None:
        """Bring the state into the user's optimizer, as if it had made the steps itself."""
        self._forget()
        for piece, shard in self._all_pieces():
            state = shard.state.get(piece.tensor)
            if not state:
                continue
            whole = self._state(piece.place.parameter)
            for name, value in state.items():
                if self._is_cut(piece, value):
                    state[name] = self._paste(piece, whole, name, value)
                else:
                    whole[name] = value.clone() if isinstance(value, torch.Tensor) else value
            if MASTER in state:
                piece.tensor.data = state[MASTER]
        for name, (parameter, box) in self._parts.items():
            paste_state(self._optimizer.state[parameter], parameter, box, self._part_state[name])

    def _user(self, name: str) -> torch.nn.Parameter:
        """The user's own parameter of that name."""
        return self._parts[name][0] if name in self._parts else self._parameters[name]

    def _state(self, name: str) -> dict[str, Any]:
        """The state of what this process stores of a parameter."""
        if name in self._parts:
            return self._part_state[name]
        state: dict[str, Any] = self._optimizer.state[self._parameters[name]]  # made where there is none
        return state

    def _all_pieces(self) -> Iterable[tuple[_Piece, torch.optim.Optimizer]]:
        for key, (shard, _) in self._shards.items():
            for piece in self._pieces[key].values():
                yield piece, shard

    def _piece(self, place: Slice, group: int) -> _Piece:
        view = self._view(place)
        if self._masters and view.dtype in HALF:
            return _Piece(place=place, tensor=new_master(view), group=group, weight=view.detach())
        return _Piece(place=place, tensor=view, group=group)

    def _view(self, place: Slice) -> torch.nn.Parameter:
        parameter = self._parameters[place.parameter].detach()
        whole = place.start == 0 and place.end == parameter.numel()
        if self._whole and not whole:
            raise AssertionError(f"this optimizer needs whole parameters, but the program cuts {place}")
        # A tensor without dims keeps its shape, as its state cannot be told from counters otherwise.
        view = parameter if self._whole or parameter.dim() == 0 else parameter.view(-1)[place.start : place.end]
        return torch.nn.Parameter(view, requires_grad=True)

    def _keeps_shape(self, piece: _Piece) -> bool:
        return self._whole or piece.tensor.dim() == 0

    def _is_cut(self, piece: _Piece, value: object) -> bool:
        return isinstance(value, torch.Tensor) and not self._keeps_shape(piece) and value.shape == piece.tensor.shape

    def _cut(self, piece: _Piece, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        parameter = self._parameters[piece.place.parameter]
        if self._keeps_shape(piece) or value.shape != parameter.shape:
            return value.clone()
        if not value.is_contiguous():
            value = value.contiguous()
        return value.detach().view(-1)[piece.place.start : piece.place.end]

    def _paste(self, piece: _Piece, whole: dict[str, Any], name: str, value: torch.Tensor) -> torch.Tensor:
        parameter = self._parameters[piece.place.parameter]
        target: Any = whole.get(name)
        fits = isinstance(target, torch.Tensor) and target.shape == parameter.shape and target.is_contiguous()
        if not fits or target.dtype != value.dtype:
            whole[name] = target = torch.zeros(parameter.shape, dtype=value.dtype, device=value.device)
        part: torch.Tensor = target.view(-1)[piece.place.start : piece.place.end]
        if part.data_ptr() != value.data_ptr():
            part.copy_(value)
        return part


def _has_shape(value: object, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def cut_state(whole: Mapping[str, Any], parameter: torch.Tensor, box: Box) -> dict[str, Any]:
    """The state of one box of a parameter, out of that of the whole; `paste_state` is the inverse."""
    return {
        name: box.of(value).clone(memory_format=torch.contiguous_format) if _has_shape(value, parameter) else value
        for name, value in whole.items()
    }


def paste_state(whole: dict[str, Any], parameter: torch.Tensor, box: Box, part: Mapping[str, Any]) -> None:
    """Writes the state of one box of a parameter into the state of the whole parameter."""
    for name, value in part.items():
        if not isinstance(value, torch.Tensor) or value.shape != box.lengths:
            whole[name] = value.clone() if isinstance(value, torch.Tensor) else value
            continue
        target = whole.get(name)
        if not isinstance(target, torch.Tensor) or not _has_shape(target, parameter) or target.dtype != value.dtype:
            whole[name] = target = torch.zeros(parameter.shape, dtype=value.dtype, device=value.device)
        box.of(target).copy_(value)


def _fusible(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")

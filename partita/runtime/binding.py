"""From instructions to closures: everything that can be decided before the step is decided here.

`Binder` walks one worker's program once and makes one function per instruction, which takes the worker's registers.
It also decides who owns memory: a register may be changed in place only if its value was made by an addition here and
has been handed to nobody since (segments may return views of their inputs; sent and reduced values are shared).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Clip,
    Free,
    Instruction,
    Program,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Slice,
    Start,
    SumSquares,
    TensorSpec,
    Update,
)
from partita.program.uses import overwritable, reads, writes
from partita.runtime.background import BackgroundSum, SumFn
from partita.runtime.collectives import (
    AllGatherOp,
    AllReduceOp,
    AllToAllOp,
    Cut,
    ReduceScatterOp,
    Seat,
    barrier,
)
from partita.runtime.local import Channel
from partita.runtime.piecewise import PiecewiseReduceOp
from partita.runtime.segments import Code, fits, with_strides
from partita.runtime.transport import Mail

Registers = dict[str, Tensor]
Op = Callable[[Registers], None]
_PERSISTENT = ("p:", "b:", "c:")
NORM_EPSILON = 1e-6  # as of torch.nn.utils.clip_grad_norm_


class UpdateFn(Protocol):
    """Applies the optimizer, in the worker's thread, to flat slices of parameters with their gradients: flat as well,
    or of whole parameters in any shape."""

    def __call__(self, worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None: ...


class FilterFn(Protocol):
    """Changes the gradients of slices, in the worker's thread, before they are clipped and applied."""

    def __call__(self, slices: Sequence[Slice], gradients: Sequence[Tensor]) -> list[Tensor]: ...


class Mode:
    """What `Update` does in the current step. `finite_only`: nothing if the loss, or the norm of the gradients where it
    is known, is NaN or infinite. `continues`: gradients of steps before that were only accumulated are added, else
    dropped. `most_norm`: limit of the norm of all gradients, where the programs clip them. `loss_scale`: what gradients
    are divided by before."""

    update = True
    accumulate_only = False
    finite_only = False
    continues = True
    most_norm = math.inf
    loss_scale = 1.0


class Surroundings(Protocol):
    """What the engine knows and a worker's binder asks."""

    mode: Mode
    update: UpdateFn
    filter_gradients: FilterFn | None
    device: torch.device

    def code(self, segment: str) -> Code: ...
    def seat(self, worker: int, group: tuple[int, ...], key: str) -> Seat: ...
    def channel(self, sender: int, receiver: int, key: str) -> Channel: ...
    def remote(self, sender: int, receiver: int, key: str) -> tuple[Mail, int] | None: ...
    def background(self, worker: int, collective: AllReduce) -> BackgroundSum: ...
    def gradient_sum(self, worker: int, collective: AllReduce) -> SumFn | None: ...
    def process_of(self, worker: int) -> int: ...


def label(instruction: Instruction) -> str:
    """A short name of an instruction for messages and timelines."""
    kind = type(instruction).__name__
    if isinstance(instruction, Run):
        return f"{kind} {instruction.segment}@{instruction.microbatch} {instruction.phase.value}"
    if isinstance(instruction, Send):
        return f"{kind} {instruction.key} to {instruction.peer}"
    if isinstance(instruction, Recv):
        return f"{kind} {instruction.key} from {instruction.peer}"
    if isinstance(instruction, Update):
        return f"{kind} of {len(instruction.slices)} slices"
    if isinstance(instruction, Free):
        return f"{kind} {', '.join(instruction.registers)}"
    if isinstance(instruction, (SumSquares, Clip)):
        return f"{kind} of {len(instruction.registers)} slices"
    return f"{kind} {instruction.key}"


class Binder:
    """Makes the closures of one worker's program. `pending` collects sends that must finish before the step ends."""

    def __init__(self, program: Program, around: Surroundings, generator: Generator) -> None:
        self.program = program
        self.worker = program.worker
        self.around = around
        self.generator = generator
        self.pending: list[Callable[[], None]] = []
        self._present: set[str] = set()  # registers that have a value at this point of the program
        self._owned: set[str] = set()  # registers that may be changed in place at this point
        self._exchanged: set[str] = set()  # registers whose strides may not be those of the captured graph
        self._overwritable = overwritable(program.instructions)
        self._background: dict[str, BackgroundSum] = {}  # by key, between their `Start` and `Await`
        self._sums: dict[int, list[Tensor]] = {}  # gradients of earlier steps that were only accumulated

    def bind(self) -> list[Op]:
        return [self._bind(instruction) for instruction in self.program.instructions]

    def _bind(self, instruction: Instruction) -> Op:
        binders: dict[type, Callable[[Any], Op]] = {
            Run: self._run,
            Send: self._send,
            Recv: self._recv,
            AllReduce: self._all_reduce,
            ReduceScatter: self._reduce_scatter,
            AllGather: self._all_gather,
            AllToAll: self._all_to_all,
            Start: self._start,
            Await: self._await,
            SumSquares: self._sum_squares,
            Clip: self._clip,
            Update: self._update,
            Free: self._free,
        }
        return binders[type(instruction)](instruction)

    def _written(self, registers: Sequence[str], *, exchanged: bool = True) -> None:
        self._present.update(registers)
        self._owned.difference_update(registers)
        (self._exchanged.update if exchanged else self._exchanged.difference_update)(registers)

    # Run -------------------------------------------------------------------------------------------------------------

    def _run(self, run: Run) -> Op:
        code = self.around.code(run.segment)
        self._owned.difference_update(run.inputs)  # an output may be a view of an input
        call = code.bind(self.generator)
        fetch = self._fetch(run, code)
        store = self._store(run)

        def op(registers: Registers) -> None:
            store(registers, call(*fetch(registers)))

        return op

    def _fetch(self, run: Run, code: Code) -> Callable[[Registers], Sequence[Tensor]]:
        """The inputs of a segment, with the strides it was made for."""
        names = run.inputs
        get: Callable[[Registers], Sequence[Tensor]]
        get = itemgetter(*names) if len(names) > 1 else lambda registers: [registers[name] for name in names]
        checked = [
            (index, strides)
            for index, (name, strides) in enumerate(zip(names, code.strides, strict=True))
            if strides is not None and (code.compiled is not None or name in self._exchanged)
        ]
        if not checked:
            return get
        fixed: list[int] | None = None
        volatile = [index for index, _ in checked if names[index][:2] in ("x:", "d:")]
        expected = dict(checked)

        def fetch(registers: Registers) -> Sequence[Tensor]:
            nonlocal fixed
            values = get(registers)
            if fixed is None:  # layouts do not change from step to step, but for the user's data
                fixed = [i for i, strides in checked if i not in volatile and not fits(values[i], strides)]
            if not fixed and not volatile:
                return values
            values = list(values)
            for index in fixed:
                values[index] = with_strides(values[index], expected[index])
            for index in volatile:
                if not fits(values[index], expected[index]):
                    values[index] = with_strides(values[index], expected[index])
            return values

        return fetch

    def _store(self, run: Run) -> Callable[[Registers, Sequence[Tensor]], None]:
        names = run.outputs
        fresh, into, onto = [], [], []
        for index, (name, accumulate) in enumerate(zip(names, run.accumulate, strict=True)):
            if not (accumulate and name in self._present):
                fresh.append((index, name))
            elif name in self._owned:
                into.append((index, name))
            else:
                onto.append((index, name))
        self._written([name for _, name in fresh], exchanged=False)
        self._owned.update(name for _, name in onto)
        self._exchanged.difference_update(name for _, name in onto)
        if not into and not onto:

            def store_all(registers: Registers, outputs: Sequence[Tensor]) -> None:
                registers.update(zip(names, outputs, strict=True))

            return store_all

        def store(registers: Registers, outputs: Sequence[Tensor]) -> None:
            for index, name in fresh:
                registers[name] = outputs[index]
            for index, name in onto:
                registers[name] = registers[name] + outputs[index]
            for index, name in into:
                registers[name].add_(outputs[index])

        return store

    # Messages --------------------------------------------------------------------------------------------------------

    def _send(self, send: Send) -> Op:
        name = send.register
        self._owned.discard(name)
        remote = self.around.remote(self.worker, send.peer, send.key)
        if remote is None:
            put = self.around.channel(self.worker, send.peer, send.key).put
            return lambda registers: put(registers[name])
        mail, tag = remote
        process, pending = self.around.process_of(send.peer), self.pending

        def op(registers: Registers) -> None:
            pending.append(mail.send(registers[name], process, tag))

        return op

    def _recv(self, recv: Recv) -> Op:
        name = recv.register
        self._written([name])
        remote = self.around.remote(recv.peer, self.worker, recv.key)
        take: Callable[[], Tensor]
        if remote is None:
            take = self.around.channel(recv.peer, self.worker, recv.key).take
        else:
            mail, tag = remote
            process, spec = self.around.process_of(recv.peer), recv.spec
            take = lambda: mail.receive(spec, process, tag)  # noqa: E731
        if name[:2] not in _PERSISTENT:

            def op(registers: Registers) -> None:
                registers[name] = take()

            return op

        def overwrite(registers: Registers) -> None:
            value, target = take(), registers[name]
            if value.data_ptr() != target.data_ptr():  # within a process it is the same memory
                target.copy_(value)

        return overwrite

    # Collectives -----------------------------------------------------------------------------------------------------

    def _all_reduce(self, instruction: AllReduce) -> Op:
        seat = self.around.seat(self.worker, instruction.group, instruction.key)
        if not instruction.registers:
            return lambda registers: barrier(seat)
        outputs = instruction.outputs or instruction.registers
        self._owned.difference_update(instruction.registers)
        self._written(outputs)
        formed, line = self.around.gradient_sum(self.worker, instruction), seat.line
        if formed is not None and line is not None:

            def form(registers: Registers) -> None:
                registers.update(
                    zip(outputs, formed([registers[name] for name in instruction.registers], line), strict=True)
                )

            return form
        parts: list[tuple[AllReduceOp, list[str], list[str]]] = []
        for dtype in dict.fromkeys(spec.dtype for spec in instruction.specs):
            chosen = [i for i, spec in enumerate(instruction.specs) if spec.dtype == dtype]
            reduce = AllReduceOp(seat, [instruction.specs[i] for i in chosen])
            parts.append((reduce, [instruction.registers[i] for i in chosen], [outputs[i] for i in chosen]))

        def op(registers: Registers) -> None:
            for reduce, names, results in parts:
                registers.update(zip(results, reduce([registers[name] for name in names]), strict=True))

        return op

    def _reduce_scatter(self, instruction: ReduceScatter) -> Op:
        seat = self.around.seat(self.worker, instruction.group, instruction.key)
        names = instruction.registers
        outputs = writes(instruction, self.worker)
        self._owned.difference_update(names)
        self._written(outputs)
        scatter: PiecewiseReduceOp | ReduceScatterOp
        if instruction.parts:
            scatter = PiecewiseReduceOp(seat, instruction, self.around.device)
        else:
            places = self._overwritable.get(instruction.key, ())
            scatter = ReduceScatterOp(seat, cuts_of(instruction), self.around.device, overwritable=places)

        def op(registers: Registers) -> None:
            registers.update(zip(outputs, scatter([registers[name] for name in names]), strict=True))

        return op

    def _all_gather(self, instruction: AllGather) -> Op:
        seat = self.around.seat(self.worker, instruction.group, instruction.key)
        name, output = instruction.register, instruction.output
        self._owned.discard(name)
        self._written([output])
        gather = AllGatherOp(seat, instruction.spec, instruction.dim, instruction.sizes)

        def op(registers: Registers) -> None:
            registers[output] = gather(registers[name])

        return op

    def _all_to_all(self, instruction: AllToAll) -> Op:
        seat = self.around.seat(self.worker, instruction.group, instruction.key)
        name, output = instruction.register, instruction.output
        self._owned.discard(name)
        self._written([output])
        turn = AllToAllOp(
            seat, instruction.spec, instruction.dim, instruction.sizes, instruction.new_dim, instruction.new_sizes
        )

        def op(registers: Registers) -> None:
            registers[output] = turn(registers[name])

        return op

    def _start(self, instruction: Start) -> Op:
        names = instruction.collective.registers
        self._present.difference_update(names)
        self._owned.difference_update(names)
        task = self._background[instruction.key] = self.around.background(self.worker, instruction.collective)

        def op(registers: Registers) -> None:
            task.start([registers.pop(name) for name in names])

        return op

    def _await(self, instruction: Await) -> Op:
        names = instruction.collective.registers
        self._written(names)
        task = self._background.pop(instruction.key)

        def op(registers: Registers) -> None:
            registers.update(zip(names, task.finish(), strict=True))

        return op

    # Update and Free -------------------------------------------------------------------------------------------------

    def _sum_squares(self, instruction: SumSquares) -> Op:
        names, output = instruction.registers, instruction.output
        weights = torch.tensor(instruction.weights, dtype=torch.float64)
        mode, loss, take = self.around.mode, self.program.loss, self._accumulation(names)

        def op(registers: Registers) -> None:
            gradients = None
            if not (mode.finite_only and loss and not math.isfinite(float(registers[loss]))):
                gradients = take([registers[name] for name in names])
            if gradients is None:
                registers[output] = torch.zeros(1, dtype=torch.float64)
                return
            registers.update(zip(names, gradients, strict=True))
            registers[output] = square_of(gradients, weights)

        self._written([output])
        return op

    def _clip(self, instruction: Clip) -> Op:
        names, square, mode = instruction.registers, instruction.square, self.around.mode

        def op(registers: Registers) -> None:
            norm = math.sqrt(float(registers[square])) / mode.loss_scale
            scale = clip_factor(norm, mode.most_norm) / mode.loss_scale
            if scale != 1 and math.isfinite(scale):
                for name in names:  # what the register showed may be shared
                    registers[name] = registers[name] * scale

        return op

    def _update(self, update: Update) -> Op:
        slices, worker = update.slices, self.worker
        names = list(reads(update))
        mode, apply = self.around.mode, self.around.update
        loss, square = self.program.loss, self.program.square
        take = self._accumulation(names) if not square else None  # else they have been added up before the norm

        def op(registers: Registers) -> None:
            if mode.finite_only and loss and not math.isfinite(float(registers[loss])):
                return
            if mode.finite_only and square and not math.isfinite(float(registers[square])):
                return
            gradients: list[Tensor] | None = [registers[name] for name in names]
            if take is not None and gradients is not None:
                gradients = take(gradients)
            if gradients is not None and mode.update and not mode.accumulate_only:
                apply(worker, slices, gradients)

        return op

    def _accumulation(self, names: Sequence[str]) -> Callable[[list[Tensor]], list[Tensor] | None]:
        """Gradients in these registers, with those of earlier steps that were only accumulated, and filtered; None in a
        step that only accumulates."""
        mode, sums, key = self.around.mode, self._sums, len(self._sums)
        filtered, slices = self.around.filter_gradients, self._slices_of(names)
        sums[key] = []

        def take(gradients: list[Tensor]) -> list[Tensor] | None:
            if not mode.continues:
                sums[key] = []
            if mode.accumulate_only:
                if sums[key]:
                    for total, gradient in zip(sums[key], gradients, strict=True):
                        total.add_(gradient)
                else:
                    sums[key] = [gradient.clone() for gradient in gradients]
                return None
            if sums[key] and mode.update:
                gradients = [total + gradient for total, gradient in zip(sums[key], gradients, strict=True)]
                sums[key] = []
            return gradients if filtered is None else filtered(slices, gradients)

        return take

    def _slices_of(self, names: Sequence[str]) -> tuple[Slice, ...]:
        """Which slices the registers have the gradients of."""
        updates = [item for item in self.program.instructions if isinstance(item, Update)]
        known = {name: place for item in updates for name, place in zip(reads(item), item.slices, strict=True)}
        return tuple(known[name] for name in names)

    def _free(self, free: Free) -> Op:
        names = free.registers
        self._present.difference_update(names)
        self._owned.difference_update(names)

        def op(registers: Registers) -> None:
            for name in names:
                registers.pop(name, None)

        return op


def clip_factor(norm: float, most_norm: float) -> float:
    """What gradients are multiplied by so that their norm is at most `most_norm`."""
    return min(most_norm / (norm + NORM_EPSILON), 1.0)


def square_of(gradients: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of the squares of the norms, in shape (1,) and float64."""
    if not gradients:
        return torch.zeros(1, dtype=torch.float64)
    norms = torch._foreach_norm([value.float() if value.itemsize < 4 else value for value in gradients])
    return (torch.stack([norm.double().cpu() for norm in norms]).square() @ weights).view(1)


def cuts_of(instruction: ReduceScatter) -> list[list[Cut]]:
    """Per position of the group, the pieces that it receives."""
    if not instruction.slices:
        starts = [sum(instruction.sizes[:i]) for i in range(len(instruction.sizes))]
        return [
            [
                Cut(index, instruction.dim, start, size, _resized(spec, instruction.dim, size))
                for index, spec in enumerate(instruction.specs)
            ]
            for start, size in zip(starts, instruction.sizes, strict=True)
        ]
    index_of: Mapping[str, int] = {name: index for index, name in enumerate(instruction.parameters)}
    replicated = instruction.replicated or (False,) * len(instruction.parameters)
    result = []
    for slices in instruction.slices:
        cuts = []
        for item in slices:
            index = index_of[item.parameter]
            spec = TensorSpec((item.num_elements,), instruction.specs[index].dtype)
            cuts.append(Cut(index, -1, item.start, item.num_elements, spec, not replicated[index]))
        result.append(cuts)
    return result


def _resized(spec: TensorSpec, dim: int, extent: int) -> TensorSpec:
    return TensorSpec((*spec.shape[:dim], extent, *spec.shape[dim + 1 :]), spec.dtype)

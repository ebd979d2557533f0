"""Which registers an instruction reads and writes: the common ground of liveness, checks and memory accounting."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Clip,
    Free,
    Instruction,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Start,
    SumSquares,
    TensorSpec,
    Update,
)
from partita.units import MIB

LARGE_BYTES = MIB  # of a gradient: to find out who else holds a smaller one takes longer than to make a new sum
SQUARE = TensorSpec((1,), torch.float64)  # what `SumSquares` writes


def is_persistent(register: str) -> bool:
    """Parameters, buffers and constants outlive the step."""
    return register[:2] in ("p:", "b:", "c:")


def reads(instruction: Instruction) -> tuple[str, ...]:
    """Registers that must hold a value before the instruction."""
    if isinstance(instruction, Run):
        return instruction.inputs
    if isinstance(instruction, Send):
        return (instruction.register,)
    if isinstance(instruction, (AllReduce, ReduceScatter)):
        return instruction.registers
    if isinstance(instruction, (AllGather, AllToAll)):
        return (instruction.register,)
    if isinstance(instruction, Start):
        return instruction.collective.registers
    if isinstance(instruction, SumSquares):
        return instruction.registers
    if isinstance(instruction, Clip):
        return (*instruction.registers, instruction.square)
    if isinstance(instruction, Update):
        return tuple(f"g:{instruction.first + index}" for index in range(len(instruction.slices)))
    return ()


def own_slices(instruction: ReduceScatter, worker: int) -> int:
    """Number of slices that `worker` gets."""
    return len(instruction.slices[instruction.group.index(worker)]) if instruction.slices else 0


def writes(instruction: Instruction, worker: int | None = None) -> tuple[str, ...]:
    """Registers that hold a new value after the instruction (for a gradient `ReduceScatter`: those of `worker`)."""
    if isinstance(instruction, Run):
        return instruction.outputs
    if isinstance(instruction, Recv):
        return (instruction.register,)
    if isinstance(instruction, AllReduce):
        return instruction.outputs or instruction.registers
    if isinstance(instruction, Await):
        return writes(instruction.collective)
    if isinstance(instruction, ReduceScatter):
        if instruction.slices:
            count = own_slices(instruction, worker) if worker is not None else 0
            return tuple(f"g:{instruction.first + index}" for index in range(count))
        return instruction.outputs
    if isinstance(instruction, (AllGather, AllToAll, SumSquares)):
        return (instruction.output,)
    if isinstance(instruction, Clip):
        return instruction.registers
    return ()


def overwritable(instructions: Sequence[Instruction]) -> dict[str, tuple[int, ...]]:
    """By the key of every `ReduceScatter` of gradients, the places of large registers that it is the last to read: it
    may leave its sums in their memory."""
    found = {}
    for instruction, then in itertools.zip_longest(instructions, instructions[1:]):
        if isinstance(instruction, ReduceScatter) and instruction.slices:
            freed = then.registers if isinstance(then, Free) else ()
            pairs = zip(instruction.registers, instruction.specs, strict=True)
            found[instruction.key] = tuple(
                place for place, (name, spec) in enumerate(pairs) if name in freed and spec.num_bytes >= LARGE_BYTES
            )
    return found


def written_specs(instruction: Instruction, worker: int) -> tuple[tuple[str, TensorSpec], ...]:
    """The registers that an instruction writes, with shape and dtype, as far as the instruction tells (not `Run`, nor
    `Clip`, which changes neither)."""
    if isinstance(instruction, Recv):
        return ((instruction.register, instruction.spec),)
    if isinstance(instruction, AllReduce):
        return tuple(zip(instruction.outputs or instruction.registers, instruction.specs, strict=True))
    if isinstance(instruction, Await):
        return written_specs(instruction.collective, worker)
    if isinstance(instruction, ReduceScatter):
        if instruction.slices:
            dtypes = dict(zip(instruction.parameters, (spec.dtype for spec in instruction.specs), strict=True))
            mine = instruction.slices[instruction.group.index(worker)]
            return tuple(
                (f"g:{instruction.first + index}", TensorSpec((part.num_elements,), dtypes[part.parameter]))
                for index, part in enumerate(mine)
            )
        size = instruction.sizes[instruction.group.index(worker)]
        return tuple(
            (output, _with_extent(spec, instruction.dim, size))
            for output, spec in zip(instruction.outputs, instruction.specs, strict=True)
        )
    if isinstance(instruction, SumSquares):
        return ((instruction.output, SQUARE),)
    if isinstance(instruction, AllGather):
        return ((instruction.output, _with_extent(instruction.spec, instruction.dim, sum(instruction.sizes))),)
    if isinstance(instruction, AllToAll):
        whole = _with_extent(instruction.spec, instruction.dim, sum(instruction.sizes))
        size = instruction.new_sizes[instruction.group.index(worker)]
        return ((instruction.output, _with_extent(whole, instruction.new_dim, size)),)
    return ()


def _with_extent(spec: TensorSpec, dim: int, extent: int) -> TensorSpec:
    shape = list(spec.shape)
    shape[dim] = extent
    return TensorSpec(tuple(shape), spec.dtype)

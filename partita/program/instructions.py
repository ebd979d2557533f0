"""Instructions, segments and programs: what the simulator and the runtime both execute.

One `Program` is the instruction list of one worker for one training step. Values live in named *registers* of the
worker:

    p:NAME    parameter, or the worker's part of it (persistent; one storage per process, shared by its workers)
    b:NAME    buffer (persistent, shared like a parameter)
    c:NAME    constant (persistent)
    x:LEAF@K  piece of batch leaf LEAF for microbatch K (a view, set before the step by a `Feed`)
    d:NAME@K  piece of a random draw (set before the step by a `Feed`)
    n:NAME@K  result of node NAME for microbatch K; n:NAME without @K: of the whole step (accumulated gradients, the
    loss) g:I       reduced gradient of the worker's I-th slice

Registers other than p:, b: and c: are gone after the step. Groups and peers are worker indices over the whole job.
Collectives match by their `key`: all members of `group` execute, in order, collectives of equal key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from partita.graph.graph import Phase
from partita.graph.storages import GraphMemory


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        result = 1
        for extent in self.shape:
            result *= extent
        return result

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Box:
    """A part of a tensor: entries ``starts[d] : starts[d] + lengths[d]`` of every dim d.

    Example:
        >>> Box((0, 2), (3, 2)).of(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        return math.prod(self.lengths)

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        return self.lengths == tuple(shape)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor in whose coordinates the box is given."""
        for dim, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            if length != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, length)
        return tensor

    def cut(self, dim: int, start: int, length: int) -> Box:
        """The part of the box with entries ``start : start + length`` of its own dim `dim`."""
        starts, lengths = list(self.starts), list(self.lengths)
        starts[dim] += start
        lengths[dim] = length
        return Box(tuple(starts), tuple(lengths))

    def within(self, outer: Box) -> Box:
        """The same entries in the coordinates of `outer`, which holds them all."""
        return Box(tuple(a - b for a, b in zip(self.starts, outer.starts, strict=True)), self.lengths)

    def hull(self, other: Box) -> Box:
        """The least box with the entries of both."""
        starts = tuple(map(min, self.starts, other.starts))
        ends = tuple(map(max, self.ends, other.ends))
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.starts, self.lengths, strict=True))


@dataclass(frozen=True)
class Segment:
    """The ops of one worker between two communications: a functional graph of local shapes.

    Segments with equal `key` have equal code; they are compiled and measured once. `module`'s placeholders and output
    tuple match `input_specs` and `output_specs`. `random` says that it holds ops which draw random numbers.
    """

    key: str
    module: fx.GraphModule
    input_specs: tuple[TensorSpec, ...]
    output_specs: tuple[TensorSpec, ...]
    flops: int
    num_bytes: int
    memory: GraphMemory
    random: bool = False


@dataclass(frozen=True)
class Slice:
    """Elements ``start:end`` of the flattened parameter `parameter`, as its process stores it, which one worker reduces
    and updates."""

    parameter: str
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Run:
    """Run a segment. Outputs flagged in `accumulate` are added to the register where it exists already."""

    segment: str  # Segment.key
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    phase: Phase
    microbatch: int
    stage: int
    accumulate: tuple[bool, ...]


@dataclass(frozen=True)
class Send:
    """Hand `register` to worker `peer`; within a process without a copy. Does not wait for the receiver."""

    register: str
    peer: int
    key: str
    spec: TensorSpec


@dataclass(frozen=True)
class Recv:
    """Wait for the value with `key` from worker `peer`. A p: register is overwritten in place."""

    register: str
    peer: int
    key: str
    spec: TensorSpec


@dataclass(frozen=True)
class AllReduce:
    """Sum every register over the group, into `outputs` (empty: in place). Without registers it is a barrier.

    `gradients` names the slices that registers are the gradients of, if that is what they are: such a sum runs over
    processes, one worker of each, and need not be exact where the user permits it.
    """

    registers: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    group: tuple[int, ...]
    key: str
    outputs: tuple[str, ...] = ()
    gradients: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class ReduceScatter:
    """Sum over the group, give each member its piece.

    Either `dim`/`sizes` cut every register along a dim (result in `outputs`), or `slices` names, per member of the
    group in order, the flat slices of the parameters that it receives: then `registers[i]` is the gradient of
    `parameters[i]` and the results of the worker that this instruction is of go to registers ``g:FIRST``,
    ``g:FIRST+1``, ... in the order of its slices.
    `replicated[i]` says that register i already holds the whole gradient on every member, so it is only sliced.

    Where parameters are cut over the group, `storages[i]` is the shape of parameter i in this process and
    `parts[i][j]` the box of it for which member j's register counts in the sums of the worker that this instruction is
    of (None: not at all). `sums_over[i]` names the workers of the job whose registers make up the gradient of that
    worker's slices of parameter i, those that other instructions add included.
    """

    registers: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    group: tuple[int, ...]
    key: str
    outputs: tuple[str, ...] = ()
    dim: int = 0
    sizes: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    slices: tuple[tuple[Slice, ...], ...] = ()
    replicated: tuple[bool, ...] = ()
    first: int = 0
    storages: tuple[tuple[int, ...], ...] = ()
    parts: tuple[tuple[Box | None, ...], ...] = ()
    sums_over: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class AllGather:
    """Concatenate the members' registers along `dim`; member i brings `sizes[i]` entries."""

    register: str
    output: str
    spec: TensorSpec  # of the local piece
    group: tuple[int, ...]
    key: str
    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class AllToAll:
    """Change the sharded dim: from `sizes` along `dim` to `new_sizes` along `new_dim`."""

    register: str
    output: str
    spec: TensorSpec
    group: tuple[int, ...]
    key: str
    dim: int
    sizes: tuple[int, ...]
    new_dim: int
    new_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Begin a sum over processes in the background; its group has one worker of each. Its registers are not to be read
    until its `Await`. The members of a group start their sums in one order."""

    collective: AllReduce

    @property
    def key(self) -> str:
        return self.collective.key


@dataclass(frozen=True)
class Await:
    """Wait for a sum that was started; then the registers hold it."""

    collective: AllReduce

    @property
    def key(self) -> str:
        return self.collective.key


@dataclass(frozen=True)
class Update:
    """Apply the optimizer to `slices` with the gradients in ``g:FIRST, g:FIRST+1, ...``."""

    slices: tuple[Slice, ...]
    first: int = 0


@dataclass(frozen=True)
class SumSquares:
    """The sum of the squares of all elements of some gradients, each times its weight, as float64 in `output`. Weights
    make the sum over all workers count every gradient once: it is there on several processes where each updates a copy
    of the parameter."""

    registers: tuple[str, ...]
    weights: tuple[float, ...]
    output: str


@dataclass(frozen=True)
class Clip:
    """Scale gradients so that the norm of all of them, whose square is in `square`, is at most the step's limit."""

    registers: tuple[str, ...]
    square: str


@dataclass(frozen=True)
class Free:
    """Drop registers that are not read again in this step."""

    registers: tuple[str, ...]


Instruction = (
    Run
    | Send
    | Recv
    | AllReduce
    | ReduceScatter
    | AllGather
    | AllToAll
    | Start
    | Await
    | SumSquares
    | Clip
    | Update
    | Free
)


@dataclass(frozen=True)
class Feed:
    """Set `register` to entries ``start:start+length`` of dim `dim` of a batch leaf or draw (`dim` -1: the whole), and
    cut further dims as `also` says, by (dim, start, length)."""

    register: str
    leaf: int = -1  # index of the batch leaf, or -1
    draw: str = ""  # name of the draw, or ""
    dim: int = -1
    start: int = 0
    length: int = 0
    also: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Draw:
    """A random tensor that does not depend on data: drawn whole, once a step and process, from torch's default
    generator, in the order of `ProgramSet.draws`, as plain PyTorch draws it. `module` is a graph without placeholders
    and one output."""

    name: str
    module: fx.GraphModule
    spec: TensorSpec


@dataclass(frozen=True)
class Program:
    """The instruction list of one worker for one training step.

    `loss` is the register with the loss, which every lowered program has before its first `Update` (the same value on
    all workers; "" in a program without one). `square` is the register with the square of the norm of all gradients,
    where they are clipped; the same on all workers. `buffers` maps a buffer's name to the register with its new value,
    written back after all workers of the process have finished. `views` says which box of a parameter, as its process
    stores it, the worker's register ``p:NAME`` is, where that is not all of it.
    """

    worker: int
    process: int
    stage: int
    instructions: tuple[Instruction, ...]
    feeds: tuple[Feed, ...]
    loss: str = ""
    buffers: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, Box] = field(default_factory=dict)
    square: str = ""

    @property
    def kept(self) -> set[str]:
        """Registers that are read after the last instruction."""
        return {self.loss, self.square, *self.buffers.values()} - {""}

    @property
    def updates(self) -> tuple[tuple[Slice, ...], ...]:
        """The slices of each of the worker's updates."""
        return tuple(item.slices for item in self.instructions if isinstance(item, Update))


@dataclass(frozen=True)
class ProgramSet:
    """The programs of all workers of the job, with the segments that they share.

    `held` gives, by process, the box of every parameter of which the process stores only a part.
    """

    programs: tuple[Program, ...]
    segments: Mapping[str, Segment]
    draws: tuple[Draw, ...] = ()
    held: Mapping[int, Mapping[str, Box]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

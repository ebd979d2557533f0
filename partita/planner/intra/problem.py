"""`IntraProblem`: how to run one stage on one mesh, as pure data.

Words. A *placement* of a value says where its pieces lie on the mesh; here it is an index into ``Value.placements``
(what it stands for is the caller's). A *choice* is one way of running an op: the placements that it wants and gives,
its time on the slowest worker. A step has two *windows*: the forward ops in order, then the backward ops in order;
right before the first backward op that reads an inner value of a recomputed block, the block's forward ops are run
again.

Decisions (an `Assignment`)

* a choice per op, a choice per input (where a parameter, its gradient and its optimizer state are stored: replicated,
  or sharded over any axis - ZeRO-1, 2 and 3 are such choices),
* recompute or keep, per block,
* the placement in which each value that crosses from the forward to the backward window is saved.

Time of a step, with M microbatches and hidden share h (symbols: ``time_s`` of ops C, of conversions X where they block
and O where they may hide behind compute, ``update_s`` U, ``gather_s`` G, ``reduce_s`` D; F, B are the windows):

    T = U + M (C_F + X_F + C_B + X_B)
          + (M - 1) ( max(0, O_F     - h C_F) + max(0, O_B     - h C_B) )
          +           max(0, O_F + G - h C_F) + max(0, O_B + D - h C_B)

C_B includes what is run again. G and D happen once in a step (updated weights are gathered, summed-up gradients
reduced); O in each microbatch. A value's conversion to one placement is paid once in each window in which it is wanted,
however many consumers want it, always from the copy that the window starts with.

Memory at a point in time is the sum of

* ``fixed_bytes`` of every input's choice (parameter, state, batch): always,
* the copy in which an op gives a value: from the op to the value's last consumer in the window (nothing for an alias,
  such as a view: but what it is an alias of lives in each window as long as it does),
* a converted copy: from the value's first to its last consumer in the window; ``temporary_bytes`` of the conversion at
  its first consumer,
* the saved copy of a value: from after its last forward consumer to its last consumer in the backward window, and as
  long as the step for each further microbatch in flight,
* ``temporary_bytes`` of the op that runs,
* ``returned_bytes`` (a gradient, updated buffer): from after its producer to the end; all the time if M > 1.

A value is *inner* to a block if an op that the block would run again gives it and all forward consumers are in the
block. Inner values of a recomputed block are not saved but given again, in the placement that the op's choice gives.
All other values that the backward window needs, block inputs among them, are saved.

Sources: placements with conversions between them as an integer programme: Alpa (Zheng et al., OSDI'22, section 4);
recomputation by block as a binary decision next to it: Chen et al. 2016, "Training deep nets with sublinear memory
cost", Checkmate (Jain et al., MLSys'20); ZeRO: Rajbhandari et al., SC'20.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from partita.errors import InputError


class Window(enum.Enum):
    """The part of a step in which an op runs."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Conversion:
    """What turning a value from one placement into another takes."""

    time_s: float
    temporary_bytes: int = 0


@dataclass(frozen=True)
class Value:
    """A tensor.

    Attributes:
        placements: what each placement index stands for (for people and for the caller).
        num_bytes: by placement: bytes on the fullest worker.
        conversions: ``(source, target) -> Conversion``; pairs that are missing are impossible. Equal placements need
            none.
        overlappable: whether the conversions may hide behind compute (weights, gradients).
        alias_of: the value whose memory the given copy is part of.
        tie: values with the same tie are saved in the same placement (those inner to blocks that are recomputed alike).
    """

    name: str
    placements: tuple[Hashable, ...]
    num_bytes: tuple[int, ...]
    conversions: Mapping[tuple[int, int], Conversion] = field(default_factory=dict)
    overlappable: bool = False
    alias_of: int | None = None
    tie: Hashable = None


@dataclass(frozen=True)
class Choice:
    """One way of running an op. ``inputs``: placement wanted, None: not read. ``outputs``: placement given."""

    label: Hashable
    time_s: float
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    temporary_bytes: int = 0


@dataclass(frozen=True)
class Op:
    """An op: indices of the values that it reads and gives, and its choices.

    Attributes:
        block: index of the block whose inside it belongs to (forward ops only).
        reruns: whether it is run again if the block is recomputed.
        tie: ops with the same tie choose alike (their choices correspond by index); blocks with tied ops that run
            again are recomputed alike.
    """

    name: str
    window: Window
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    choices: tuple[Choice, ...]
    block: int | None = None
    reruns: bool = False
    tie: Hashable = None


@dataclass(frozen=True)
class InputChoice:
    """One way of storing an input.

    Attributes:
        placement: in which placement the ops find the value.
        returned: in which placement the returned value (the gradient) is wanted; None if there is none.
        fixed_bytes: parameter and optimizer state, or the batch's piece.
        returned_bytes: of the gradient as it is held until the update.
        update_s: the optimizer, once a step.
        gather_s: gathering updated weights, once a step; hides behind the forward window.
        reduce_s: reducing the summed-up gradient, once a step; hides behind the backward window.
    """

    label: Hashable
    placement: int
    returned: int | None = None
    fixed_bytes: int = 0
    returned_bytes: int = 0
    update_s: float = 0.0
    gather_s: float = 0.0
    reduce_s: float = 0.0


@dataclass(frozen=True)
class Input:
    """A parameter, buffer or tensor of the batch: its value, the value that comes back to it, and its choices."""

    name: str
    value: int
    choices: tuple[InputChoice, ...]
    returned: int | None = None
    tie: Hashable = None


@dataclass(frozen=True)
class Assignment:
    """All decisions; see the module's text. ``saved``: value -> placement; not needed where nothing is saved."""

    ops: tuple[int, ...]
    inputs: tuple[int, ...]
    recompute: tuple[bool, ...]
    saved: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class IntraProblem:
    """See the module's text.

    Attributes:
        ops: in order, all forward ones before the backward ones.
        num_blocks: number of blocks that may be recomputed.
        memory_bytes: limit of every worker; None: no limit.
        hidden_share: share of the compute behind which overlappable exchanges can hide, in [0, 1].
        num_microbatches: M, microbatches in a step; all times but the once-a-step ones are those of one microbatch.
        num_in_flight: microbatches whose saved values are held at the same time.

    Raises:
        InputError: the parts do not fit together.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    inputs: tuple[Input, ...]
    num_blocks: int = 0
    memory_bytes: int | None = None
    hidden_share: float = 0.0
    num_microbatches: int = 1
    num_in_flight: int = 1

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_order(self)
        _check_choices(self)
        _check_ties(self)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _check_numbers(problem: IntraProblem) -> None:
    share, count, flight = problem.hidden_share, problem.num_microbatches, problem.num_in_flight
    _demand(0 <= share <= 1, f"0 <= hidden_share <= 1 must hold, but got {share}")
    _demand(count >= 1, f"num_microbatches must be at least 1, but got {count}")
    _demand(1 <= flight <= count, f"1 <= num_in_flight <= num_microbatches must hold, but got {flight} and {count}")
    for value in problem.values:
        fits = len(value.placements) == len(value.num_bytes) > 0
        _demand(fits, f"value {value.name}: every placement needs its bytes, but got {value.num_bytes}")


def _check_order(problem: IntraProblem) -> None:
    """Every value has one source, and is read after it is there."""
    known: set[int] = set()
    for item in problem.inputs:
        _demand(item.value not in known, f"input {item.name}: value {item.value} must have one source, but has two")
        known.add(item.value)
    backward = False
    for op in problem.ops:
        _demand(not backward or op.window is Window.BACKWARD, f"op {op.name} runs forward after backward ones")
        backward = op.window is Window.BACKWARD
        _demand(known.issuperset(op.inputs), f"op {op.name} reads a value before it is there")
        _demand(not known & set(op.outputs), f"op {op.name} gives a value that is there already")
        _demand(len(set(op.outputs)) == len(op.outputs), f"op {op.name} gives one value twice")
        aliases = [problem.values[value].alias_of for value in op.outputs]
        _demand(all(base in (None, *op.inputs) for base in aliases), f"op {op.name}: aliases must be of its inputs")
        known.update(op.outputs)
        inside = op.block is not None and 0 <= op.block < problem.num_blocks and not backward
        _demand(op.block is None or inside, f"op {op.name}: block {op.block} must be one of {problem.num_blocks}")
        _demand(not op.reruns or inside, f"op {op.name}: only forward ops of a block can run again")
    given = {value for op in problem.ops for value in op.outputs}
    for item in problem.inputs:
        _demand(item.returned is None or item.returned in given, f"input {item.name}: an op must give what returns")


def _check_choices(problem: IntraProblem) -> None:
    def is_placement(value: int, placement: int | None) -> bool:
        return placement is None or 0 <= placement < len(problem.values[value].placements)

    for op in problem.ops:
        _demand(bool(op.choices), f"op {op.name} must have a choice")
        for choice in op.choices:
            lengths = len(choice.inputs) == len(op.inputs) and len(choice.outputs) == len(op.outputs)
            _demand(lengths, f"op {op.name}, choice {choice.label}: a placement for every value must be given")
            pairs = [*zip(op.inputs, choice.inputs, strict=True), *zip(op.outputs, choice.outputs, strict=True)]
            _demand(all(is_placement(*pair) for pair in pairs), f"op {op.name}, choice {choice.label}: no placement")
    for item in problem.inputs:
        _demand(bool(item.choices), f"input {item.name} must have a choice")
        for option in item.choices:
            fits = is_placement(item.value, option.placement)
            fits &= (item.returned is None) == (option.returned is None)
            fits &= item.returned is None or is_placement(item.returned, option.returned)
            _demand(fits, f"input {item.name}, choice {option.label}: placements must be those of its values")


def _check_ties(problem: IntraProblem) -> None:
    first: dict[Hashable, Op] = {}
    for op in problem.ops:
        if op.tie is not None:
            other = first.setdefault(op.tie, op)
            alike = len(other.choices) == len(op.choices)
            _demand(alike, f"ops {other.name} and {op.name} are tied, but their numbers of choices differ")
    kinds: dict[Hashable, int] = {}
    for item in problem.inputs:
        if item.tie is not None:
            count = kinds.setdefault(item.tie, len(item.choices))
            _demand(count == len(item.choices), f"input {item.name} is tied to one with {count} choices")
    counts: dict[Hashable, int] = {}
    for value in problem.values:
        if value.tie is not None:
            count = counts.setdefault(value.tie, len(value.placements))
            _demand(count == len(value.placements), f"value {value.name} is tied to one with {count} placements")

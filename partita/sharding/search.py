"""Search of rules: guess how an op's inputs could lie, run the op in parts, and see how the results recombine.

A guess gives every tensor input whole (R), as summand (P) or cut (S). Cut dims hold a common number of blocks, which is
the extent of one of them. For each guess:

1. the op's shape kernel is run on every worker's shapes; a guess that it refuses is nonsense;
2. from the shapes of the parts' results follows which outputs are cut; on random inputs is tried whether those that
   have their whole shape are whole (R) or summands (P);
3. the rule must then hold (`experiment.rule_holds`) over two workers evenly and unevenly and over three, on several
   draws, in double precision, and once more in the call's own types.

Coincidences are excluded: a summand input is also tried with huge and tiny entries (an op may be linear only near 0);
an output counts as whole only if redrawing what was taken apart does not change it while redrawing the rest does, as
summand only if the parts do not all equal the whole; and an op that gives different results for equal inputs, or none
that are finite, has no rules.

Guessed shapes can crash a kernel: run this only in the helper process (`partita.sharding.helper`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._decomp import decomposition_table

from partita.sharding.calls import OpCall, TensorSpec
from partita.sharding.experiment import Draw, draw_tensor, equal, put_together, rule_holds, run_call, run_parts
from partita.sharding.placement import Shard
from partita.sharding.rules import PARTIAL, REPLICATE, Blocks, Cut, InputSpec, OutputSpec, Rule
from partita.sharding.scaling import output_shapes

MIN_BLOCKS = 4  # fewer cannot be dealt out both evenly and unevenly
MAX_GUESSES = 4000
MAX_RULES = 48
SUMMAND_SCALES = (1e5, 1e-3)
_WIDER = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
          torch.complex64: torch.complex128}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """``ran`` is False if the op could not be run at all, so that nothing is known."""

    ran: bool
    rules: tuple[str, ...]


Attempt = Callable[[Callable[[], Rule | None]], Rule | None]


def find_rules(
    call: OpCall, *, begin: Callable[[str], None] = lambda guess: None, attempt: Attempt = lambda run: run()
) -> Found:
    """All rules of ``call``, as text.

    ``begin`` is told of every guess before it runs; ``attempt`` runs what may bring the process down.
    """
    trial = _Trial.of(call)
    if trial is None:
        return Found(False, ())
    rules: dict[str, None] = {}
    linear: set[int] = set()
    for inputs, extent in _guesses(call, linear):
        begin(Rule(inputs, ()).text())
        rule = trial.try_guess(inputs, extent, attempt)
        if rule is None:
            continue
        rules[rule.text()] = None
        if extent == 0:
            linear.update(index for index, spec in enumerate(inputs) if spec == PARTIAL)
        if len(rules) >= MAX_RULES:
            break
    return Found(True, tuple(rules))


def _guesses(call: OpCall, linear: set[int]) -> Iterator[tuple[tuple[InputSpec, ...], int]]:
    """Inputs and extent. First summands alone; ``linear`` grows meanwhile, and only those are summands beside cuts."""
    yield from itertools.islice(itertools.chain(_summand_guesses(call), _cut_guesses(call, linear)), MAX_GUESSES)


def _summand_guesses(call: OpCall) -> Iterator[tuple[tuple[InputSpec, ...], int]]:
    options: list[list[InputSpec]] = [[REPLICATE, *([PARTIAL] if _is_number(spec) else [])] for spec in call.inputs]
    for inputs in itertools.product(*options):
        if PARTIAL in inputs:
            yield inputs, 0


def _cut_guesses(call: OpCall, linear: set[int]) -> Iterator[tuple[tuple[InputSpec, ...], int]]:
    extents = sorted({e for spec in call.inputs for e in spec.shape if e >= MIN_BLOCKS})
    for extent in extents:
        options: list[list[InputSpec]] = []
        for index, spec in enumerate(call.inputs):
            cuts = [Cut(d, e // extent) for d, e in enumerate(spec.shape) if e >= extent and e % extent == 0]
            options.append([*cuts, REPLICATE, *([PARTIAL] if index in linear else [])])
        product = itertools.islice(itertools.product(*options), 50_000)
        guesses = [g for g in product if any(isinstance(s, Cut) for s in g)]
        # Rules that cut much are worth more, and are found first.
        for inputs in sorted(guesses, key=lambda g: (g.count(PARTIAL), g.count(REPLICATE))):
            yield inputs, extent


def _is_number(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point or spec.dtype.is_complex


@dataclass(frozen=True)
class _Trial:
    """An op call with the draws on which it gives finite results, the same every time."""

    call: OpCall
    wide: OpCall  # in double precision where the op has it
    draws: tuple[Draw, ...]

    @classmethod
    def of(cls, call: OpCall) -> _Trial | None:
        runnable = _runnable(call)
        if runnable is None:
            return None
        call, wide = runnable, _widened(runnable)
        for candidate in (wide, call) if wide is not None else (call,):
            draws = tuple(draw for draw in _possible_draws(call) if _runs_well(candidate, draw))
            if draws:
                return cls(call, candidate, draws)
        return None

    def try_guess(self, inputs: tuple[InputSpec, ...], extent: int, attempt: Attempt) -> Rule | None:
        """The rule with these inputs, if there is one."""
        blocks = _ways_to_deal(extent)
        outputs = self._shaped_outputs(inputs, extent, blocks)
        if outputs is None:
            return None
        rule = Rule(inputs, outputs, extent)
        return attempt(lambda: self._tried(rule, blocks))

    def _tried(self, rule: Rule, blocks: Sequence[Blocks]) -> Rule | None:
        """``rule`` with its outputs settled, if it holds."""
        try:
            settled = self._settle(rule, blocks[0])
            return settled if settled is not None and self._holds(settled, blocks) else None
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError):
            return None  # the kernel refuses these parts, so this is no rule

    def _shaped_outputs(
        self, inputs: tuple[InputSpec, ...], extent: int, blocks: Sequence[Blocks]
    ) -> tuple[OutputSpec, ...] | None:
        """Which outputs are cut, by the shape kernel; R stands for every output of whole shape."""
        found: tuple[OutputSpec, ...] | None = None
        for way in blocks:
            placements = Rule(inputs, (), extent).input_placements(way)
            shapes = []
            for worker in range(len(way.counts)):
                local = [_local(s.shape, p, worker) for s, p in zip(self.call.inputs, placements, strict=True)]
                results = output_shapes(self.call, local)
                if results is None or len(results) != len(self.call.outputs):
                    return None
                shapes.append(results)
            outputs = _recombined(self.call, shapes, way, extent)
            if outputs is None or (found is not None and outputs != found):
                return None
            found = outputs
        return found

    def _settle(self, rule: Rule, blocks: Blocks) -> Rule | None:
        """Tell outputs that are whole from those that are summands."""
        generator = torch.Generator().manual_seed(7)
        draw = self.draws[0]
        wholes = [draw_tensor(spec, generator, draw) for spec in self.wide.inputs]
        expected = run_call(self.wide.target, self.wide.args, self.wide.kwargs, tuple(wholes))
        parts = run_parts(self.wide, rule, blocks, wholes, generator, draw)
        outputs: list[OutputSpec] = []
        for index, spec in enumerate(rule.outputs):
            if spec != REPLICATE or expected[index].numel() == 0:
                outputs.append(spec)
                continue
            got = [part[index] for part in parts]
            if all(equal(one, expected[index]) for one in got):
                if not self._is_untouched(rule, index):
                    return None
                outputs.append(REPLICATE)
            elif expected[index].dtype is not torch.bool and equal(put_together(got, PARTIAL)[0], expected[index]):
                outputs.append(PARTIAL)
            else:
                return None
        if not any(spec == PARTIAL or isinstance(spec, Cut) for spec in outputs):
            return None  # nothing is spread: an input was taken apart that the op does not read
        return dataclasses.replace(rule, outputs=tuple(outputs))

    def _is_untouched(self, rule: Rule, index: int) -> bool:
        """Whether output ``index`` depends on inputs that are whole in ``rule``, and on none that is taken apart."""
        changed_by_others = False
        for draw in self.draws:
            generator = torch.Generator().manual_seed(11)
            first = [draw_tensor(spec, generator, draw) for spec in self.wide.inputs]
            second = [draw_tensor(spec, generator, draw) for spec in self.wide.inputs]
            pairs = list(zip(rule.inputs, first, second, strict=True))
            base = self._output(first, index)
            if not equal(self._output([a if spec == REPLICATE else b for spec, a, b in pairs], index), base):
                return False
            others = self._output([b if spec == REPLICATE else a for spec, a, b in pairs], index)
            changed_by_others = changed_by_others or not equal(others, base)
        return changed_by_others

    def _output(self, tensors: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        result: torch.Tensor = run_call(self.wide.target, self.wide.args, self.wide.kwargs, tuple(tensors))[index]
        return result

    def _holds(self, rule: Rule, blocks: Sequence[Blocks]) -> bool:
        draws = list(self.draws)
        if PARTIAL in rule.inputs:
            draws += [dataclasses.replace(self.draws[0], scale=scale) for scale in self._scales()]
        seeds = itertools.count(1)
        return all(
            rule_holds(self.wide, rule, way, seed=next(seeds), draw=draw)
            for draw in (*draws, self.draws[0])
            for way in blocks
        ) and all(rule_holds(self.call, rule, way, seed=next(seeds), draw=self.draws[0]) for way in blocks)

    def _scales(self) -> tuple[float, ...]:
        """Far beyond every number among the arguments: a clamp at 1e6 is linear for all usual entries."""
        numbers: list[float] = []
        for item in (*self.call.args, *self.call.kwargs.values()):
            flat = item if isinstance(item, list) else [item]
            numbers += [abs(float(x)) for x in flat if isinstance(x, (int, float)) and math.isfinite(x)]
        top = max((x for x in numbers if x < 1e30), default=1.0)
        return (max(SUMMAND_SCALES[0], 100 * top), SUMMAND_SCALES[1])


def _runnable(call: OpCall) -> OpCall | None:
    """``call`` as it can run here: some ops have a kernel only on other devices, but a decomposition everywhere."""
    if not isinstance(call.target, torch._ops.OpOverload):
        return call  # a function of tensors, of which nothing else is known
    name = str(call.target._schema.name)
    full = name if call.overload == "default" else f"{name}.{call.overload}"
    keys = ("CPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if any(has_kernel(full, key) for key in keys):
        return call
    function = decomposition_table.get(call.target)
    return None if function is None else dataclasses.replace(call, target=function)


def _widened(call: OpCall) -> OpCall | None:
    inputs = tuple(dataclasses.replace(spec, dtype=_WIDER.get(spec.dtype, spec.dtype)) for spec in call.inputs)
    return None if inputs == call.inputs else dataclasses.replace(call, inputs=inputs)


def _possible_draws(call: OpCall) -> Iterator[Draw]:
    """Every domain of floats with narrow and with wide whole numbers; the first that runs is the main one."""
    has_whole = any(not _is_number(spec) and spec.dtype is not torch.bool for spec in call.inputs)
    widest = min((e for spec in call.inputs for e in spec.shape if e > 1), default=2)
    square = any(len(s.shape) >= 2 and s.shape[-1] == s.shape[-2] and _is_number(s) for s in call.inputs)
    for domain in ("normal", "unit", *(["definite"] if square else [])):
        for num_whole in (widest, 2) if has_whole and widest > 2 else (2,):
            yield Draw(domain, num_whole=num_whole)


def _runs_well(call: OpCall, draw: Draw) -> bool:
    """Whether the whole op runs on this draw, twice alike, without NaN or infinities, and not always the same."""
    try:
        generator = torch.Generator().manual_seed(3)
        tensors = tuple(draw_tensor(spec, generator, draw) for spec in call.inputs)
        other = tuple(draw_tensor(spec, generator, draw) for spec in call.inputs)
        runs = [run_call(call.target, call.args, call.kwargs, given) for given in (tensors, tensors, other)]
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError):
        return False
    varies = False
    for a, b, c in zip(*runs, strict=True):
        if not isinstance(a, torch.Tensor):
            continue
        if a.shape != b.shape or not equal(b, a):
            return False
        if (a.dtype.is_floating_point or a.dtype.is_complex) and not bool(torch.isfinite(a).all()):
            return False
        varies = varies or (a.shape == c.shape and not equal(c, a))
    return varies


def _ways_to_deal(extent: int) -> list[Blocks]:
    """Unevenly and evenly over two workers, and over three."""
    if extent == 0:
        return [Blocks((1, 1)), Blocks((1, 1, 1))]
    half = extent // 2
    return [Blocks((extent - 1, 1)), Blocks((half, extent - half)), Blocks((1, 2, extent - 3))]


def _local(shape: tuple[int, ...], placement: object, worker: int) -> tuple[int, ...]:
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], placement.sizes[worker], *shape[placement.dim + 1 :])


def _recombined(
    call: OpCall, shapes: Sequence[Sequence[tuple[int, ...] | None]], blocks: Blocks, extent: int
) -> tuple[OutputSpec, ...] | None:
    """How outputs with these local shapes lie; None if they make no whole."""
    outputs: list[OutputSpec] = []
    for index, spec in enumerate(call.outputs):
        local = [worker[index] for worker in shapes]
        if spec is None:
            outputs.append(None)
            continue
        if all(shape == spec.shape for shape in local):
            outputs.append(REPLICATE)
            continue
        cut = _cut_of(spec.shape, local, blocks, extent)
        if cut is None:
            return None
        outputs.append(cut)
    return tuple(outputs)


def _cut_of(whole: tuple[int, ...], local: Sequence[tuple[int, ...] | None], blocks: Blocks, extent: int) -> Cut | None:
    for dim, total in enumerate(whole):
        if extent == 0 or total % extent:
            continue
        factor = total // extent
        expected = [(*whole[:dim], count * factor, *whole[dim + 1 :]) for count in blocks.counts]
        if list(local) == expected:
            return Cut(dim, factor)
    return None

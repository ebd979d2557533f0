"""Every rule of every op in a captured sample, on the values that the op meets there.

The graph of a sample, and that of its gradients, is run op by op. Each call is then run by each of its rules, chosen or
not, over 2 and 4 workers, evenly, unevenly both ways and dealt out from two runs; what the parts recombine to must be
what the whole call gave. Summands are drawn at random. What differs in single precision is looked at again in double
precision: rounding is no fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks import op_samples
from benchmarks.op_samples import Sample
from partita.sharding.calls import OpCall, read_graph
from partita.sharding.experiment import recombines, run_call
from partita.sharding.rules import PARTIAL, Blocks, Cut, Rule
from partita.sharding.ruleset import find_rules_of, rules_of

SIZES = (2, 4)
_WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


@dataclasses.dataclass
class Trials:
    """What came of it: ``wrong`` has one text for every rule that does not hold."""

    num_rules: int = 0
    num_runs: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def try_rules(sample: Sample, module: fx.GraphModule, seen: set[Any]) -> Trials:
    """Try the rules of all calls of ``module``, the graph of ``sample``, and of its gradients' graph, that are not in
    ``seen`` (to which they are added)."""
    trials = Trials()
    _try_graph(sample, module, seen, trials)
    gradients = gradients_of(sample)
    if gradients is not None:
        try:
            graph = op_samples.graph_of(gradients)
        except Exception:
            return trials  # no kernel for tensors without values
        _try_graph(gradients, graph, seen, trials)
    return trials


def gradients_of(sample: Sample) -> Sample | None:
    """The gradients of a loss of the sample's outputs; None if nothing can be differentiated."""
    places = [i for i, t in enumerate(sample.tensors) if t.dtype.is_floating_point or t.dtype.is_complex]

    def run(*tensors: Tensor) -> list[Tensor]:
        own = [t.detach().requires_grad_() if index in places else t for index, t in enumerate(tensors)]
        with torch.enable_grad():
            results = [item for item in sample.run(*own) if item.requires_grad]
            loss = torch.stack([(item.abs() if item.is_complex() else item).mul(1.7).pow(2).sum() for item in results])
            found = torch.autograd.grad(loss.sum(), [own[place] for place in places], allow_unused=True)
        return [item for item in found if item is not None]

    try:
        run(*sample.tensors)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return Sample(sample.op, sample.tensors, run)


def _try_graph(sample: Sample, module: fx.GraphModule, seen: set[Any], trials: Trials) -> None:
    program = read_graph(module)
    find_rules_of(op.call for op in program.ops)
    constants: dict[str, Tensor] = module.constants  # type: ignore[assignment]
    values = dict(zip(program.placeholders.values(), [*sample.tensors, *constants.values()], strict=True))
    for op in program.ops:
        tensors = tuple(values[value] for value in op.inputs)
        results = run_call(op.call.target, op.call.args, op.call.kwargs, tensors)
        values.update({v: result for v, result in zip(op.outputs, results, strict=True) if v is not None})
        undefined = op.call.base_name.startswith(("empty", "new_empty"))
        sparse = any(t.layout is not torch.strided for t in (*tensors, *results) if isinstance(t, Tensor))
        if op.call.key in seen or op.call.is_random or undefined or sparse:
            continue
        seen.add(op.call.key)
        for rule in rules_of(op.call):
            trials.num_rules += 1
            if PARTIAL in rule.inputs and not all(_is_finite(tensor) for tensor in tensors):
                continue  # infinity has no summands: inf * (a + b) is inf where inf * a + inf * b is NaN
            for blocks in ways(rule):
                trials.num_runs += 1
                fault = _fault(op.call, rule, blocks, tensors)
                if fault:
                    shapes = [spec.shape for spec in op.call.inputs]
                    trials.wrong.append(f"{op.call.name} {shapes} by {rule.text()} as {blocks.counts}: {fault}"[:300])
                    break


def _is_finite(tensor: Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) or bool(torch.isfinite(tensor).all())


def ways(rule: Rule) -> Iterator[Blocks]:
    """How the blocks of ``rule`` are dealt out."""
    if rule.extent == 0:
        yield from (Blocks((1,) * size) for size in SIZES)
        return
    found: dict[Blocks, None] = {}
    for size in SIZES:
        for counts in op_samples.cuts(rule.extent, size):
            found[Blocks(counts)] = None
            found[Blocks(counts[::-1])] = None
    specs = (*rule.inputs, *rule.outputs)
    if rule.extent % 2 == 0 and rule.extent >= 4 and not any(isinstance(s, Cut) and s.outer > 1 for s in specs):
        found[Blocks((rule.extent - 2, 2), outer=2)] = None
    yield from (blocks for blocks in found if rule.fits(blocks))


def _fault(call: OpCall, rule: Rule, blocks: Blocks, tensors: tuple[Tensor, ...]) -> str:
    try:
        if recombines(call, rule, blocks, tensors, generator=torch.Generator().manual_seed(1)):
            return ""
    except Exception as error:  # kernels refuse parts by every kind of error
        return f"{type(error).__name__}: {error}"
    wide = tuple(tensor.to(_WIDER.get(tensor.dtype, tensor.dtype)) for tensor in tensors)
    try:
        holds = recombines(call, rule, blocks, wide, generator=torch.Generator().manual_seed(1))
    except Exception:
        holds = False
    return "" if holds else "another result"

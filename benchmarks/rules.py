"""Sharding rules held against torch's own samples of every op (`op_db`, float32).

    python -m benchmarks.rules --json benchmarks/results/rules.json --check

Every sample is captured as a graph of ATen ops. For every cut of every input, and for every way in which an experiment
on the op as a whole (a black box that knows nothing of its inside) finds that it can be run in parts, the graph is
sharded over 2 and 4 workers, evenly and unevenly, and run in lockstep on real values:

* a result that differs from the whole op's is **wrong**, and so is a rule of any of its ATen ops, or those of its
  gradients, whose parts do not recombine (`benchmarks.rule_trials`; these runs are ``num_rule_runs``);
* an op **has a rule** if some cut runs without any exchange of inner values;
* it **should have one** if it has, or if the experiment found one.

Experiments and runs happen in child processes: guessed shapes can bring a kernel down.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import op_samples, rule_trials
from benchmarks.common import Report, Row, describe_machine, first_line, option_parser, show
from benchmarks.op_samples import Sample
from benchmarks.processes import Child, ChildError, Message, serve

LEAST_SHARE = 0.9
SIZES = (2, 4)
NUM_SAMPLES = 3
SEARCH_LIMIT_S = 60.0  # for the rules of one op's graph
NUM_SEARCHED = 2  # samples of an op on which the black-box experiment runs
# What these ops return is undefined, or depends on where tensors lie in memory.
UNDEFINED = frozenset({
    "empty", "empty_like", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided", "as_strided",
    "as_strided.partial_views", "as_strided_copy", "as_strided_scatter",
})  # fmt: skip
COLUMNS = (
    "op", "captured", "random", "num_tried", "num_rules", "has_rule", "should_have", "achieved", "wrong", "reason",
)  # fmt: skip
Cuts = dict[str, tuple[int, tuple[int, ...]]]  # placeholder -> dim and sizes


@dataclass
class Verdict:
    """What was found of one op over its samples."""

    captured: bool = False
    random: bool = False
    num_tried: int = 0
    num_rules: int = 0
    num_rule_runs: int = 0
    has_rule: bool = False
    num_found: int = 0  # ways that the experiment found
    num_achieved: int = 0  # of these, the ones that run without an exchange
    wrong: list[str] = field(default_factory=list)
    reason: str = ""


def examine(message: Message) -> Row:
    """All samples of one op, with what the experiment found for each."""
    from partita.sharding.found import rule_book

    rule_book().allow(SEARCH_LIMIT_S)
    verdict = Verdict()
    found: list[list[str]] = message["found"]
    seen: set[Any] = set()
    for index, sample in enumerate(op_samples.samples(message["op"], NUM_SAMPLES)):
        with op_samples.quiet():
            _examine_sample(sample, found[index] if index < len(found) else [], verdict, seen)
    row = {"op": message["op"], **vars(verdict)}
    return {**row, "wrong": verdict.wrong[:5], "num_wrong": len(verdict.wrong)}


def _examine_sample(sample: Sample, found: list[str], verdict: Verdict, seen: set[Any]) -> None:
    from partita.graph.randomness import is_random

    try:
        module = op_samples.graph_of(sample)
    except Exception as error:
        verdict.reason = verdict.reason or f"{type(error).__name__}: {first_line(str(error))}"[:200]
        return
    verdict.captured = True
    trials = rule_trials.try_rules(sample, module, seen)
    verdict.num_rules += trials.num_rules
    verdict.num_rule_runs += trials.num_runs
    verdict.wrong += trials.wrong
    if any(is_random(node) for node in module.graph.nodes):
        verdict.random = True  # another draw in every run: there is nothing to compare
        return
    expected = sample.run(*sample.tensors)
    for cuts in _single_cuts(sample):
        verdict.has_rule |= _try(module, sample, cuts, expected, verdict)
    for text in found:
        ways = list(_cuts_of_rule(text, sample))
        if not ways:
            continue
        verdict.num_found += 1
        achieved = [_try(module, sample, cuts, expected, verdict) for cuts in ways]
        verdict.num_achieved += all(achieved)
        verdict.has_rule |= all(achieved)


def _single_cuts(sample: Sample) -> Iterator[Cuts]:
    for index, tensor in enumerate(sample.tensors):
        for dim, extent in enumerate(tensor.shape):
            for size in SIZES:
                for sizes in op_samples.cuts(extent, size):
                    yield {f"x{index}": (dim, sizes)}


def _cuts_of_rule(text: str, sample: Sample) -> Iterator[Cuts]:
    """The cuts of a found rule over 2 and 4 workers; rules that take summands apart are left out."""
    from partita.sharding.rules import Blocks, Cut, parse_rule

    call = _black_box(sample)
    rule = parse_rule(text, call)
    if rule is None or any(str(spec) == "P" for spec in rule.inputs) or rule.extent == 0:
        return
    for size in SIZES:
        for counts in op_samples.cuts(rule.extent, size):
            placements = rule.input_placements(Blocks(counts))
            yield {
                f"x{index}": (placement.dim, placement.sizes)  # type: ignore[union-attr]
                for index, (spec, placement) in enumerate(zip(rule.inputs, placements, strict=True))
                if isinstance(spec, Cut)
            }


def _try(module: Any, sample: Sample, cuts: Cuts, expected: list[Any], verdict: Verdict) -> bool:
    """Run the sample in these parts and compare; whether no inner value had to be exchanged."""
    from partita.sharding.experiment import equal
    from partita.sharding.lockstep import run_sharded
    from partita.sharding.placement import Shard
    from partita.sharding.shard import shard

    size = len(next(iter(cuts.values()))[1])
    seeds = {name: Shard(dim, sizes) for name, (dim, sizes) in cuts.items()}
    text = f"{sample.shape_text}, " + ", ".join(f"{name} dim {dim} as {sizes}" for name, (dim, sizes) in cuts.items())
    verdict.num_tried += 1
    try:
        sharded = shard(module, seeds, axis="data", size=size)
        inputs = {f"x{index}": tensor for index, tensor in enumerate(sample.tensors)} | module.constants
        results = [item for item in run_sharded(sharded, inputs) if hasattr(item, "shape")]
    except Exception as error:
        verdict.wrong.append(f"{text}: {type(error).__name__}: {first_line(str(error))}"[:300])
        return False
    same = len(results) == len(expected) and all(
        equal(got, whole, precise=False) for got, whole in zip(results, expected, strict=True)
    )
    if not same:
        verdict.wrong.append(f"{text}: another result")
        return False
    return not sharded.exchanges and not sharded.gathered


def _black_box(sample: Sample) -> Any:
    from partita.sharding.calls import OpCall, Slot, TensorSpec

    outputs = sample.run(*sample.tensors)
    return OpCall(
        target=sample.run,
        args=tuple(Slot(index) for index in range(len(sample.tensors))),
        kwargs={},
        inputs=tuple(TensorSpec.of(tensor) for tensor in sample.tensors),
        outputs=tuple(TensorSpec.of(tensor) for tensor in outputs),
        returns_tuple=True,
    )


def search(message: Message) -> Row:
    """What the experiment finds of an op as a whole, for each of its first samples."""
    from partita.sharding.search import find_rules

    found: list[list[str]] = []
    for sample in op_samples.samples(message["op"], NUM_SEARCHED):
        with op_samples.quiet():
            try:
                rules = find_rules(_black_box(sample)).rules
            except Exception:
                rules = ()
        found.append([text for text in rules if "S" in text.split("->")[0]])
    return {"found": found}


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    judged = [row for row in rows if row["num_tried"] or row["num_rules"]]
    should = [row for row in judged if row["should_have"]]
    having = [row for row in should if row["has_rule"]]
    wrong = [row for row in judged if row["num_wrong"]]
    summary = {
        "num_ops": len(rows),
        "num_captured": sum(bool(row["captured"]) for row in rows),
        "num_random": sum(bool(row["random"]) for row in rows),
        "num_should_have": len(should),
        "num_having": len(having),
        "share": len(having) / len(should) if should else 0.0,
        "num_found_ways": sum(row["num_found"] for row in judged),
        "num_achieved_ways": sum(row["num_achieved"] for row in judged),
        "num_runs": sum(row["num_tried"] for row in judged),
        "num_rules": sum(row["num_rules"] for row in judged),
        "num_rule_runs": sum(row["num_rule_runs"] for row in judged),
        "num_wrong_ops": len(wrong),
    }
    misses = [f"{row['op']}: {row['wrong'][0]}" for row in wrong]
    if summary["share"] < LEAST_SHARE:
        misses.append(f"{LEAST_SHARE:.0%} of the ops must have their rule, but {summary['share']:.1%} have")
    return summary, misses


class Children:
    """One child for each of the two jobs, started again after a crash."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._children: dict[str, Child] = {}

    def ask(self, role: str, message: Message) -> Message:
        child = self._children.get(role) or Child("benchmarks.rules", role)
        self._children[role] = child
        try:
            return child.ask(message, self.timeout_s)
        except ChildError as error:
            self._children.pop(role).close(grace_s=0.1)
            return {"error": str(error)}

    def close(self) -> None:
        for child in self._children.values():
            child.close()


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--ops", metavar="A,B", help="only these ops (names of op_db)")
    parser.add_argument("--every", type=int, default=1, help="only every n-th op")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one op")
    options = parser.parse_args()
    if options.child:
        serve(search if options.child == "search" else examine)
        return 0
    names = options.ops.split(",") if options.ops else op_samples.op_names()[:: options.every]
    settings = {"num_samples": NUM_SAMPLES, "sizes": SIZES, "num_searched": NUM_SEARCHED}
    report = Report("rules", settings, path=options.json, machine=describe_machine())
    children = Children(options.timeout)
    for name in names:
        if name in UNDEFINED:
            continue
        report.add(_row(children, name))
        row = report.rows[-1]
        print(f"{name}: rule {row['has_rule']} of {row['should_have']}, wrong {row['num_wrong']}", file=sys.stderr)
    children.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


def _row(children: Children, name: str) -> Row:
    searched = children.ask("search", {"op": name})
    found = searched.get("found", [])
    row = children.ask("examine", {"op": name, "found": found})
    if "error" in row:
        reason = first_line(row["error"])
        row = {"op": name, **vars(Verdict(reason=reason)), "num_wrong": 0}
    row["should_have"] = bool(row["has_rule"] or row["num_found"])
    row["achieved"] = f"{row['num_achieved']} of {row['num_found']}"
    if "error" in searched:
        row["search_error"] = first_line(searched["error"])
    return row


if __name__ == "__main__":
    sys.exit(main())

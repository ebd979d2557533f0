"""Promise 1: every family under forced plans gives the losses and weights of plain single-process PyTorch.

    python -m benchmarks.same_result --json benchmarks/results/same_result.json --check

One child walks through the plans of one process, a pair of children through those of two. Losses are compared step
by step, weights after the last one: the largest difference within a tensor over its largest weight. A tensor whose
true gradient is zero (the bias of attention keys) holds nothing but rounding, so it is measured against at least
WEIGHT_FLOOR, about as far as AdamW can move a weight in the run. For the same reason AdamW runs with `eps`
ADAM_EPS: with the default of 1e-8 it scales rounding up to full steps, and two runs of plain PyTorch with the rows
of the batch in another order differ.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks import families
from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.coverage import largest_difference
from benchmarks.families import Family, Task
from benchmarks.processes import Child, ChildError, Group, Message, serve
from partita.errors import CaptureError, InfeasibleError
from partita.graph import capture
from partita.graph.graph import Graph, InputKind, Phase

NUM_STEPS = 10
LOSS_LIMIT, WEIGHT_LIMIT = 1e-4, 1e-3
LEAST_PLANS = 6  # of a family and optimizer must be the same (where as many are tried)
ADAM_EPS, WEIGHT_FLOOR = 1e-5, 1e-2
OPTIMIZERS = ("SGD", "AdamW")
COLUMNS = ("family", "case", "optimizer", "verdict", "loss_difference", "weight_difference", "worst_tensor", "plan")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A forced plan. `crosses` demands that stages lie in different processes; `cut` says which inputs of the step are
    cut over the tensor axis (see `cut_inputs`; "" leaves that to the planner)."""

    name: str
    num_processes: int
    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    cut: str = ""
    fully_sharded: bool = False
    num_microbatches: int = 1
    crosses: bool = False

    def constraints(self, compiled: bool, middle: str, graph: Graph | None) -> partita.Constraints:
        return partita.Constraints(
            data=self.data,
            pipeline=self.pipeline,
            tensor=self.tensor,
            num_workers=self.data * self.pipeline * self.tensor,
            inputs=cut_inputs(graph, self.cut, self.tensor) if self.cut and graph is not None else None,
            fully_sharded=self.fully_sharded,
            num_microbatches=self.num_microbatches,
            threads_per_worker=1,
            compiled=compiled,
            stage_starts=(middle,) if self.pipeline == 2 and middle else None,
        )


CASES: tuple[Case, ...] = (
    Case(name="1 worker", num_processes=1, data=1, pipeline=1),
    Case(name="data 2", num_processes=1, data=2, pipeline=1),
    Case(name="pipeline 2", num_processes=1, data=1, pipeline=2),
    Case(name="pipeline 2, 4 microbatches", num_processes=1, data=1, pipeline=2, num_microbatches=4),
    Case(name="data 3, uneven rows", num_processes=1, data=3, pipeline=1),
    Case(name="data 2 x pipeline 2", num_processes=1, data=2, pipeline=2),
    Case(name="2 processes, data 2", num_processes=2, data=2, pipeline=1),
    Case(name="2 processes x 2 workers", num_processes=2, data=2, pipeline=2, crosses=True),
    Case(name="tensor 2", num_processes=1, tensor=2),
    Case(name="tensor 2, rows of weights", num_processes=1, tensor=2, cut="rows"),
    Case(name="tensor 2, columns of weights", num_processes=1, tensor=2, cut="columns"),
    Case(name="tensor 2, sequence", num_processes=1, tensor=2, cut="sequence"),
    Case(name="tensor 4, experts or rows", num_processes=1, tensor=4, cut="experts"),
    Case(name="data 2, fully sharded", num_processes=1, data=2, fully_sharded=True),
    Case(name="data 2 x tensor 2, fully sharded", num_processes=1, data=2, tensor=2, cut="rows", fully_sharded=True),
    Case(name="tensor 2 x pipeline 2", num_processes=1, pipeline=2, tensor=2, cut="columns"),
    Case(name="2 processes, tensor 2", num_processes=2, tensor=2, cut="rows"),
    Case(name="2 processes, fully sharded", num_processes=2, data=2, fully_sharded=True),
    Case(name="2 processes x 2 workers, data 2 x tensor 2", num_processes=2, data=2, tensor=2, cut="columns"),
    Case(name="2 processes x 2 workers, tensor 2 x pipeline 2", num_processes=2, pipeline=2, tensor=2, cut="rows",
         crosses=True),
)  # fmt: skip


def cut_inputs(graph: Graph, cut: str, size: int) -> dict[str, dict[str, str]]:
    """Which inputs are cut over the tensor axis: "rows" (dim 0 of every parameter), "columns" (dim 1 of every one that
    has it), "sequence" (dim 1 of the batch) or "experts" (dim 0 of weights of rank 3 and of those named after experts;
    rows where there are none). Wise or not, the result must be the same."""
    parameters, leaves = graph.inputs_of(InputKind.PARAMETER), graph.inputs_of(InputKind.BATCH)
    experts = [item for item in parameters if "expert" in item.name and len(item.shape) >= 2]
    chosen, dim = {
        "rows": (parameters, 0),
        "columns": (parameters, 1),
        "sequence": (leaves, 1),
        "experts": (experts or parameters, 0),
    }[cut]
    return {
        fnmatch_name(item.name): {"tensor": f"S({dim})"}
        for item in chosen
        if len(item.shape) > dim and item.shape[dim] >= size
    }


def fnmatch_name(name: str) -> str:
    """A pattern that fits this name only."""
    return name.replace("[", "[[]")


@dataclass(frozen=True)
class Course:
    """What a training run leaves: losses by step, parameters and buffers by name."""

    losses: list[float]
    state: Mapping[str, Any]


def optimizer_for(name: str, task: Task) -> Any:
    return families.make_optimizer(name, task, **({"eps": ADAM_EPS} if name == "AdamW" else {}))


class Examiner:
    """A child's work: keeps the plain course of the family at hand, since the cases of a family come in turn."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._plain: Course | None = None
        self._graphs: dict[str, Graph | None] = {}

    def __call__(self, message: Message) -> Row:
        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        family, optimizer_name = families.get(message["family"]), message["optimizer"]
        case = next(case for case in CASES if case.name == message["case"])
        if self._key != (family.name, optimizer_name):
            self._plain, self._key = plain_course(family, optimizer_name), (family.name, optimizer_name)
        assert self._plain is not None
        graph = self._graph(family)
        middle = middle_of(graph) if case.pipeline > 1 and graph is not None else ""
        try:
            course, plan = partita_course(family, optimizer_name, case.constraints(message["compiled"], middle, graph))
        except InfeasibleError as error:
            if case.num_microbatches > 1 and "must give the same result as the whole batch" in str(error):
                return {"verdict": "refused", "reason": first_line(error)}
            raise
        return judge(case, plan, self._plain, course)

    def _graph(self, family: Family) -> Graph | None:
        """The captured step; None if it cannot be captured, which the plan will then refuse."""
        if family.name not in self._graphs:
            task = family.task()
            try:
                self._graphs = {family.name: capture(task.model, task.loss_fn, task.batches(0))}
            except CaptureError:
                self._graphs = {family.name: None}
        return self._graphs[family.name]


def middle_of(graph: Graph) -> str:
    """The forward op in the middle of the graph.

    Left alone, the planner gives one stage nearly all ops: without microbatches, stages only wait.
    """
    forward = [node.name for node, info in graph.ops() if info.phase is Phase.FORWARD]
    return forward[len(forward) // 2]


def plain_course(family: Family, optimizer_name: str) -> Course:
    import torch

    task = family.task()
    optimizer = optimizer_for(optimizer_name, task)
    losses = []
    for index in range(NUM_STEPS):
        torch.manual_seed(index)
        optimizer.zero_grad()
        loss = task.loss_fn(task.model, task.batches(index))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return Course(losses, {name: value.detach().clone() for name, value in task.model.state_dict().items()})


def partita_course(
    family: Family, optimizer_name: str, constraints: partita.Constraints
) -> tuple[Course, partita.Plan]:
    import torch

    task = family.task()
    optimizer = optimizer_for(optimizer_name, task)
    losses = []
    with partita.parallelize(task.model, optimizer, task.loss_fn, task.batches(0), plan=constraints) as step:
        for index in range(NUM_STEPS):
            torch.manual_seed(index)
            losses.append(float(step(task.batches(index)).loss))
        step.sync_to(task.model)
        plan = step.plan
    return Course(losses, {name: value.detach().clone() for name, value in task.model.state_dict().items()}), plan


def judge(case: Case, plan: partita.Plan, plain: Course, course: Course) -> Row:
    """The row of one run; its verdict is "same", "different", or says which other plan ran."""
    loss_difference = largest_difference(course.losses, plain.losses)
    weight_difference, worst = largest_weight_difference(course.state, plain.state)
    crossing = {(worker.stage, worker.process) for worker in plan.workers}
    row: Row = {
        "loss_difference": loss_difference,
        "weight_difference": weight_difference,
        "worst_tensor": worst,
        "plan": f"{plan.mode} {plan.axes} x{plan.num_microbatches}",
        "losses": course.losses,
        "reason": "; ".join(plan.reasons),
    }
    if not (loss_difference <= LOSS_LIMIT and weight_difference <= WEIGHT_LIMIT):
        return {**row, "verdict": "different"}
    if plan.mode == "block":
        captured = not any("could not be captured" in reason for reason in plan.reasons)
        return {**row, "verdict": "block" if captured else "fallback"}
    extents = tuple(plan.axes.get(axis, 1) for axis in ("data", "pipeline", "tensor"))
    if extents != (case.data, case.pipeline, case.tensor):
        return {**row, "verdict": "another plan"}
    if case.crosses and any((1 - stage, process) in crossing for stage, process in crossing):
        return {**row, "verdict": "another plan", "reason": "the stages do not lie in different processes"}
    if plan.num_microbatches != case.num_microbatches:
        return {**row, "verdict": "another plan"}
    return {**row, "verdict": "same"}


def largest_weight_difference(state: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, str]:
    """The largest difference of a tensor relative to its largest weight, and that tensor's name."""
    worst, worst_name = 0.0, ""
    for name, expected in plain.items():
        value, expected = state[name].double(), expected.double()
        if expected.numel() == 0:
            continue
        difference = float((value - expected).abs().max() / expected.abs().max().clamp(min=WEIGHT_FLOOR))
        if not difference <= worst:  # also where it is not a number
            worst, worst_name = difference, name
    return worst, worst_name


# "refused": samples are coupled, so that microbatches would change the result, and the planner says by which op.
# "fallback": the step cannot be captured, so it ran as one block and gave the same result.
PASSING = ("same", "refused", "fallback")


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    """Verdicts counted, the largest differences, and one miss for each run that is not the same."""
    compared = [row for row in rows if "loss_difference" in row]
    summary = {
        "num_runs": len(rows),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "largest_loss_difference": max((row["loss_difference"] for row in compared), default=0.0),
        "largest_weight_difference": max((row["weight_difference"] for row in compared), default=0.0),
    }
    misses = [
        f"{row['family']}, {row['case']}, {row['optimizer']}: {row['verdict']} {row.get('reason', '')}".strip()
        for row in rows
        if row["verdict"] not in PASSING
    ]
    tried: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        tried[row["family"], row["optimizer"]].append(row["verdict"])
    misses += [
        f"{family}, {optimizer}: at least {LEAST_PLANS} forced plans must be the same, but "
        f"{verdicts.count('same')} are ({len(verdicts)} were tried)"
        for (family, optimizer), verdicts in tried.items()
        if len(verdicts) >= LEAST_PLANS and verdicts.count("same") < LEAST_PLANS and "fallback" not in verdicts
    ]
    return summary, misses


class Children:
    """The single child and the pair, started when first needed and again after one is lost."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._groups: dict[int, Child | Group] = {}

    def ask(self, message: Message, num_processes: int) -> Row:
        group = self._groups.get(num_processes)
        if group is None:
            group = self._start(num_processes)
        try:
            replies = group.ask(message, self.timeout_s)
        except ChildError as error:
            self._groups.pop(num_processes).close()
            return {"verdict": "error", "reason": str(error)}
        if isinstance(replies, dict):
            replies = [replies]
        failed = next((reply for reply in replies if "error" in reply), None)
        if failed is not None:
            # A failed step may leave the job's connections out of step: the next case starts on fresh processes.
            if num_processes > 1:
                self._groups.pop(num_processes).close()
            return {"verdict": "error", "reason": f"{failed['error_type']}: {first_line(failed['error'])}", **failed}
        if any(reply.get("losses") != replies[0].get("losses") for reply in replies):
            return {**replies[0], "verdict": "different", "reason": "the processes report different losses"}
        return max(replies, key=lambda reply: float(reply.get("weight_difference", 0.0)))

    def _start(self, num_processes: int) -> Child | Group:
        module = "benchmarks.same_result"
        started = Child(module, "one") if num_processes == 1 else Group(module, "job", num_processes=num_processes)
        self._groups[num_processes] = started
        return started

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--cases", metavar="A;B", help="only these cases: " + "; ".join(case.name for case in CASES))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), metavar="A,B")
    parser.add_argument("--compiled", action="store_true", help="compile the segments (slow: minutes a family)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one run")
    options = parser.parse_args()
    if options.child:
        serve(Examiner())
        return 0
    wanted = [name.strip() for name in options.cases.split(";")] if options.cases else [case.name for case in CASES]
    cases = [case for case in CASES if case.name in wanted]
    if len(cases) != len(wanted):
        parser.error(f"--cases must name some of {[case.name for case in CASES]}, but got {wanted}")
    settings = {
        "num_steps": NUM_STEPS, "loss_limit": LOSS_LIMIT, "weight_limit": WEIGHT_LIMIT, "weight_floor": WEIGHT_FLOOR,
        "adam_eps": ADAM_EPS, "compiled": options.compiled, "scale": "tiny", "threads_per_worker": 1,
    }  # fmt: skip
    report = Report("same_result", settings, path=options.json)
    children = Children(options.timeout)
    try:
        for family in families.select(options.families):
            for optimizer_name in options.optimizers.split(","):
                for case in cases:
                    key = {"family": family.name, "case": case.name, "optimizer": optimizer_name}
                    row = children.ask({**key, "compiled": options.compiled}, case.num_processes)
                    report.add({**key, **row})
                    reason = "" if row["verdict"] == "same" else first_line(row.get("reason", ""))
                    text = f"{family.name}, {case.name}, {optimizer_name}: {row['verdict']} {reason}"
                    print(text, file=sys.stderr, flush=True)
    finally:
        children.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

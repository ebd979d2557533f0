"""Block-sparse linear layers against dense ones: one layer on one core, and training a whole model.

    python -m benchmarks.blocks --json blocks.json --check

* ``op by op``: forward and backward pass of `BlockLinear` under autograd, as plain PyTorch runs it, against
  `torch.nn.Linear`, and against one whose weight is multiplied by a mask in each pass.
* ``compiled``: the three as `partita.parallelize` compiles them.
* ``training``: steps of `partita.parallelize` (three layers of 2048, batch 256, SGD with momentum) on one worker and on
  two, with blocks against dense.
* ``training with RigL``: the same dense model with `partita.connections.RigL`, by blocks and with masked weights,
  against dense; the mean step where connections change every `RigL.every` steps, what a change takes included.

All that is compared runs in turns in one process, so that a busy machine slows all alike. Times are medians; the ratios
are medians of the ratios of the turns.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import partita
from benchmarks.common import Report, Row, option_parser, show
from partita import Constraints

# partita is imported before torch, which then lets waiting threads sleep
import torch  # isort: skip
from torch import nn  # isort: skip

from partita.connections import RigL  # isort: skip
from partita.cost.measure_ops import on_pinned_threads  # isort: skip
from partita.search.blocks import BlockLinear, measure_forms  # isort: skip

BLOCK, BATCH, WIDTH, NUM_CLASSES = (64, 64), 256, 2048, 10
LEAST = {0.8: 2.4, 0.9: 3.2}  # times as fast as dense, by sparsity
LEAST_TRAINING = 1.8
LAYER_TURNS, STEP_TURNS = 11, 15
CHANGE_EVERY, NUM_CHANGES = 8, 4  # steps, of those that are timed; the first change is not
COLUMNS = ("what", "size", "sparsity", "dense_ms", "masked_ms", "blocks_ms", "change_ms", "against_dense",
           "against_masked")  # fmt: skip
Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> int:
    options = option_parser(__doc__ or "").parse_args()
    settings = {"block": BLOCK, "batch": BATCH, "width": WIDTH, "limits": LEAST, "training_limit": LEAST_TRAINING}
    report = Report("blocks", settings, options.json)
    core = (min(os.sched_getaffinity(0)),) if hasattr(os, "sched_getaffinity") else ()
    for size in (1024, 2048):
        for sparsity in LEAST:
            on_pinned_threads([core], [lambda size=size, sparsity=sparsity: report.add(op_by_op(size, sparsity))])
            report.add(compiled(size, sparsity))
    for num_workers in (1, 2):
        report.add(training(num_workers))
        report.add(learning(num_workers))
    misses = [miss for row in report.rows for miss in missed(row)]
    report.finish({"least_against_dense": min(row["against_dense"] for row in report.rows)}, misses)
    show(report, COLUMNS)
    return report.exit_code(options.check)


def missed(row: Row) -> list[str]:
    least = LEAST_TRAINING if row["what"].startswith("training") else LEAST[row["sparsity"]]
    if row["against_dense"] >= least:
        return []
    return [
        f"{row['what']}, size {row['size']}, sparsity {row['sparsity']}: {row['against_dense']:.2f} times as fast as "
        f"dense, at least {least} are wanted"
    ]


def num_inputs_at(size: int, sparsity: float) -> int:
    """Input blocks of each output block."""
    return max(1, round((1 - sparsity) * size / BLOCK[1]))


def in_turns(calls: Sequence[Callable[[], object]], num_turns: int) -> list[list[float]]:
    """Seconds of each call, by turn, after two turns to warm up."""
    times_s = []
    for _ in range(num_turns + 2):
        turn_s = []
        for call in calls:
            start_s = time.perf_counter()
            call()
            turn_s.append(time.perf_counter() - start_s)
        times_s.append(turn_s)
    return times_s[2:]


def row_of(what: str, size: int, sparsity: float, times_s: Sequence[Sequence[float]]) -> Row:
    """`times_s`, by turn: dense, blocks, and masked if it was measured."""
    medians_ms = [statistics.median(column) * 1e3 for column in zip(*times_s, strict=True)]
    ratios = [statistics.median(turn[i] / turn[1] for turn in times_s) for i in range(len(medians_ms))]
    row = {"what": what, "size": size, "sparsity": sparsity, "dense_ms": medians_ms[0], "blocks_ms": medians_ms[1],
           "against_dense": ratios[0]}  # fmt: skip
    return row | ({"masked_ms": medians_ms[2], "against_masked": ratios[2]} if len(ratios) > 2 else {})


# One layer -----------------------------------------------------------------------------------------------------------


def op_by_op(size: int, sparsity: float) -> Row:
    """In this thread, which is pinned to one core."""
    torch.manual_seed(0)
    dense = nn.Linear(size, size)
    blocks = BlockLinear(size, size, BLOCK, num_inputs=num_inputs_at(size, sparsity))
    mask = blocks.mask.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1).float()
    x, gradient = torch.randn(BATCH, size, requires_grad=True), torch.randn(BATCH, size)

    def both_passes(forward: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module) -> Callable[[], object]:
        def call() -> None:
            with torch.enable_grad():
                torch.autograd.grad(forward(x), [x, *layer.parameters()], gradient)

        return call

    calls = [
        both_passes(dense, dense),
        both_passes(blocks, blocks),
        both_passes(lambda x: nn.functional.linear(x, dense.weight * mask, dense.bias), dense),
    ]
    return row_of("op by op", size, sparsity, in_turns(calls, LAYER_TURNS))


def compiled(size: int, sparsity: float) -> Row:
    num_inputs = num_inputs_at(size, sparsity)
    times_s = []
    for _ in range(3):
        forms = measure_forms(
            BATCH, size, size, BLOCK, num_inputs, needs_input_gradient=True, compiled=True, num_threads=1
        )
        times_s.append((forms.dense_s, forms.blocks_s, forms.masked_s))
    return row_of("compiled", size, sparsity, times_s)


# Training ------------------------------------------------------------------------------------------------------------


def model_of(sparsity: float | None) -> nn.Module:
    """Three layers of `WIDTH` and a dense head; dense if there is no sparsity."""

    def layer() -> nn.Module:
        if sparsity is None:
            return nn.Linear(WIDTH, WIDTH)
        return BlockLinear(WIDTH, WIDTH, BLOCK, num_inputs=num_inputs_at(WIDTH, sparsity))

    torch.manual_seed(0)
    hidden = [module for _ in range(3) for module in (layer(), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, NUM_CLASSES))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def training(num_workers: int) -> Row:
    times_s = steps_in_turns([(model_of(None), None), (model_of(0.9), None)], num_workers, STEP_TURNS)
    return row_of(f"training, {workers(num_workers)}", WIDTH, 0.9, times_s)


def learning(num_workers: int) -> Row:
    def method(form: Literal["blocks", "masked"]) -> RigL:
        return RigL(density=0.1, distribution="uniform", block=BLOCK, form=form, dense=("6.*",), until=10**6,
                    every=CHANGE_EVERY)  # fmt: skip

    cases = [(model_of(None), connections) for connections in (None, method("blocks"), method("masked"))]
    times_s = steps_in_turns(cases, num_workers, CHANGE_EVERY * (1 + NUM_CHANGES))
    usual, changes_s = apart(times_s)
    means_s = [[time_s + change_s / RigL.every for time_s, change_s in zip(turn, changes_s, strict=True)]
               for turn in usual]  # fmt: skip
    return {
        **row_of(f"training with RigL, {workers(num_workers)}", WIDTH, 0.9, means_s),
        "change_ms": changes_s[1] * 1e3,
    }


def apart(times_s: Sequence[Sequence[float]]) -> tuple[list[Sequence[float]], list[float]]:
    """Of turns from step 3 on those without a change, and by column what a change takes beside its step: in that step,
    and in the next one, to which weights are handed over."""
    numbered = dict(enumerate(times_s, start=3))
    usual = [turn for number, turn in numbered.items() if number % CHANGE_EVERY > 1]
    medians_s = [statistics.median(column) for column in zip(*usual, strict=True)]
    due = [
        number for number in numbered if number % CHANGE_EVERY == 0 and number > CHANGE_EVERY and number + 1 in numbered
    ]
    return usual, [
        statistics.median(numbered[number][column] + numbered[number + 1][column] for number in due) - 2 * median_s
        for column, median_s in enumerate(medians_s)
    ]


def workers(num_workers: int) -> str:
    return f"{num_workers} worker{'s' if num_workers > 1 else ''}"


def steps_in_turns(
    cases: Sequence[tuple[nn.Module, RigL | None]], num_workers: int, num_turns: int
) -> list[list[float]]:
    """Seconds of steps of models with their connections, by turn."""
    batch = torch.randn(BATCH, WIDTH), torch.randint(0, NUM_CLASSES, (BATCH,))
    constraints = Constraints(data=num_workers, pipeline=1, tensor=1, threads_per_worker=1)
    with contextlib.ExitStack() as stack:
        steps = []
        for model, connections in cases:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            step = partita.parallelize(model, optimizer, loss_of, batch, plan=constraints, connections=connections)
            steps.append(stack.enter_context(step))
        return in_turns([lambda step=step: step(batch) for step in steps], num_turns)


if __name__ == "__main__":
    sys.exit(main())

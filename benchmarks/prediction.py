"""How well the cost model and the simulator foresee step time and peak memory.

    python -m benchmarks.prediction --json benchmarks/results/prediction.json --check

Every (family, plan) pair is run by `partita.parallelize` with that plan forced. Step time: the median of real steps
after warm-up, in a child that keeps running. Peak memory: in a fresh child whose allocator returns freed blocks to
the system at once; live tensors between steps are counted exactly (of the batches only the first one: how many the
user has at hand is no matter of the plan), what a step adds on top is the growth of the resident set. Order: of two
plans of one family whose measured times differ by more than 10 %, does the prediction prefer the faster?
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks import families
from benchmarks.common import Report, Row, first_line, median, option_parser, show
from benchmarks.processes import Child, ChildError, Message, serve

LEAST_PAIRS, LARGEST_MEDIAN_ERROR, LEAST_ORDERED_SHARE, DISTINCT = 30, 0.10, 0.90, 0.10
FAMILIES = "gpt2,bert,vit,convnext,resnet,lstm,unet,masked_tokens,conv1d,contrastive"
COLUMNS = (
    "family", "plan", "predicted_time_s", "measured_time_s", "time_error", "predicted_memory_bytes",
    "measured_memory_bytes", "memory_error", "error",
)  # fmt: skip

NUM_STEPS = 5  # of which the largest peak counts

# The allocator gives freed blocks of this size and more back at once, so that the resident set follows the live
# tensors. (Every such block takes whole pages of 4 KiB: a much smaller size would count more of them than tensors.)
RETURNED_BYTES = 16 * 1024
RETURNING_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(RETURNED_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(RETURNED_BYTES),
    "MALLOC_ARENA_MAX": "1",
}

PLANS: Mapping[str, dict[str, Any]] = {
    "1 worker": {"data": 1, "pipeline": 1, "num_microbatches": 1},
    "data 2": {"data": 2, "pipeline": 1, "num_microbatches": 1},
    "pipeline 2": {"data": 1, "pipeline": 2, "num_microbatches": 1},
    "pipeline 2, 4 microbatches": {"data": 1, "pipeline": 2, "num_microbatches": 4},
    "tensor 2": {"data": 1, "pipeline": 1, "tensor": 2, "num_microbatches": 1},
}


def constraints_of(message: Message) -> partita.Constraints:
    extents = PLANS[message["plan"]]
    num_workers = extents["data"] * extents["pipeline"] * extents.get("tensor", 1)
    return partita.Constraints(
        **extents, num_workers=num_workers, threads_per_worker=1, compiled=bool(message["compiled"])
    )


def run_pair(message: Message) -> Row:
    """Run one (family, plan) pair; measures what `message["measure"]` says: "time" or "memory"."""
    warnings.simplefilter("ignore")
    task = families.get(message["family"]).task("small")
    batches = [task.batches(seed) for seed in range(4)]
    optimizer = families.make_optimizer("AdamW", task)
    plan = constraints_of(message)
    with partita.parallelize(task.model, optimizer, task.loss_fn, batches[0], plan=plan) as step:
        stream = itertools.cycle(batches)
        for _ in range(3):
            step(next(stream))
        prediction = step.plan.prediction
        if prediction is None:
            raise RuntimeError(f"the plan must carry a prediction, but {step.plan.mode} {step.plan.axes} has none")
        row: Row = {"mode": step.plan.mode, "axes": step.plan.axes, "num_microbatches": step.plan.num_microbatches}
        if message["measure"] == "time":
            times_s = measured_times_s(step, stream, message["seconds"])
            measured = {"measured_time_s": median(times_s), "fastest_time_s": min(times_s), "num_steps": len(times_s)}
            row |= {**measured, "predicted_time_s": prediction.step_time_s, "uncertainty": prediction.uncertainty}
        else:
            row["predicted_memory_bytes"] = max(prediction.memory_bytes.values(), default=0)
            row |= measured_memory(step, stream, batches)
    return row


def measured_times_s(step: Any, stream: Any, seconds: float) -> list[float]:
    """Times of single steps: at least 10, then until `seconds` have passed."""
    times_s: list[float] = []
    while len(times_s) < 10 or sum(times_s) < seconds:
        batch = next(stream)
        start_s = time.perf_counter()
        step(batch)
        times_s.append(time.perf_counter() - start_s)
    return times_s


def measured_memory(step: Any, stream: Any, batches: list[Any]) -> Row:
    """Bytes of live tensors between steps, and how much the resident set grows during a step: the most of some steps,
    since the peaks of two workers need not meet in every one."""
    growth = []
    for _ in range(NUM_STEPS):
        gc.collect()
        _fill_holes()
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present
        step(next(stream))
        growth.append(max(0, _status_bytes("VmHWM") - before))
    live = live_tensor_bytes(besides=batches[1:])
    return {"measured_memory_bytes": live + max(growth), "live_memory_bytes": live, "growth_bytes": growth}


def live_tensor_bytes(besides: Any = ()) -> int:
    """Bytes of all distinct storages that Python can reach, without those of the tensors in `besides`."""
    import torch

    left_out = [item for item in torch.utils._pytree.tree_leaves(besides) if isinstance(item, torch.Tensor)]
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        # `type` and not `isinstance`: the latter wakes lazy modules and proxies.
        if type(item) not in (torch.Tensor, torch.nn.Parameter):
            continue
        if item.device.type == "cpu" and item.layout is torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    for item in left_out:
        storages.pop(item.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _fill_holes() -> None:
    """Give free memory back to the system and fill the holes of the heap with blocks that nobody writes to.

    The C library puts even a large block into a hole where one is, and keeps the hole when the block is freed: the
    resident set would then grow by what is free. Filled holes are not resident, and large blocks are mapped.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):  # not glibc
        return
    libc.malloc_trim(0)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_size_t
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_size_t]
    end = libc.sbrk(0)  # of the heap
    while (block := libc.malloc(RETURNED_BYTES)) < end:
        pass
    libc.free(block)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {name}: peak memory is measured on Linux only")


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """|predicted - measured| / measured; None where either is missing."""
    if predicted is None or not measured:
        return None
    return abs(predicted - measured) / measured


def ordered(rows: list[Row]) -> tuple[int, int]:
    """(pairs ordered right, pairs) over plans of one family whose measured times differ by more than DISTINCT."""
    by_family: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("measured_time_s") is not None:
            by_family[row["family"]].append(row)
    num_right = num_pairs = 0
    for members in by_family.values():
        for one, two in itertools.combinations(members, 2):
            fast, slow = sorted((one, two), key=lambda row: float(row["measured_time_s"]))
            if slow["measured_time_s"] > (1 + DISTINCT) * fast["measured_time_s"]:
                num_pairs += 1
                num_right += fast["predicted_time_s"] < slow["predicted_time_s"]
    return num_right, num_pairs


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    times = [row["time_error"] for row in rows if row.get("time_error") is not None]
    memories = [row["memory_error"] for row in rows if row.get("memory_error") is not None]
    num_right, num_pairs = ordered(rows)
    summary: dict[str, Any] = {
        "num_measured": len(times),
        "median_time_error": median(times),
        "median_memory_error": median(memories),
        "num_plan_pairs": num_pairs,
        "ordered_share": num_right / num_pairs if num_pairs else None,
    }
    misses = []
    if len(times) < LEAST_PAIRS:
        misses.append(f"at least {LEAST_PAIRS} (family, plan) pairs must be measured, but there are {len(times)}")
    for name in ("median_time_error", "median_memory_error"):
        if not summary[name] <= LARGEST_MEDIAN_ERROR:
            misses.append(f"{name} must be at most {LARGEST_MEDIAN_ERROR}, but is {summary[name]:.3f}")
    share = summary["ordered_share"]
    if share is not None and share < LEAST_ORDERED_SHARE:
        misses.append(f"ordered_share must be at least {LEAST_ORDERED_SHARE}, but is {share:.3f}")
    return summary, misses


def measure(message: Message, timer: Child, timeout_s: float) -> Row:
    """Both measurements of one pair; a failed one leaves its error in the row."""
    row = dict(timer.ask({**message, "measure": "time"}, timeout_s))
    if "error" not in row:
        with Child("benchmarks.prediction", "memory", environment=RETURNING_ALLOCATOR) as fresh:
            row |= fresh.ask({**message, "measure": "memory"}, timeout_s)
    if "error" in row:
        row = {**row, "error": f"{row.get('error_type')}: {first_line(row['error'])}"}
    row["time_error"] = relative_error(row.get("predicted_time_s"), row.get("measured_time_s"))
    row["memory_error"] = relative_error(row.get("predicted_memory_bytes"), row.get("measured_memory_bytes"))
    return row


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--compiled", action="store_true", help="compile the segments")
    parser.add_argument("--plans", metavar="A;B", help="only these plans: " + "; ".join(PLANS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measured steps for one pair")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one pair")
    options = parser.parse_args()
    if options.child:
        serve(run_pair)
        return 0
    plans = [name.strip() for name in options.plans.split(";")] if options.plans else list(PLANS)
    if not set(plans) <= PLANS.keys():
        parser.error(f"--plans must name some of {list(PLANS)}, but got {plans}")
    settings = {"compiled": options.compiled, "seconds": options.seconds, "scale": "small", "optimizer": "AdamW"}
    report = Report("prediction", settings, path=options.json)
    timer: Child | None = None
    for family in families.select(options.families or FAMILIES):
        for plan in plans:
            key = {"family": family.name, "plan": plan}
            timer = timer or Child("benchmarks.prediction", "time")
            try:
                row = measure({**key, "compiled": options.compiled, "seconds": options.seconds}, timer, options.timeout)
            except ChildError as error:
                row = {"error": str(error)}
                timer.close()
                timer = None
            report.add({**key, **row})
            print(f"{family.name}, {plan}: {row.get('error') or row['time_error']}", file=sys.stderr, flush=True)
    if timer is not None:
        timer.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

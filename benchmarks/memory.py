"""Peak resident memory of whole jobs: partita's plans against their prediction and against DistributedDataParallel.

    python -m benchmarks.memory --json benchmarks/results/memory.json --check

Every (model, plan) pair trains in fresh processes. Of each process the kernel's own high-water mark of resident pages
counts (`VmHWM`, which misses nothing), once over its whole life and once over the training steps alone (the mark is
reset once a plan is adopted). Pages of libraries that several processes have mapped are counted once a job: each
process counts its proportional share of them (`Pss`). A job's figure is the sum over its processes.

*Baseline* is what the same job holds after it has trained a tiny model by the same kind of plan: the interpreter,
torch, partita, and whatever these have loaded to capture, plan, compile and exchange. (`import_bytes` of it, before any
model, are those of the interpreter and the libraries.) The prediction of a job is its baseline plus the plan's
predicted bytes. Two errors are reported: `error` of the job's total, and the stricter `error_of_model`, of what comes
on top of the baseline.

DistributedDataParallel has two processes, gradients as views of its buckets and the fused optimizer. Judged against
it is the peak over the whole life of the jobs, planning and adoption included.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.processes import Child, ChildError, Group, Message, serve

LARGEST_ERROR, LARGEST_RATIO, NUM_STEPS = 0.10, 0.6, 4
COLUMNS = (
    "model", "plan", "import_bytes", "baseline_bytes", "predicted_bytes", "training_peak_bytes", "peak_bytes", "error",
    "error_of_model", "ratio_to_ddp", "chosen", "error_text",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model to train: `make` gives module, loss function and batch. Of a `parameter_heavy` one the weights, gradients
    and optimizer state are most of the memory."""

    name: str
    parameter_heavy: bool
    make: Callable[[float], tuple[Any, Any, Any]]


def tiny(_: float) -> tuple[Any, Any, Any]:
    """Next to nothing: what a job holds besides its model."""
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    batch = (torch.randn(8, 16), torch.randn(8, 16))
    return model, lambda module, b: nn.functional.mse_loss(module(b[0]), b[1]), batch


def wide_mlp(scale: float) -> tuple[Any, Any, Any]:
    """Linear layers that are wide, few rows: B 32, D 4096, 5 layers (84 M parameters)."""
    import torch
    from torch import nn

    width = int(4096 * scale)
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(width, width), nn.ReLU()]
    batch = (torch.randn(32, width), torch.randn(32, width))
    return nn.Sequential(*layers), lambda model, b: nn.functional.mse_loss(model(b[0]), b[1]), batch


def embedding(scale: float) -> tuple[Any, Any, Any]:
    """A large table (150,000 x 384, 58 M parameters) in front of a small network."""
    import torch
    from torch import nn

    rows = int(150_000 * scale * scale)
    model = nn.Sequential(nn.Embedding(rows, 384), nn.Flatten(), nn.Linear(16 * 384, 256), nn.ReLU(), nn.Linear(256, 8))
    batch = (torch.randint(0, rows, (64, 16)), torch.randint(0, 8, (64,)))
    return model, lambda module, b: nn.functional.cross_entropy(module(b[0]), b[1]), batch


def transformer(scale: float) -> tuple[Any, Any, Any]:
    """An encoder with a large model dim: B 8, T 32, D 1024, 6 layers (76 M parameters)."""
    return _encoder(int(1024 * scale), num_layers=6, rows=8, tokens=32)


def long_transformer(scale: float) -> tuple[Any, Any, Any]:
    """An encoder whose activations dwarf its weights: B 32, T 256, D 256, 6 layers."""
    return _encoder(256, num_layers=6, rows=max(2, int(32 * scale)), tokens=256)


def _encoder(width: int, *, num_layers: int, rows: int, tokens: int) -> tuple[Any, Any, Any]:
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
    batch = (torch.randn(rows, tokens, width), torch.randn(rows, tokens, width))
    return model, lambda module, b: nn.functional.mse_loss(module(b[0]), b[1]), batch


def convolutions(scale: float) -> tuple[Any, Any, Any]:
    """Convolutions on large images: B 32, 3 x 64 x 64, 64 channels."""
    import torch
    from torch import nn

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    rows = max(4, int(32 * scale))
    batch = (torch.randn(rows, 3, 64, 64), torch.randint(0, 10, (rows,)))
    return model, lambda module, b: nn.functional.cross_entropy(module(b[0]), b[1]), batch


TINY = Kind("tiny", False, tiny)
KINDS = (
    Kind("wide mlp", True, wide_mlp),
    Kind("embedding", True, embedding),
    Kind("transformer", True, transformer),
    Kind("long transformer", False, long_transformer),
    Kind("convolutions", False, convolutions),
)
AUTO, DDP = "auto", "ddp, 2 processes"
PLANS: Mapping[str, tuple[int, dict[str, int]]] = {  # number of processes, extents
    "1 worker": (1, {}),
    "data 2": (1, {"data": 2}),
    "tensor 2": (1, {"tensor": 2}),
    "pipeline 2": (1, {"pipeline": 2}),
    "data 2, 2 processes": (2, {"data": 2}),
    "tensor 2, 2 processes": (2, {"tensor": 2}),
    "pipeline 2, 2 processes": (2, {"pipeline": 2}),
}


def constraints_of(extents: Mapping[str, int]) -> partita.Constraints:
    counts = {"data": 1, "tensor": 1, "pipeline": 1, **extents}
    return partita.Constraints(
        **counts, num_workers=max(counts.values()), threads_per_worker=1, num_microbatches=1, compiled=False
    )


# A process' own memory ----------------------------------------------------------------------------------------------


def _status_bytes(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} must tell {name}, but does not; this benchmark needs Linux")


def shared_away_bytes() -> int:
    """Resident bytes that other processes account for: those of pages that are mapped by several."""
    return _status_bytes("/proc/self/smaps_rollup", "Rss") - _status_bytes("/proc/self/smaps_rollup", "Pss")


def resident_bytes() -> int:
    return _status_bytes("/proc/self/status", "VmRSS") - shared_away_bytes()


def peak_bytes() -> int:
    """The high-water mark since the process began or `reset_peak` was called."""
    return _status_bytes("/proc/self/status", "VmHWM") - shared_away_bytes()


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the high-water mark to what is resident now


class Trainer:
    """The child's side: makes a model, trains it, tells its memory."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._step: Callable[[], float] | None = None
        self._close: Callable[[], None] = lambda: None

    def __call__(self, message: Message) -> Row:
        return {"baseline": self._baseline, "prepare": self._prepare, "train": self._train}[message["do"]](message)

    def _baseline(self, message: Message) -> Row:
        import torch

        torch.set_num_threads(message["num_threads"])
        torch.randn(256, 256) @ torch.randn(256, 256)
        if message["num_processes"] > 1:
            torch.distributed.init_process_group("gloo")
            torch.distributed.all_reduce(torch.zeros(8))
        imported = resident_bytes()
        self._prepare({**message, "model": TINY.name, "scale": 1.0})
        assert self._step is not None
        for _ in range(NUM_STEPS):
            self._step()
        self._close()
        gc.collect()
        return {"bytes": resident_bytes(), "import_bytes": imported}

    def _prepare(self, message: Message) -> Row:
        import torch

        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        kind = next(kind for kind in (TINY, *KINDS) if kind.name == message["model"])
        model, loss_fn, batch = kind.make(message["scale"])
        if self.role == "ddp":
            return self._prepare_ddp(model, loss_fn, batch)
        asked = "auto" if message["plan"] == AUTO else constraints_of(message["extents"])
        step = partita.parallelize(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loss_fn, batch, plan=asked)
        while not step.is_settled:  # candidates run in turns, and compiled ones come in when they are ready
            step(batch)
        prediction = step.plan.prediction
        predicted = prediction.memory_bytes if prediction else {}
        self._step, self._close = lambda: float(step(batch).loss), step.close
        kind_of_plan = f"{step.plan.mode}{' compiled' if step.plan.compiled else ''} {dict(step.plan.axes)}"
        return {"predicted_bytes": sum(predicted.values()), "chosen": kind_of_plan}

    def _prepare_ddp(self, model: Any, loss_fn: Any, batch: Any) -> Row:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = tuple(leaf.tensor_split(size)[rank].clone() for leaf in batch)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(parallel, mine)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        self._step = step
        return {}

    def _train(self, message: Message) -> Row:
        assert self._step is not None, "a model must be prepared before it is trained"
        gc.collect()
        prepared = peak_bytes()
        reset_peak()
        for _ in range(message["num_steps"]):
            loss = self._step()
        training = peak_bytes()
        return {"loss": loss, "training_peak_bytes": training, "peak_bytes": max(prepared, training)}


# The parent's side ----------------------------------------------------------------------------------------------------


def measure(kind: Kind, plan: str, scale: float, timeout_s: float) -> Row:
    """One row: a job of fresh processes."""
    num_processes, extents = (2, {}) if plan == DDP else (1, {}) if plan == AUTO else PLANS[plan]
    num_threads = 2 if num_processes == 1 and plan == AUTO else 1
    row: Row = {"model": kind.name, "plan": plan, "parameter_heavy": kind.parameter_heavy}
    role = "ddp" if plan == DDP else "partita"
    common = {"model": kind.name, "plan": plan, "extents": extents, "scale": scale}
    try:
        with (
            Group("benchmarks.memory", role, num_processes=num_processes, num_threads=num_threads)
            if (num_processes > 1)
            else _Alone(Child("benchmarks.memory", role, num_threads=num_threads)) as job
        ):
            start = {"do": "baseline", "num_threads": num_threads, "num_processes": num_processes, **common}
            begun = _asked(job, start, timeout_s)
            row["baseline_bytes"] = sum(reply["bytes"] for reply in begun)
            row["import_bytes"] = sum(reply["import_bytes"] for reply in begun)
            told = _asked(job, {"do": "prepare", **common}, timeout_s)
            row |= {name: told[0][name] for name in ("predicted_bytes", "chosen") if name in told[0]}
            done = _asked(job, {"do": "train", "num_steps": NUM_STEPS}, timeout_s)
    except (ChildError, RuntimeError) as error:
        return {**row, "error_text": first_line(error)}
    for name in ("training_peak_bytes", "peak_bytes"):
        row[name] = sum(reply[name] for reply in done)
    return with_errors(row)


class _Alone:
    """A job of one process, asked like a group."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def ask(self, message: Message, timeout_s: float) -> list[Message]:
        return [self._child.ask(message, timeout_s)]

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()


def _asked(job: Group | _Alone, message: Message, timeout_s: float) -> Sequence[Row]:
    replies = job.ask(message, timeout_s)
    for reply in replies:
        if "error" in reply:
            raise RuntimeError(f"{reply['error_type']}: {reply['error']}")
    return replies


def with_errors(row: Row) -> Row:
    """The row with the relative errors of its prediction, positive where too much was predicted."""
    if not row.get("predicted_bytes"):
        return row
    measured, baseline = row["training_peak_bytes"], row["baseline_bytes"]
    total = baseline + row["predicted_bytes"]
    return {
        **row,
        "error": total / measured - 1,
        "error_of_model": row["predicted_bytes"] / max(measured - baseline, 1) - 1,
    }


def with_ratios(rows: list[Row]) -> None:
    """Adds `ratio_to_ddp`: a job's peak over that of DistributedDataParallel on the same model."""
    peers = {row["model"]: row["peak_bytes"] for row in rows if row["plan"] == DDP and "peak_bytes" in row}
    for row in rows:
        if row["plan"] != DDP and row["model"] in peers and "peak_bytes" in row:
            row["ratio_to_ddp"] = row["peak_bytes"] / peers[row["model"]]


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    """Largest errors and ratios, and a sentence for each miss. The ratio is judged of the automatic plan of parameter-
    heavy models, the error of every plan."""
    errors = {f"{row['model']}, {row['plan']}": row["error"] for row in rows if "error" in row}
    ratios = {
        row["model"]: row["ratio_to_ddp"]
        for row in rows
        if row["parameter_heavy"] and row["plan"] == AUTO and "ratio_to_ddp" in row
    }
    summary = {
        "num_measured": len(errors),
        "largest_error": max(map(abs, errors.values()), default=float("nan")),
        "largest_error_of_model": max((abs(row["error_of_model"]) for row in rows if "error" in row), default=0.0),
        "largest_ratio_to_ddp": max(ratios.values(), default=float("nan")),
    }
    misses = [
        f"{name}: |error| must be at most {LARGEST_ERROR}, but is {error:+.3f}"
        for name, error in errors.items()
        if abs(error) > LARGEST_ERROR
    ]
    misses += [
        f"{name}: the automatic plan's peak must be at most {LARGEST_RATIO} of DDP's, but is {ratio:.3f}"
        for name, ratio in ratios.items()
        if ratio > LARGEST_RATIO
    ]
    misses += [f"{row['model']}, {row['plan']}: {row['error_text']}" for row in rows if row.get("error_text")]
    if not ratios:
        misses.append("no automatic plan of a parameter-heavy model was compared with DDP")
    return summary, misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--models", default=",".join(kind.name for kind in KINDS), metavar="A,B")
    parser.add_argument("--plans", default=";".join((DDP, AUTO, *PLANS)), metavar="A;B")
    parser.add_argument("--scale", type=float, default=1.0, help="of the models' widths or rows")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one preparation or training")
    options = parser.parse_args()
    if options.child:
        serve(Trainer(options.child))
        return 0
    names = [name.strip() for name in options.models.split(",")]
    plans = [plan.strip() for plan in options.plans.split(";")]
    if not set(names) <= {kind.name for kind in KINDS} or not set(plans) <= {DDP, AUTO, *PLANS}:
        parser.error(f"--models must name some of {[kind.name for kind in KINDS]}, --plans of {[DDP, AUTO, *PLANS]}")
    report = Report("memory", {"scale": options.scale, "optimizer": "AdamW", "num_steps": NUM_STEPS}, options.json)
    for kind in (kind for kind in KINDS if kind.name in names):
        for plan in plans:
            report.add(measure(kind, plan, options.scale, options.timeout))
            with_ratios(report.rows)
            print(first_line(report.rows[-1], 400), file=sys.stderr, flush=True)
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

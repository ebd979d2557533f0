"""How long start-up takes: from the call of `partita.parallelize` to the end of the first trained step.

    python -m benchmarks.startup --json benchmarks/results/startup.json --check

Each model (ten million parameters) runs in a process of its own, first with empty folders for what partita and the
compiler keep (cold), then again with what that run left there (warm). The importing of torch and partita is told apart
from it. Phases are exclusive: what a phase calls of another one counts there; `cpu_s` is processor time of all threads
of the process in that time, which says more than the clock on a machine that does something else as well.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, median, option_parser, show
from benchmarks.processes import Child, Message, serve

LIMITS_S = {"cold": 30.0, "warm": 3.0}
SETTLE_S = 240.0  # a plan should be adopted after that
NUM_STEPS = 10  # with the adopted plan
NUM_WARM = 2
COLUMNS = ("model", "cache", "import_s", "first_step_s", "cpu_s", "parallelize_s", "phases", "settled_s", "plan")

# Phase -> functions as the modules that call them know them.
PHASES = {
    "detect": (("partita.cluster.model", "Cluster.detect"),),
    "capture": (("partita.training.parallelize", "capture"), ("partita.training.setup", "capture")),
    "rules": (("partita.sharding.found", "RuleBook.find"),),
    "planning": (("partita.training.shared_plans", "ranked_plans"),),
    "measuring": (
        ("partita.cost.table", "CostTable.measure"),
        ("partita.cost.table", "CostTable.measure_overheads"),
        ("partita.training.measuring", "PartMeasurer.measure"),
    ),
    "lowering": (("partita.training.optimizers", "lower"), ("partita.training.graph_runner", "lower")),
    "compiling": (("partita.runtime.segments", "_compile"),),
    "stepping": (("partita.training.step", "Step.__call__"),),
}


@dataclass
class Phases:
    """Exclusive seconds of nested calls in one thread."""

    times_s: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=list)
    _since_s: float = 0.0

    def watch(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time goes to `phase`."""
        import threading

        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self._turn()
            self._stack.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._stack.pop()

        return timed

    def _turn(self) -> None:
        now_s = time.perf_counter()
        if self._stack:
            self.times_s[self._stack[-1]] = self.times_s.get(self._stack[-1], 0.0) + now_s - self._since_s
        self._since_s = now_s

    def install(self) -> None:
        """Replace the functions of `PHASES` by watched ones.

        Raises:
            AttributeError: one is not where the table says.
        """
        for phase, places in PHASES.items():
            for module_name, path in places:
                owner: Any = importlib.import_module(module_name)
                *holders, name = path.split(".")
                for holder in holders:
                    owner = getattr(owner, holder)
                raw = vars(owner)[name]
                static = isinstance(raw, staticmethod | classmethod)
                watched = self.watch(phase, getattr(owner, name))
                setattr(owner, name, staticmethod(watched) if static else watched)


# Models --------------------------------------------------------------------------------------------------------------


def transformer() -> tuple[Any, Any, Any]:
    """A causal language model: 6 layers of width 352."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, length, width = x.shape
            q, k, v = (
                part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
            return x + self.mlp(self.second(x))

    class Model(nn.Module):
        def __init__(self, vocabulary: int = 1500, width: int = 352, layers: int = 6, length: int = 64) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            logits: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))
            return logits

    tokens = torch.randint(0, 1500, (8, 65))
    return Model(), _classified, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def mlp() -> tuple[Any, Any, Any]:
    """Five linear layers."""
    import torch
    from torch import nn

    sizes = (784, 1792, 1792, 1792, 1024, 10)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), _classified, (torch.randn(64, 784), torch.randint(0, 10, (64,)))


def convnet() -> tuple[Any, Any, Any]:
    """A residual network for small images."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.norms = nn.ModuleList([nn.BatchNorm2d(after), nn.BatchNorm2d(after)])
            self.skip = nn.Conv2d(before, after, 1, stride, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
            return torch.relu(inner + self.skip(x))

    blocks = [Block(32, 64, 1), Block(64, 128, 2), Block(128, 256, 2), Block(256, 512, 2), Block(512, 512, 1)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model, _classified, (torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))


def _classified(model: Any, batch: Any) -> Any:
    from torch.nn import functional

    logits = model(batch[0])
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


MODELS = {"transformer": transformer, "mlp": mlp, "convnet": convnet}


# The measured process ------------------------------------------------------------------------------------------------


def measure(message: Message) -> Row:
    """One run in this process."""
    start_s = time.perf_counter()
    import torch

    torch_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    import partita

    import_s = time.perf_counter() - start_s
    torch.manual_seed(0)
    model, loss_fn, batch = MODELS[message["model"]]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    phases = Phases()
    phases.install()
    cpu_s, start_s = time.process_time(), time.perf_counter()
    step = partita.parallelize(model, optimizer, loss_fn, batch)
    parallelize_s = time.perf_counter() - start_s
    losses = [step(batch).loss]
    first_step_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    known = dict(phases.times_s)
    step_times_s: list[float] = []
    settled_s: float | None = None
    num_left = message["num_steps"]
    while num_left:
        begin_s = time.perf_counter()
        losses.append(step(batch).loss)
        step_times_s.append(time.perf_counter() - begin_s)
        if step.is_settled:
            settled_s = settled_s or time.perf_counter() - start_s
            num_left -= 1
        elif time.perf_counter() - start_s > message["settle_s"]:
            break
    with step:
        plan = step.plan
    return {
        "num_parameters": sum(value.numel() for value in model.parameters()),
        "import_torch_s": torch_s,
        "import_s": import_s,
        "parallelize_s": parallelize_s,
        "first_step_s": first_step_s,
        "cpu_s": cpu_s,
        "phases": known | {"other": first_step_s - sum(known.values())},
        "settled_s": settled_s,
        "step_time_s": median(step_times_s[-message["num_steps"] :]),
        "start_step_time_s": median(step_times_s[:5]),
        "longest_step_s": max(step_times_s),
        "step_times_s": step_times_s,
        "losses": [losses[0], losses[-1]],
        "plan": f"{plan.mode}{' compiled' if plan.compiled else ''} {plan.axes}, {plan.threads_per_worker} thread(s)",
        "tried": [
            {"plan": item.description, "step_time_s": item.measured_step_time_s, "reason": item.reason}
            for item in plan.alternatives
        ],
    }


def run(model: str, caches: Path, *, num_steps: int, settle_s: float, timeout_s: float) -> Row:
    """A run of `model` in a new process that keeps everything in `caches`."""
    environment = {
        "PARTITA_CACHE": str(caches / "partita"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with Child("benchmarks.startup", "run", num_threads=cores, environment=environment) as child:
        row = child.ask({"model": model, "num_steps": num_steps, "settle_s": settle_s}, timeout_s)
    if "error" in row:
        raise RuntimeError(f"{model}: {row['error_type']}: {row['error']}")
    return row


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    """The slowest first step of each kind of cache, and a sentence for each that misses its limit."""
    summary: dict[str, Any] = {}
    misses: list[str] = []
    for cache, limit_s in LIMITS_S.items():
        mine = [row for row in rows if row["cache"] == cache]
        if not mine:
            continue
        by_model = {
            name: median([row["first_step_s"] for row in mine if row["model"] == name])
            for name in dict.fromkeys(row["model"] for row in mine)
        }
        summary[f"first_step_{cache}_s"] = by_model
        misses += [
            f"{name}, {cache}: the first step must be trained within {limit_s:g} s of the call, "
            f"but was after {time_s:.2f} s"
            for name, time_s in by_model.items()
            if time_s > limit_s
        ]
    return summary, misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--models", default=",".join(MODELS), help="of: " + ", ".join(MODELS))
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="steps with the adopted plan")
    parser.add_argument("--settle-s", type=float, default=SETTLE_S, help="how long to wait for the adoption of a plan")
    parser.add_argument("--num-warm", type=int, default=NUM_WARM, help="warm runs; judged is their median")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    options = parser.parse_args()
    if options.child:
        serve(measure)
        return 0
    settings = {
        "num_steps": options.num_steps,
        "settle_s": options.settle_s,
        "num_warm": options.num_warm,
        "limits_s": LIMITS_S,
    }
    report = Report("startup", settings, path=options.json)
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="startup-") as folder:
            for index in range(1 + options.num_warm):
                limits = {"settle_s": options.settle_s, "timeout_s": options.timeout_s}
                row = run(model, Path(folder), num_steps=options.num_steps, **limits)
                report.add({"model": model, "cache": "warm" if index else "cold", **row})
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

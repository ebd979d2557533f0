"""Widths and depth: networks that grow compute the same, learning rates hold for every width, files need no partita.

    python -m benchmarks.structure --json benchmarks/results/structure.json --check

growth      families of `benchmarks.families`, every width that can grow by a quarter, at once (by gradmax one of them):
            the largest difference of their results to those of before, in shares of the largest result
rates       64-w-w-10 perceptrons on scikit-learn's digits by Adam: the learning rate of a grid of factors of two with
            the lowest loss after so many steps (mean over seeds), and those within 5 % of it, which is less than seeds
            differ by; with one rate for all parameters ("standard") and with the groups of `mup_groups` from the
            narrowest width ("mup")
files       families pruned to two thirds of their parameters, saved, and loaded by a process that has no partita

`--check` fails where results differ by more than 1e-6, no rate is best for every width, or a file does not load.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import partita
from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.families import SIZES, get

LARGEST_DIFFERENCE = 1e-6
AS_GOOD = 1.05
FAMILIES = "mlp_batchnorm,conv1d,unet,lstm,vae,recommender,gpt2,llama,t5,vit,swin,mamba"
WIDTHS = (64, 128, 256, 512, 1024)
RATES = tuple(2.0**power for power in range(-12, -3))
STEPS, ROWS = 150, 128
COLUMNS = ("part", "name", "how", "num_widths", "num_parameters", "largest_difference", "best_rate", "loaded", "errors")


def called(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A family's model without dropout, and what its loss calls it with."""
    import torch

    torch.manual_seed(0)
    task = get(name).build(SIZES["tiny"])
    taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    model = task.model.eval()
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: taken.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        task.loss_fn(model, task.batches(0))
    hook.remove()
    return model, *taken[0]


def tensors_in(value: Any) -> list[Any]:
    import torch
    import torch.utils._pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def results(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All tensors that a model gives, without dropout and without counting batches; the same draws every time."""
    import torch

    torch.manual_seed(0)
    trains = model.training
    with torch.no_grad():
        found = tensors_in(model.eval()(*args, **kwargs))
    model.train(trains)
    return found


def difference(before: list[Any], after: list[Any]) -> float:
    pairs = zip(before, after, strict=True)
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1)) for x, y in pairs)


# Parts ---------------------------------------------------------------------------------------------------------------


def grown(name: str) -> list[Row]:
    import torch

    from partita.search.structure import Network, widened

    model, args, kwargs = called(name)
    network = Network(model, args, kwargs)
    before = results(model, args, kwargs)
    names = [width for width in network.widths if network.outgoing(width) and not network.reads_all(width)]
    sizes = {width: network.sizes[width] + max(2, network.sizes[width] // 4) for width in names}

    def loss(module: Any) -> Any:
        return sum(value.float().square().mean() for value in run(module) if value.is_floating_point())

    def run(module: Any) -> list[Any]:
        torch.manual_seed(0)
        return tensors_in(module(*args, **kwargs))

    ways: dict[str, Callable[[], Any]] = {
        "copies": lambda: widened(network, sizes),
        "pairs": lambda: widened(network, sizes, how="pairs"),
        "gradmax": lambda: _by_gradients(network, names, sizes, loss),
    }
    rows = []
    for how, grow in ways.items():
        row: Row = {"part": "growth", "name": name, "how": how, "num_widths": len(names)}
        try:
            larger = grow()
            row["num_parameters"] = larger.num_parameters()
            row["largest_difference"] = difference(before, results(larger.model, args, kwargs))
        except partita.errors.PartitaError as error:
            row["errors"] = first_line(error)
        rows.append(row)
    return rows


def _by_gradients(network: Any, names: list[str], sizes: dict[str, int], loss: Callable[[Any], Any]) -> Any:
    """The last width that gets gradients where it is silent: behind a ReLU without a bias none does."""
    from partita.search.structure import gradmax

    for name in reversed(names):
        try:
            return gradmax(network, {name: sizes[name]}, loss)
        except partita.errors.InputError as error:
            reason = error
    raise reason


def saved(name: str) -> Row:
    import torch

    from partita.search.structure import Network, pruned, save_network, sizes_within

    model, args, kwargs = called(name)
    network = Network(model, args, kwargs)
    row: Row = {"part": "files", "name": name, "num_widths": len(network.widths)}
    limit = network.num_parameters() * 2 // 3
    try:
        smaller = pruned(network, sizes_within(network, num_parameters=limit))
    except partita.errors.PartitaError as error:
        return row | {"errors": first_line(error)}
    row["num_parameters"] = smaller.num_parameters()
    with tempfile.TemporaryDirectory() as folder:
        save_network(smaller, folder)
        torch.save((args, kwargs, results(smaller.model, args, kwargs)), Path(folder) / "example.pt")
        command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {folder!r})\n{READ}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    row["loaded"] = done.stdout.strip() == "equal"
    return row if row["loaded"] else row | {"errors": done.stderr.strip().rpartition("\n")[2] or "it printed nothing"}


READ = """
import torch
import torch.utils._pytree as pytree
from model import load

args, kwargs, expected = torch.load("example.pt")
model = load().eval()
assert "partita" not in sys.modules
torch.manual_seed(0)
found = [value for value in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(value, torch.Tensor)]
for x, y in zip(found, expected, strict=True):
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
print("equal")
"""


def rates(how: str, widths: Sequence[int], seeds: int) -> list[Row]:
    rows = []
    for width in widths:
        losses = {rate: sum(trained(how, width, rate, seed) for seed in range(seeds)) / seeds for rate in RATES}
        best = min(losses, key=losses.__getitem__)
        as_good = [rate for rate, loss in losses.items() if loss <= AS_GOOD * losses[best]]
        rows.append({"part": "rates", "name": f"width {width}", "how": how, "best_rate": best, "as_good": as_good,
                     "losses": {f"{rate:g}": loss for rate, loss in losses.items()}})  # fmt: skip
    return rows


def perceptron(width: int) -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def trained(how: str, width: int, rate: float, seed: int) -> float:
    """The loss on all that is learnt from, after `STEPS` steps."""
    import torch
    import torch.nn.functional as F

    from benchmarks.method_tasks import digits
    from partita.search.structure import Network, mup_groups, mup_start_

    torch.manual_seed(seed)
    model = perceptron(width)
    x, y = digits(False)[:2]
    groups: Any = model.parameters()
    if how == "mup":
        base = perceptron(WIDTHS[0])
        network = Network(model, (x[:4],))
        mup_start_(network, base)
        groups = mup_groups(network, base, lr=rate)
    optimizer = torch.optim.Adam(groups, lr=rate)
    random = torch.Generator().manual_seed(100 + seed)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (ROWS,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y))
    return loss if loss == loss else float("inf")


# Judgement -----------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    misses = [
        f"{row['part']}, {row['name']}, {row.get('how', '')}: {row['errors']}" for row in rows if row.get("errors")
    ]
    differences = [row["largest_difference"] for row in rows if "largest_difference" in row]
    misses += [
        f"{row['name']}, {row['how']}: results must differ by at most {LARGEST_DIFFERENCE:g}, but do by "
        f"{row['largest_difference']:g}"
        for row in rows
        if row.get("largest_difference", 0.0) > LARGEST_DIFFERENCE
    ]
    best = {how: [row["best_rate"] for row in rows if row.get("how") == how and "best_rate" in row]
            for how in ("standard", "mup")}  # fmt: skip
    ties = [set(row["as_good"]) for row in rows if row.get("how") == "mup" and "as_good" in row]
    common = sorted(set.intersection(*ties)) if ties else []
    if ties and not common:
        misses.append(f"a rate must be best for every width, but best are {best['mup']}")
    files = [row for row in rows if row["part"] == "files"]
    return {
        "num_rows": len(rows),
        "largest_difference": max(differences, default=float("nan")),
        "best_rates": best,
        "best_for_every_width": common,
        "files_loaded": sum(bool(row.get("loaded")) for row in files),
        "files": len(files),
    }, misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--parts", default="growth,files,rates", metavar="A,B")
    parser.add_argument("--seeds", type=int, default=5, help="of each learning rate")
    options = parser.parse_args()
    settings = {"steps": STEPS, "rows": ROWS, "rates": RATES, "seeds": options.seeds}
    report = Report("structure", settings, path=options.json)
    for part in options.parts.split(","):
        names = (options.families or FAMILIES).split(",") if part != "rates" else ["standard", "mup"]
        for name in names:
            found = (
                grown(name) if part == "growth" else [saved(name)] if part == "files"
                else rates(name, WIDTHS, options.seeds)
            )  # fmt: skip
            for row in found:
                report.add(row)
                print(row, file=sys.stderr, flush=True)
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

"""What a peer is asked to train: a family at a scale; its weights and batches as arrays for peers without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.families import Task

NUM_BATCHES = 4
OPTIMIZER = "AdamW"


@dataclass(frozen=True)
class Workload:
    """`arrays` is a file by `save_arrays`, for peers that cannot build the torch model."""

    family: str
    scale: str
    arrays: str | None = None

    def task(self) -> Task:
        """The torch model, its weights from seed 0; the same in every process."""
        from benchmarks import families

        return families.get(self.family).task(self.scale)  # type: ignore[arg-type]

    def batches(self, task: Task) -> list[Any]:
        return [task.batches(seed) for seed in range(NUM_BATCHES)]


def save_arrays(workload: Workload, path: Path) -> None:
    """Write weights, batches and the learning rate of a workload as NumPy arrays.

    Names: `weights/NAME` for trained parameters, shared ones once; `batch/I/KEY` where KEY is a dict's key or the place
    in a tuple; `learning_rate`.
    """
    import numpy as np

    task = workload.task()
    arrays = {
        f"weights/{name}": parameter.detach().numpy()
        for name, parameter in task.model.named_parameters()
        if parameter.requires_grad
    }
    for index, batch in enumerate(workload.batches(task)):
        items = batch.items() if isinstance(batch, dict) else enumerate(batch)
        arrays |= {f"batch/{index}/{key}": leaf.numpy() for key, leaf in items}
    np.savez(path, learning_rate=np.float64(task.learning_rates[OPTIMIZER]), **arrays)


def load_arrays(path: str) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Weights by name, batches by key, and the learning rate, as `save_arrays` wrote them."""
    import numpy as np

    weights: dict[str, Any] = {}
    batches: dict[int, dict[str, Any]] = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            head, _, rest = name.partition("/")
            if head == "weights":
                weights[rest] = arrays[name]
            elif head == "batch":
                index, _, key = rest.partition("/")
                batches.setdefault(int(index), {})[key] = arrays[name]
        return weights, [batches[index] for index in sorted(batches)], float(arrays["learning_rate"])

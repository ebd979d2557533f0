"""What is searched: the user's own functions and data, and what stands in where none was given."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from partita.arguments import check_count, told
from partita.errors import InputError
from partita.search.parts import CAPTURED_ROWS, check_parts, first_batch, is_tensors, judged_batches
from partita.training.connecting import Connections

if TYPE_CHECKING:
    from partita.search.trials import SearchTrial

Direction = Literal["maximize", "minimize"]
Objective = Literal["score", "parameters", "step_time"]
BATCH_SIZES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The arguments of `partita.search` that say what a candidate is and how it is judged. Sent to the processes of
    trials by reference to where the functions are defined, so these must be at the top level of a module."""

    build: Callable[[SearchTrial], nn.Module] | nn.Module  # a module: networks around it (`settled`)
    data: Any
    loss_fn: Callable[[nn.Module, Any], torch.Tensor]
    score: Callable[[nn.Module, Any], float] | None  # None: `default_score`
    direction: Direction | None  # None: "maximize", or that of the default score (`settled`)
    optimizer: Callable[[SearchTrial, nn.Module], torch.optim.Optimizer]
    batch_size: int | Callable[[SearchTrial], int] | None  # None: suggested
    connections: Callable[[SearchTrial], Connections | None] | None

    @property
    def name(self) -> str:
        """Which search this is, as text: a study of another one is not continued."""
        names = (getattr(self.build, name, None) for name in ("name", "__name__"))
        return next((name for name in names if isinstance(name, str)), type(self.build).__name__)

    def parts(self) -> tuple[Any, Any]:
        """The training part and the judged part.

        Raises:
            InputError: `data` is, or gives, something else.
        """
        data = self.data() if callable(self.data) else self.data
        check_parts(data)
        return data[0], data[1]

    def batch_size_of(self, trial: SearchTrial, num_rows: int) -> int:
        """Rows of a batch: given, by the user's function, or suggested, at most an eighth of the training part."""
        if isinstance(self.batch_size, int):
            return min(self.batch_size, num_rows)
        if self.batch_size is None:
            choices = [size for size in BATCH_SIZES if size <= max(BATCH_SIZES[0], num_rows // 8)]
            return min(int(trial.suggest_categorical("batch_size", choices)), num_rows)
        size = self.batch_size(trial)
        check_count(size, "what batch_size(trial) returns")
        return min(size, num_rows)


def suggested_adamw(trial: SearchTrial, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a suggested "learning_rate", from 1e-4 to 3e-2 on a logarithmic scale."""
    return torch.optim.AdamW(model.parameters(), lr=trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True))


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of batches (inputs, targets): cross entropy if targets are whole numbers (classes), else mean squared error.

    Raises:
        InputError: the batch is no such pair, or outputs have not the shape of the targets.
    """
    inputs, targets = _pair(batch)
    outputs = model(inputs)
    if not targets.is_floating_point():
        return nn.functional.cross_entropy(outputs, targets)
    if outputs.shape != targets.shape:
        raise InputError(
            f"outputs must have the shape of the targets, {tuple(targets.shape)}, but have {tuple(outputs.shape)}; let "
            "the model return that shape, or pass a loss_fn"
        )
    return nn.functional.mse_loss(outputs, targets)


def default_score(model: nn.Module, batches: Any, loss_fn: Callable[[nn.Module, Any], torch.Tensor]) -> float:
    """Over all batches: the share of samples whose class is right (1: all), if that is what the default loss is for;
    else the mean loss of a sample."""
    total, count = 0.0, 0
    for batch in batches:
        rows = len(batch[1]) if is_pair(batch) else 1
        if is_of_classes(batch, loss_fn):
            inputs, targets = batch
            right = (model(inputs).argmax(1) == targets).float().mean()
            total += float(right) * rows
        else:
            total += float(loss_fn(model, batch)) * rows
        count += rows
    if not count:
        raise InputError("the judged part of the data must have at least one batch, but has none")
    return total / count


def settled(task: Task) -> Task:
    """The task with its direction, for which a batch of the data may have to be looked at; and with the data themselves
    where a function returns tensors: so it is called once, and all trials share them. A module in place of `build`
    becomes the space around it."""
    parts = None
    if isinstance(task.build, nn.Module):
        parts = task.parts()
        task = _around(task, task.build, first_batch(parts[0], CAPTURED_ROWS))
    if callable(task.data):
        parts = parts or task.parts()
        if all(is_tensors(part) for part in parts):
            task = dataclasses.replace(task, data=parts)
    if task.direction is not None:
        return task
    if task.score is not None:
        return dataclasses.replace(task, direction="maximize")
    judged = (parts or task.parts())[1]
    maximizes = task.loss_fn is default_loss and is_of_classes(next(iter(judged_batches(judged))), task.loss_fn)
    return dataclasses.replace(task, direction="maximize" if maximizes else "minimize")


def _around(task: Task, model: nn.Module, batch: Any) -> Task:
    from partita.search.around import Around, call_of  # captures networks, which most searches do not need

    model = copy.deepcopy(model).train()  # whatever it was used for before
    around = Around(model, *call_of(model, task.loss_fn, batch))
    _ = around.runs  # if it cannot be captured, the caller hears of it, not every trial
    return dataclasses.replace(task, build=around, connections=task.connections or around.connections)


def bound_of(task: Task) -> float | None:
    """A score that none can be better than; None: unknown."""
    if task.score is not None or task.loss_fn is not default_loss:
        return None
    return 1.0 if task.direction == "maximize" else 0.0


def is_of_classes(batch: Any, loss_fn: object) -> bool:
    """Whether the default score of such batches is the share of right answers."""
    return loss_fn is default_loss and is_pair(batch) and not batch[1].is_floating_point()


def is_pair(batch: Any) -> bool:
    """Whether a batch is (inputs, targets)."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)


def _pair(batch: Any) -> tuple[Any, torch.Tensor]:
    if not is_pair(batch):
        raise InputError(
            f"without a loss_fn, batches must be (inputs, targets), but got {told(batch)}. Pass "
            "loss_fn=..., which takes the model and a batch"
        )
    return batch[0], batch[1]


def check_task(task: Task) -> None:
    """Raises InputError unless all are what they must be and can be sent to other processes."""
    for name in ("build", "loss_fn", "optimizer"):
        _check_function(getattr(task, name), name)
    for name in ("score", "connections"):
        if getattr(task, name) is not None:
            _check_function(getattr(task, name), name)
    if task.direction not in (None, *get_args(Direction)):
        raise InputError(f'direction must be "maximize" or "minimize", but got {told(task.direction)}')
    if task.score is None and task.direction is not None:
        raise InputError("direction belongs to a score of your own: pass score=... as well, or leave direction out")
    if isinstance(task.batch_size, int):
        check_count(task.batch_size, "batch_size")
    elif task.batch_size is not None:
        _check_function(task.batch_size, "batch_size")
    if callable(task.data):
        _check_function(task.data, "data")
    else:
        check_parts(task.data)


def _check_function(function: Any, name: str) -> None:
    """Raises InputError unless another process can find it."""
    if not callable(function):
        raise InputError(f"{name} must be a function, but got {told(function)}")
    place = "Define it at the top level of a module or script; every trial runs in a process of its own and imports it"
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"{name} must be found by other processes, but cannot be: {error}. {place}") from error
    if getattr(function, "__module__", "") == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        raise InputError(f"{name} must be defined in a file, but this interpreter runs none. {place}")

"""A worker that is alone in its process runs in the caller's thread, unless that thread makes ops something else."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from runtime_cases import engine, program, program_set, run, segment

from partita.errors import StepError, WorkerError
from partita.program.instructions import Feed, ReduceScatter, Slice, TensorSpec, Update

PRODUCT = segment("product", lambda x, w: ((x @ w).sum(), x.sum(0)), torch.ones(2, 3), torch.ones(3))


class Nothing(TorchDispatchMode):
    """Lets every op pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def programs() -> Any:
    spec = TensorSpec((3,), torch.float32)
    slices = (Slice("w", 0, 3),)
    scatter = ReduceScatter(("n:g",), (spec,), (0,), "grads", parameters=("w",), slices=(slices,), replicated=(False,))
    return program_set(
        [
            program(
                0,
                [run(PRODUCT, ["x:0@0", "p:w"], ["n:loss", "n:g"]), scatter, Update(slices)],
                feeds=[Feed("x:0@0", leaf=0)],
            )
        ],
        [PRODUCT],
    )


def stepped(around: Callable[[], Any]) -> tuple[Tensor, list[Any]]:
    """The loss of a step inside `around()`, and what its update saw: thread, threads of ops, whether gradients are
    recorded."""
    seen: list[Any] = []

    def look(worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
        seen.append((threading.current_thread(), torch.get_num_threads(), torch.is_grad_enabled()))

    batch = torch.full((2, 3), 0.1)
    with engine(programs(), parameters={"w": torch.full((3,), 1 / 3)}, update=look) as machine, around():
        loss = machine.step([batch]).loss
    return loss, seen


def test_it_runs_in_the_callers_thread_and_leaves_that_as_it_was() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, [(thread, num_threads, records)] = stepped(contextlib.nullcontext)
        assert thread is threading.current_thread() and num_threads == 1 and not records
        assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        lambda: torch.device("meta"),
        Nothing,
    ],
    ids=["autocast", "inference mode", "default device", "dispatch mode"],
)
def test_a_thread_in_which_ops_are_something_else_is_left_alone(around: Callable[[], Any]) -> None:
    expected, _ = stepped(contextlib.nullcontext)
    loss, [(thread, *_)] = stepped(around)
    assert thread is not threading.current_thread()
    assert torch.equal(loss, expected)


def test_its_errors_are_those_of_a_worker_and_end_the_engine() -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bad update")

    with engine(programs(), parameters={"w": torch.ones(3)}, update=broken) as machine:
        with pytest.raises(WorkerError, match=r"worker 0 .* ValueError in instruction 2 \(Update.*: a bad update"):
            machine.step([torch.ones(2, 3)])
        with pytest.raises(StepError, match="has failed"):
            machine.step([torch.ones(2, 3)])
        assert not machine.workers[0].is_alive()


def test_an_interrupt_passes_and_ends_the_engine() -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with engine(programs(), parameters={"w": torch.ones(3)}, update=interrupted) as machine:
        with pytest.raises(KeyboardInterrupt):
            machine.step([torch.ones(2, 3)])
        with pytest.raises(StepError, match="interrupted"):
            machine.step([torch.ones(2, 3)])

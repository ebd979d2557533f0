"""The process of a trial: builds a candidate, trains it as it is told, and ends with whoever started it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from partita.errors import InputError
from partita.search.lifeline import end_with, offer_to_be_killed
from partita.search.messages import Ended, Failed, Go, Order, Priced, Ready, Rejected, RungEnd, Stop, Suggest
from partita.search.task import Task
from partita.search.training_run import RejectedError, TrainingRun, take_cores
from partita.search.trials import SearchTrial

OFFER = 500  # of `offer_to_be_killed`: a trial is tried again, so it goes before the search


def main(order: Order, link: Connection, lifeline: Connection) -> None:
    """What the process runs. What it prints goes to standard error."""
    end_with(lifeline)
    offer_to_be_killed(OFFER)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search decides what an interruption means
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    take_cores(order.cores)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):  # nobody is left to tell
        try:
            _run(order, link)
        except RejectedError as error:
            link.send(Rejected(reason=error.reason, price=error.price))
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise
        except BaseException:
            link.send(Failed(error=traceback.format_exc()))
    link.close()


def _run(order: Order, link: Connection) -> None:
    # Written by the search itself a moment ago; tensors are mapped, so that all trials share their memory.
    task: Task = torch.load(order.task_file, mmap=True, weights_only=False)

    def ask(kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        link.send(Suggest(kind=kind, name=name, arguments=arguments, options=options))
        answer = link.recv()
        if answer.error:
            raise InputError(answer.error)
        return answer.value

    trial = SearchTrial(order.number, order.known, None if order.resumed else ask)
    run = TrainingRun(task, trial, order)
    link.send(Ready(price=run.price(), batch_size=run.batch_size, attributes=trial.user_attrs))
    if order.final is None:
        _explore(run, order, link)
    else:
        _finish(run, order, link)


def _explore(run: TrainingRun, order: Order, link: Connection) -> None:
    """Trains from rung to rung while it may go on."""
    answer: Go | Stop = link.recv()
    if isinstance(answer, Go):
        _price(run, answer, link)
        run.begin(answer.granted_s, resumed=order.resumed)
    saved = order.resumed
    while isinstance(answer, Go):
        run.train(answer.until_s, link.poll, link.send)
        run.save()
        saved = True
        link.send(RungEnd(train_s=run.train_s))
        answer = link.recv()  # a `Stop` that has interrupted training is read here
        if isinstance(answer, Go):
            _price(run, answer, link)
            run.continue_for(answer.granted_s)
    run.close()
    link.send(Ended(saved=saved))


def _price(run: TrainingRun, answer: Go, link: Connection) -> None:
    price = run.price_for(answer.granted_s)
    if price is not None:
        link.send(Priced(price=price))


def _finish(run: TrainingRun, order: Order, link: Connection) -> None:
    """Trains until the end of the final training, or a `Stop`."""
    assert order.final is not None
    _, end_s = order.final
    answer: Go | Stop = link.recv()
    if isinstance(answer, Go):
        run.begin(answer.granted_s, resumed=order.resumed)
        run.train(float("inf"), lambda: time.time() + run.ending_s > end_s or link.poll(), link.send)
        run.close()
    link.send(Ended(saved=False))

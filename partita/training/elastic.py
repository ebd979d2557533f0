"""A training step of processes that come, go and crash: every step counts for all of them, or for none.

All processes hold the same weights and are given the same global batch. A step's quorum deals the pieces of the batch
to those that are there; each computes the gradients of its own by a plan of its own, they add them up, and vote. If one
is lost meanwhile, nobody has changed anything, and the step is made again by those that are left: no row of a batch is
lost or counts twice. Whoever comes in receives the state of the others within its first step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import NonFiniteLossError, StepError
from partita.runtime.binding import clip_factor
from partita.training.checkpoint.contents import random_state, set_random_state
from partita.training.checkpoint.saver import Source
from partita.training.elastic_around import MOST_TRIES, ElasticAround
from partita.training.keeping import Also, Folder
from partita.training.membership import Elastic, Round
from partita.training.runner import apply_gradients
from partita.training.setup import StepResult, StepSetup
from partita.training.step import Step
from partita.training.sync.method import flat_of, unflat
from partita.training.sync.replica import Gradients

MEASURED_EVERY = 50  # steps after which a process that is too slow for any piece shows its speed again


class ElasticStep(ElasticAround):
    """Trains with whoever is there: ``result = step(batch)``, as any `Step`. `result.loss` is that of the whole batch.

    A process that comes later is given the batches from the first one on by its own loop, but receives the others'
    step count: go by `num_steps` (``while step.num_steps < n: step(batches[step.num_steps])``).

    Args:
        setup: of this process alone.
        settings: of the job.
        batch: a global batch.
        make: makes the inner step from a setup and a piece of a batch.
    """

    def __init__(self, setup: StepSetup, settings: Elastic, batch: Any, make: Callable[[StepSetup, Any], Step]) -> None:
        super().__init__(setup, settings, batch, None)
        self._buffers = [value for value in setup.model.buffers() if value.is_floating_point()]
        self._attempt = _Attempt()
        self._trained: tuple[str, ...] = ()  # parameters that have gradients
        # Gradients are clipped once they are those of all pieces, so not by the inner step.
        inner = dataclasses.replace(
            setup, due=self._due, checkpoints=None, tells=False, check_finite="off", clip_norm=None
        )
        self._inner = make(inner, self._pieces(batch, 0))
        self._join(self._state_for_peers, self._load_state_of_peer)

    # As any step -----------------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return self._members.step

    def __call__(self, batch: Any, *, update: bool = True) -> StepResult:
        """Trains one step on the global batch, with whoever is there.

        Raises:
            InputError: the batch has other rows than the first one.
            StepError: processes were lost in all of many tries.
            NonFiniteLossError: the loss is NaN or infinite, on all processes; nothing was updated.
            StepError: the lighthouse is gone.
        """
        start_s = time.perf_counter()
        self._check(batch, update)
        before, sent_before = _Volatile(self._setup.model), Counter(self._members.sent_to)
        for _ in range(MOST_TRIES):
            current = self._gather()
            self._compute(batch, current)
            if self._attempt.committed:
                break
            before.restore()
            lost_nobody = self._attempt.is_whole
            if lost_nobody and not self._attempt.is_finite:
                norm = "" if self._attempt.norm is None else f" and a norm of the gradients of {self._attempt.norm}"
                raise NonFiniteLossError(
                    f"the loss must be finite, but got {self._attempt.loss}{norm} in step {self.num_steps + 1}; no "
                    "parameter was updated. Look at the batch and the learning rate"
                )
        else:
            raise StepError(f"a step must succeed within {MOST_TRIES} tries, but every time a process was lost")
        self._learn(self._attempt.times_s)
        sent_to = self._members.sent_to - sent_before
        result = StepResult(
            loss=self._attempt.loss,
            step=self.num_steps,
            step_time_s=time.perf_counter() - start_s,
            num_samples=self._num_rows,
            bytes_sent=sum(sent_to.values()),
            grad_norm=self._attempt.norm,
            sent_to=dict(sent_to),
        )
        self._tell(result)
        if current.place == 0:  # one of them writes
            self._keeper.save_if_due(self.num_steps, self.source)
        return result

    def sync_to(self, model: nn.Module) -> None:
        """Copies the weights, which are the same on all processes, into `model`."""
        self._inner.sync_to(model)

    def source(self) -> Source:
        """What a checkpoint is written from, by this process alone."""
        return dataclasses.replace(self._inner.source(), step=self.num_steps)

    def load(self, folder: Folder | None = None, *, also: Also | None = None) -> None:
        """Continues from the latest checkpoint in `folder`; processes that have an older one receive the newest state
        within their next step."""
        loaded = self._keeper.load(folder, also)
        self._inner.take_loaded(loaded)
        self._members.step = loaded.step

    # One try ---------------------------------------------------------------------------------------------------------

    def _compute(self, batch: Any, current: Round) -> None:
        """The gradients of this process' pieces; the last one's update adds them up over all and votes (`_due`)."""
        counts = self._dealer.counts
        own = counts[current.place] if current.place is not None else 0
        first = sum(counts[: current.place]) if current.place is not None else 0
        self._attempt = _Attempt(num_own=own, current=current)
        if not own and self._trained and self.num_steps % MEASURED_EVERY:
            self._look_on()
            return
        for number in range(max(own, 1)):  # whoever has none shows which parameters have gradients, and its speed
            start_s = time.perf_counter()
            is_last = number + 1 >= own
            self._attempt.start_s = start_s
            result = self._inner(self._pieces(batch, first + number), update=is_last)
            if not is_last:
                self._attempt.own_loss += result.loss
                self._attempt.spent_s += time.perf_counter() - start_s

    def _look_on(self) -> None:
        """A step without pieces of its own."""
        parameters = dict(self._setup.model.named_parameters())
        with torch.no_grad():
            found = self._due({name: torch.zeros_like(parameters[name]) for name in self._trained}, 0.0)
        for gradients in found:
            apply_gradients(self._setup.optimizer, parameters, gradients, self._setup.decay)

    def _due(self, gradients: Gradients, loss: float) -> list[Gradients]:
        """Adds up the gradients, loss and buffers of all pieces, and gives them to the optimizer if the step counts."""
        made = self._attempt
        assert made.current is not None
        self._trained = tuple(gradients)
        num, place = made.current.num, made.current.place
        values = [*gradients.values(), *self._buffers]
        flat = torch.cat([flat_of(values), torch.zeros(1 + num)])
        body, told = flat[: -1 - num], flat[-1 - num :]
        num_trained = sum(value.numel() for value in gradients.values())
        if made.num_own and place is not None:
            body[:num_trained] /= self._num_pieces
            body[num_trained:] *= made.num_own / self._num_pieces
            told[0] = (made.own_loss + loss) / self._num_pieces
        else:
            flat.zero_()
        if made.start_s and place is not None:
            told[1 + place] = (made.spent_s + time.perf_counter() - made.start_s) / max(made.num_own, 1)
        self._members.sum(flat)
        made.loss, made.times_s = float(told[0]), told[1:].tolist()
        made.is_whole = self._members.is_whole()
        made.norm = self._clip(body[:num_trained])
        made.committed = self._members.vote(made.is_finite or self._setup.check_finite == "off")
        if not made.committed:
            return []
        pieces = unflat(body, values)
        for buffer, mean in zip(self._buffers, pieces[len(gradients) :], strict=True):
            buffer.copy_(mean)
        return [dict(zip(gradients, pieces[: len(gradients)], strict=True))]

    def _clip(self, gradients: Tensor) -> float | None:
        """Clips the sum over all pieces in place, as `torch.nn.utils.clip_grad_norm_` does; the norm before."""
        if self._setup.clip_norm is None:
            return None
        norm = float(torch.linalg.vector_norm(gradients))
        gradients *= clip_factor(norm, self._setup.clip_norm)
        return norm

    def _state_for_peers(self) -> dict[str, Any]:
        """What whoever comes in must have. Called while the step waits for its quorum."""
        return {
            "model": self._setup.model.state_dict(),
            "optimizer": self._setup.optimizer.state_dict(),
            "random": random_state(),
        }

    def _load_state_of_peer(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            own = self._setup.model.state_dict()
            for name, value in state["model"].items():
                own[name].copy_(value)
        self._setup.optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"])


@dataclasses.dataclass
class _Attempt:
    """What one try of a step has come to."""

    num_own: int = 0
    current: Round | None = None
    own_loss: float = 0.0  # sum over this process' pieces but the last
    start_s: float = 0.0
    spent_s: float = 0.0
    loss: float = math.nan
    times_s: list[float] = dataclasses.field(default_factory=list)
    is_whole: bool = False
    committed: bool = False
    norm: float | None = None  # of the gradients of all pieces, where it is asked for

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and (self.norm is None or math.isfinite(self.norm))


class _Volatile:
    """What computing gradients changes: buffers and random states."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(value, value.detach().clone()) for value in model.buffers()]
        self._random = torch.get_rng_state()

    def restore(self) -> None:
        with torch.no_grad():
            for value, before in self._buffers:
                value.copy_(before)
        torch.set_rng_state(self._random)

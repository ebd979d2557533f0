"""Local SGD, DiLoCo and Streaming DiLoCo among processes that come, go and crash.

Every process trains for itself for H steps, on its pieces of every batch. Then those that are there form a quorum, add
up their outer gradients, weighted by the rows that they have trained on, and vote. If one is lost meanwhile, nothing
has moved, and the others agree again without it: what is lost is its window of at most H steps. Whoever comes in, or
was away, receives what was agreed on, the outer momentum, the step count and an optimizer's state from one of the
others, when they agree next.

Outer gradients may be compressed. What that leaves out (error feedback) belongs to a process and goes on with it,
whoever the others are: if it dies that is lost, and whoever comes in, or was behind, starts without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import InputError, PeerLostError, StepError
from partita.training.checkpoint.saver import Saving, Source
from partita.training.elastic_around import MOST_TRIES, ElasticAround
from partita.training.elastic_fragments import Fragment, Fragments, OuterMethod
from partita.training.keeping import Also, Folder
from partita.training.membership import Elastic, Round
from partita.training.quorum_line import QuorumLine
from partita.training.setup import StepResult, StepSetup
from partita.training.step import Step
from partita.training.sync.exact import Exact
from partita.training.sync.method import flat_of, unflat
from partita.training.sync.outer import LocalSGD, StreamingDiLoCo


def check_elastic_method(method: object) -> None:
    """Raise `InputError` unless processes that come and go can be synchronised by the method."""
    if isinstance(method, Exact):
        return
    if not isinstance(method, OuterMethod):
        raise InputError(
            "elastic training is exact, or by replicas that agree now and then, sync=partita.sync.LocalSGD(...), "
            f"DiLoCo(...) or StreamingDiLoCo(delay=0, ...), but got {method!r}"
        )
    if not method.compress.keeps_its_own:
        raise InputError(
            "what compresses elastic replicas' outer gradients must keep nothing that all have alike, since processes "
            f"come and go: use compress=partita.sync.Rounded(...) or TopK(...), but got {method.compress!r}"
        )
    if isinstance(method, StreamingDiLoCo) and method.delay:
        raise InputError(
            "elastic replicas wait for each exchange, since it counts only once all have voted: pass delay=0, but got "
            f"{method.delay}"
        )
    if isinstance(method, LocalSGD) and method.after:
        raise InputError(f"elastic replicas train apart from the beginning: leave after out, but got {method.after}")


class ElasticReplicas(ElasticAround):
    """Trains one replica, and agrees with whoever is there: ``result = step(batch)``, as any `Step`.

    `result.loss` is that of the replica's own rows; in the first call of a process that comes later, which trains
    nothing, it is the others' mean. `sync_to` and checkpoints give what replicas have agreed on last, and checkpoints
    the error feedback of the process that writes; of those that resume from one the first keeps it.

    All members of a quorum apply the same outer step, bit for bit. One that broke off has moved nothing, and is tried
    again with those that live. `result.sent_to` and `bytes_sent` count what this process sent in the step, by place in
    the quorum: a fragment by its method's formula (`sent_bytes` with as many peers as the quorum has members), and two
    exact sums, of 3 numbers and one a process before it, and of the buffers and one number after it.

    Args:
        setup: of this process alone.
        settings: of the job.
        method: how replicas agree.
        batch: a global batch.
        make: makes the inner step from a setup and its part of a batch.
    """

    def __init__(
        self,
        setup: StepSetup,
        settings: Elastic,
        method: OuterMethod,
        batch: Any,
        make: Callable[[StepSetup, Any], Step],
    ) -> None:
        super().__init__(setup, settings, batch, method)
        named = {name: value.detach() for name, value in setup.model.named_parameters() if value.requires_grad}
        self._fragments = Fragments(method, named)
        self._buffers = [value for value in setup.model.buffers() if value.is_floating_point()]
        self._num_steps = self._agreed_step = 0
        self._has_joined = self._has_resumed = False
        self._window = _Window()
        inner = dataclasses.replace(setup, checkpoints=None, tells=False)
        self._inner = make(inner, self._pieces(batch, 0, max(self._num_pieces // settings.min_replicas, 1)))
        self._join(self._state_for_peers, self._load_state_of_peer)

    # As any step -----------------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def __call__(self, batch: Any, *, update: bool = True) -> StepResult:
        """Trains one step on this replica's pieces of the global batch; after every H of them all agree.

        Raises:
            InputError: the batch has other rows than the first one.
            StepError: processes were lost in all of many tries.
            NonFiniteLossError: the loss is NaN or infinite; nothing was updated.
            StepError: the lighthouse is gone.
        """
        start_s = time.perf_counter()
        self._check(batch, update)
        if not self._has_joined:
            before = self._num_steps
            told = self._agree()
            self._has_joined = True
            if self._num_steps != before:  # it was behind: the batch is not the next one
                return self._result(told.loss, start_s, told)
        assert self._round is not None
        place = self._round.place or 0
        counts = [max(count, 1) for count in self._dealer.counts]
        result = self._inner(self._pieces(batch, sum(counts[:place]), counts[place]))
        self._num_steps += 1
        self._window.add(result, counts[place], time.perf_counter() - start_s)
        self._fragments.count(counts[place])
        is_due = self._num_steps >= self._fragments.next(self._agreed_step)[0]
        return self._result(result.loss, start_s, self._agree() if is_due else _Told(), result.grad_norm)

    def sync_to(self, model: nn.Module) -> None:
        """Copies what replicas have agreed on last into `model`, and this replica's buffers."""
        if model is self._setup.model:
            self._fragments.take()
        with self._as_agreed():
            self._inner.sync_to(model)

    def source(self) -> Source:
        """What a checkpoint is written from, by this process alone."""
        source = dataclasses.replace(self._inner.source(), step=self._agreed_step)
        return dataclasses.replace(source, sync={"replica": self._fragments.state()})

    def save(self, folder: Folder | None = None, *, also: Also | None = None) -> str:
        """Writes a checkpoint of what replicas have agreed on last."""
        with self._as_agreed():
            return super().save(folder, also=also)

    def save_async(self, folder: Folder | None = None, *, also: Also | None = None) -> Saving:
        """As `save`, in the background."""
        with self._as_agreed():
            return super().save_async(folder, also=also)

    def load(self, folder: Folder | None = None, *, also: Also | None = None) -> None:
        """Continues from the latest checkpoint in `folder`; processes that have an older one receive the newest state
        when they agree next."""
        loaded = self._keeper.load(folder, also)
        self._inner.take_loaded(dataclasses.replace(loaded, sync={}))
        with torch.no_grad():
            self._fragments.resume(loaded.sync.get("replica"))
        self._has_resumed = True
        self._start_window(loaded.step)

    # Agreements ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _agree(self) -> _Told:
        """Moves what is agreed on by the outer gradient of all that are there, and goes on from it."""
        before = Counter(self._members.sent_to)
        lost: PeerLostError | None = None
        for _ in range(MOST_TRIES):
            current = self._gather()
            due, fragment = self._fragments.next(self._members.step)
            found, lost = self._attempt(current, fragment)
            if self._members.vote():
                break
        else:
            raise StepError(
                f"replicas must agree within {MOST_TRIES} tries, but every time a process was lost"
            ) from lost
        assert found is not None  # else the vote has failed
        if found.has_trained:
            fragment.commit(found.outer)
            for buffer, mean in zip(self._buffers, found.buffers, strict=True):
                buffer.copy_(mean)
            self._learn(found.times_s)
            self._num_steps = due
        self._has_resumed = False
        since = self._agreed_step
        self._start_window(self._num_steps)
        if current.place == 0 and found.has_trained:  # one of them writes
            with self._as_agreed():
                self._keeper.save_if_due(self._num_steps, self.source, since=since)
        return _Told(found.loss, self._members.sent_to - before, fragment.sums.error)

    def _attempt(self, current: Round, fragment: Fragment) -> tuple[_Attempt | None, PeerLostError | None]:
        """What would be agreed on, or that a process was lost, of which the vote will tell. Nothing has moved."""
        if current.place is None or (self._has_resumed and current.place):
            self._fragments.forget()  # the errors of a checkpoint are those of one process
        try:
            return self._exchange(current, fragment, self._members.line()), None
        except PeerLostError as error:
            self._members.give_up(error)
            return None, error

    def _exchange(self, current: Round, fragment: Fragment, line: QuorumLine) -> _Attempt:
        """First who has trained on how much, then the outer gradient by its method, then buffers: nobody has those
        before all have the outer gradient. Whoever was behind adds nothing."""
        window, facts = self._window, torch.zeros(3 + current.num)
        own = fragment.num_pieces if current.place is not None and window.num_steps else 0
        if own:
            facts[:3] = torch.tensor([own, window.num_pieces, window.loss])
            facts[3 + (current.place or 0)] = window.time_s / window.num_pieces
        line.all_reduce(facts)
        num_pieces, num_in_window, loss, *times_s = facts.tolist()
        if not num_pieces:
            return _Attempt()
        share = own / num_pieces
        outer = fragment.attempt(share, line.peers, line)
        flat = flat_of([*self._buffers, torch.ones(())]).mul_(share)
        line.all_reduce(flat)
        return _Attempt(outer, unflat(flat[:-1], self._buffers), loss / num_in_window, times_s)

    def _start_window(self, step: int) -> None:
        """All have agreed after so many steps. torchft knows who is behind by the number."""
        self._num_steps = self._agreed_step = self._members.step = step
        self._window = _Window()

    @contextlib.contextmanager
    def _as_agreed(self) -> Iterator[None]:
        """Meanwhile the model has the weights that were agreed on last."""
        with torch.no_grad():
            own = [value.clone() for value in self._fragments.values]
            self._fragments.take()
            try:
                yield
            finally:
                for value, before in zip(self._fragments.values, own, strict=True):
                    value.copy_(before)

    def _result(self, loss: float, start_s: float, told: _Told, norm: float | None = None) -> StepResult:
        result = StepResult(
            loss=loss,
            step=self._num_steps,
            step_time_s=time.perf_counter() - start_s,
            num_samples=self._num_rows,
            bytes_sent=sum(told.sent_to.values()),
            grad_norm=norm,
            compression_error=told.error,
            sent_to=dict(told.sent_to),
        )
        self._tell(result)
        return result

    # States ----------------------------------------------------------------------------------------------------------

    def _state_for_peers(self) -> dict[str, Any]:
        """What whoever comes in must have. Called while this replica waits for its quorum."""
        return {
            "outer": self._fragments.agreed(),
            "buffers": list(self._setup.model.buffers()),
            "optimizer": self._setup.optimizer.state_dict(),
            "num_steps": self._num_steps,
        }

    @torch.no_grad()
    def _load_state_of_peer(self, state: dict[str, Any]) -> None:
        self._fragments.resume(state["outer"])
        self._fragments.take()
        for buffer, value in zip(self._setup.model.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)
        self._setup.optimizer.load_state_dict(state["optimizer"])
        self._num_steps = int(state["num_steps"])


@dataclasses.dataclass
class _Window:
    """What a replica has trained since all agreed: pieces, the sum of their losses, and seconds."""

    num_steps: int = 0
    num_pieces: int = 0
    loss: float = 0.0
    time_s: float = 0.0

    def add(self, result: StepResult, num_pieces: int, time_s: float) -> None:
        self.num_steps += 1
        self.num_pieces += num_pieces
        self.loss += result.loss * num_pieces
        self.time_s += time_s


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What would be agreed on: the outer gradient and the mean buffers; the mean loss of the window, and times."""

    outer: list[Tensor] = dataclasses.field(default_factory=list)
    buffers: list[Tensor] = dataclasses.field(default_factory=list)
    loss: float = math.nan
    times_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def has_trained(self) -> bool:
        """Whether any replica has."""
        return bool(self.times_s)


@dataclasses.dataclass(frozen=True)
class _Told:
    """What an agreement has told: the mean loss of the window, bytes that this process sent by receiver, and the share
    of the outer gradient that was not sent."""

    loss: float = math.nan
    sent_to: Mapping[int, int] = dataclasses.field(default_factory=dict)
    error: float = 0.0

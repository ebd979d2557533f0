"""A training step of replicas: every process trains by a plan of its own, and a method brings them together."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from partita.cluster import Cluster
from partita.cluster.model import Process
from partita.errors import InputError
from partita.training.around import StepAround
from partita.training.balance import expected_s
from partita.training.checkpoint.contents import Ownership
from partita.training.checkpoint.saver import Source
from partita.training.exchanges import Exchanges
from partita.training.inputs import cut_rows, take_apart
from partita.training.job import Team
from partita.training.keeping import Also, Folder
from partita.training.loading import ShardedBatch, whole_shape
from partita.training.replica_balance import ReplicaBalance
from partita.training.runner import apply_gradients
from partita.training.setup import StepResult, StepSetup
from partita.training.step import Step
from partita.training.sync.method import Peers
from partita.training.sync.replica import Gradients, Replica, ReplicaMethod, ReplicaSync
from partita.units import split_evenly

MakeInner = Callable[[StepSetup, Any], Step]  # from the setup and a batch of the inner step


def own_cluster(cluster: Cluster, rank: int) -> Cluster:
    """The part of a job that one process has, as a cluster of that process alone."""
    own = next(process for process in cluster.processes if process.rank == rank)
    alone = Process(rank=0, machine=0, cores=own.cores, gpus=own.gpus, memory_bytes=own.memory_bytes)
    return Cluster(
        machines=(cluster.machines[own.machine],),
        processes=(alone,),
        network=cluster.network,
        process_link=cluster.process_link,
        is_here=cluster.is_here,
    )


class ReplicatedStep(StepAround):
    """Trains one replica of the model on its rows of every global batch: ``result = step(batch)``, as any `Step`.

    ``result.loss`` is that of the replica's own rows. Weights differ between replicas until `sync_to` or `save`.

    Args:
        setup: of the whole job.
        method: how replicas are brought together.
        batch: a global batch.
        make: makes the inner step.
    """

    def __init__(self, setup: StepSetup, method: ReplicaMethod, batch: Any, make: MakeInner) -> None:
        assert setup.transport is not None
        self._setup, self._method, self._make_inner = setup, method, make
        self._rank, self._num_replicas = setup.team.rank, setup.team.num_processes
        self._exchanges = Exchanges(setup.transport, setup.timeout_s, "replicas")
        self._keeper = setup.keeper(method)
        self._sync: ReplicaSync | None = None
        self._replica: Replica | None = None
        self._rows: ReplicaBalance | None = None
        self._waited_s = 0.0  # for others, in this step
        self._last: Any = None  # batch
        together = dataclasses.replace(setup, checkpoints=None, tells=False)  # the inner step is nobody's
        self._inner = make(together, batch) if method.exact_steps else self._apart(batch)
        self._num_steps = 0

    # As any step -----------------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def bytes_sent(self) -> int:
        """What this process has sent to other replicas so far, between steps as well."""
        return self._exchanges.bytes_sent

    def __call__(self, batch: Any, *, update: bool = True) -> StepResult:
        start_s, sent, sent_to = time.perf_counter(), self._exchanges.bytes_sent, self._exchanges.sent_to
        if self._sync is None and self._num_steps >= self._method.exact_steps:
            self._inner.sync_to(self._setup.model)
            self._inner.close()
            self._inner = self._apart(batch)
        result = self._computed(batch, update)
        self._num_steps += update
        if self._sync is not None and update:
            with torch.no_grad():
                self._sync.after_step(self._num_steps)
            self._deal_rows(batch)
        result = dataclasses.replace(
            result,
            step=self._num_steps,
            step_time_s=time.perf_counter() - start_s,
            bytes_sent=result.bytes_sent + self._exchanges.bytes_sent - sent,
            sent_to=Counter(result.sent_to) + (self._exchanges.sent_to - sent_to),
            compression_error=self._sync.error if self._sync is not None else result.compression_error,
            staleness=self._sync.staleness if self._sync is not None else 0,
        )
        self._tell(result)
        if update:
            self._keeper.save_if_due(self._num_steps, self.source)
        return result

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        """First and last (excluded) row of a global batch that this replica trains on."""
        if self._sync is None:
            first, last = self._inner.rows_needed(num_rows)
            counts = split_evenly(num_rows, self._num_replicas)  # of this step, if it is the first one apart
            start = sum(counts[: self._rank])
            return min(first, start), max(last, start + counts[self._rank])
        assert self._rows is not None
        self._check_rows(num_rows)
        return self._rows.rows_needed(num_rows)

    def sync_to(self, model: nn.Module) -> None:
        """Copies what the replicas would agree on now, the mean of their weights, into `model`, on every process.
        Training goes on from the replicas' own weights, unless `model` is the trained one."""
        if self._sync is None:
            self._inner.sync_to(model)
            return
        self._settle()
        own = model is self._setup.model
        before = None if own else [value.detach().clone() for value in self._setup.model.state_dict().values()]
        with torch.no_grad():
            self._sync.equalise()
            self._inner.sync_to(model)
            if before is not None:
                for value, kept in zip(self._setup.model.state_dict().values(), before, strict=True):
                    value.copy_(kept)

    def source(self) -> Source:
        """What a checkpoint is written from: what the replicas agree on now, the mean of their weights, from which all
        go on; and of each replica the optimizer's state and the method's."""
        if self._sync is None:
            return dataclasses.replace(self._inner.source(), step=self._num_steps)
        self._settle()
        with torch.no_grad():
            self._sync.equalise()
        setup, everyone = self._setup, tuple(range(self._num_replicas))
        names = [*dict(setup.model.named_parameters()), *dict(setup.model.named_buffers())]
        return dataclasses.replace(
            self._inner.source(),
            step=self._num_steps,
            ownership=lambda: Ownership(num_processes=len(everyone), owners=dict.fromkeys(names, everyone)),
            collect=lambda: None,  # every replica has everything
            own_optimizer=True,
            sync={"replica": self._sync.state()},
        )

    def load(self, folder: Folder | None = None, *, also: Also | None = None) -> None:
        """Continues from the latest checkpoint in `folder` that is as it was written, of whatever plan, method and
        number of processes. Replicas go on with states of their own if as many were saved by the same method.

        Raises:
            CheckpointError: none is complete and undamaged, or it belongs to another model or optimizer. Nothing was
                changed.
        """
        if self._sync is not None:
            self._settle()
        loaded = self._keeper.load(folder, also)
        self._inner.take_loaded(dataclasses.replace(loaded, sync={}))
        self._num_steps = loaded.step
        if self._sync is not None:
            with torch.no_grad():
                self._sync.resume(loaded.sync.get("replica"))

    def close(self) -> None:
        """Ends the workers, and completes a checkpoint that is being written. The model and optimizer keep what this
        replica has trained."""
        self._keeper.close()
        self._inner.close()
        self._exchanges.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _computed(self, batch: Any, update: bool) -> StepResult:
        """This replica's part of a step."""
        if self._sync is None:
            return self._inner(batch, update=update)
        assert self._rows is not None
        own = self._own_rows(batch)
        self._waited_s, start_s = 0.0, time.perf_counter()
        result = self._inner(own, update=update)
        if self._is_usual(batch):
            self._rows.made_step(time.perf_counter() - start_s - self._waited_s)
        return result

    def _deal_rows(self, batch: Any) -> None:
        """Rows follow the speed of the replicas."""
        balance, replica = self._rows, self._replica
        assert balance is not None and replica is not None
        self._last = batch
        if balance.after_step(self._num_steps, self._inner.is_settled):
            replica.share = balance.counts[self._rank] / sum(balance.counts)

    def _prepare_rows(self, num_rows: int) -> None:
        """Makes the inner step ready for batches of so many rows."""
        whole, _ = whole_shape(ShardedBatch(self._own_rows(self._last), 0, num_rows))
        self._inner.prepare(whole)

    def _apart(self, batch: Any) -> Step:
        """The inner step of this replica alone."""
        setup = self._setup
        named = {name: value for name, value in setup.model.named_parameters() if value.requires_grad}
        buffers = {name: value for name, value in setup.model.named_buffers() if value.is_floating_point()}
        num_rows = _rows_in(batch)
        self._check_rows(num_rows)
        self._rows = ReplicaBalance(
            num_rows,
            rank=self._rank,
            num_replicas=self._num_replicas,
            meets_every=self._method.meets_every,
            cluster=setup.cluster,
            errand=self._exchanges.errand,
            prepare=self._prepare_rows,
            is_prepared=lambda: self._inner.is_prepared,
            expected_s=lambda: expected_s(self._inner.plan),
            moves=setup.shares_move and self._method.weighs_rows,
        )
        start, end = self._rows.rows(num_rows, self._rank)
        self._replica = Replica(
            parameters={name: value.detach() for name, value in named.items()},
            buffers=buffers,
            peers=Peers(tuple(range(self._num_replicas)), self._rank),
            share=(end - start) / num_rows,
            line=self._exchanges.line,
            errand=self._exchanges.errand,
        )
        self._sync = self._method.sync_of(self._replica)
        alone = dataclasses.replace(
            setup,
            cluster=own_cluster(setup.cluster, self._rank),
            team=Team(),
            transport=None,
            sync=None,
            checkpoints=None,
            tells=False,
            due=self._due if self._sync.takes_gradients else None,
        )
        with setup.team.working_alone():
            inner = self._make_inner(alone, self._own_rows(batch))
            setup.team.meet("the start of replicas")  # some plan for longer than an exchange may wait for them
        return inner

    def _due(self, gradients: Gradients, loss: float) -> list[Gradients]:
        assert self._sync is not None
        start_s = time.perf_counter()
        found = self._sync.due(gradients)
        self._waited_s += time.perf_counter() - start_s
        return found

    def _check_rows(self, num_rows: int) -> None:
        if num_rows < self._num_replicas:
            raise InputError(
                f"every batch must have at least a row for each of {self._num_replicas} replicas, but got {num_rows} "
                "rows; use larger batches, or drop the last one (drop_last=True)"
            )

    def _is_usual(self, batch: Any) -> bool:
        assert self._rows is not None
        return _rows_in(batch) == sum(self._rows.counts)

    def _own_rows(self, batch: Any) -> Any:
        """The rows of a global batch that this replica trains on."""
        assert self._rows is not None
        first, num_rows = 0, _rows_in(batch)
        self._check_rows(num_rows)
        if isinstance(batch, ShardedBatch):
            batch, first = batch.batch, batch.first_row
        here = take_apart(batch).rows
        start, end = self._rows.rows(num_rows, self._rank)
        if start < first or end > first + here:
            raise InputError(
                f"this replica needs rows {start} to {end} of the batch, but rows {first} to {first + here} were read: "
                "the rows were dealt anew since. Do not read batches many steps ahead"
            )
        return cut_rows(batch, here, start - first, end - first)

    def _settle(self) -> None:
        """Applies what is still on its way."""
        assert self._sync is not None
        parameters = dict(self._setup.model.named_parameters())
        for gradients in self._sync.settle():
            apply_gradients(self._setup.optimizer, parameters, gradients, self._setup.decay)


def _rows_in(batch: Any) -> int:
    """Of a global batch, or of the one that rows were read of."""
    return batch.num_rows if isinstance(batch, ShardedBatch) else take_apart(batch).rows

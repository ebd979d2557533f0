"""Ways to train a task on one process of several: partita, plain PyTorch, and peers.

Every way starts from the weights of the task's seed and trains on the same global batches. Data-parallel peers train on
their own rows; the mean of their losses is that of the batch, since the processes divide its rows evenly.

Peers have the settings that serve them best here: DDP and its hooks have one bucket (with more of them PowerSGD's hook
aborts on gloo). torchft's DiLoCo exchanges parameter by parameter: with buckets, and more than one of them, it skips
parameters. It has the outer learning rate and momentum that partita has. Its lighthouse looks for a quorum every 10 ms.
Of hivemind the averager is used, which takes the mean of the weights every H steps (local SGD): its `Optimizer` decides
by the clock when to average, so that equal runs differ.
"""

from __future__ import annotations

import abc
import ast
import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from benchmarks.common import Row
from benchmarks.ddp_hooks import register_hook
from benchmarks.method_tasks import Batch, Task, loss_of

LIMIT = timedelta(seconds=60)
HOOK_RANK = 4
MATCHMAKING_S = 1.0  # hivemind advises 3 to 5 s for small local runs; it begins once the group is complete
OUTER = {"lr": 0.7, "momentum": 0.5, "nesterov": True}  # partita's for 10 to 99 steps


class Trainer(abc.ABC):
    """`every`: steps after which what it does begins anew."""

    every = 1

    @abc.abstractmethod
    def step(self, batch: Batch) -> float:
        """Trains on a global batch, and gives the loss of the rows that this process is answerable for."""

    @abc.abstractmethod
    def merged(self) -> Any:
        """The model that the processes agree on now; all of them call it, and training goes on as if they had not."""

    @property
    def is_settled(self) -> bool:
        """Whether steps go on as they are now."""
        return True

    def sent(self) -> int | None:
        """Bytes that this process has sent so far; None where the way does not count them."""
        return None

    def facts(self) -> Row:
        """What else is worth knowing, once it is settled."""
        return {}

    @abc.abstractmethod
    def close(self) -> None: ...


# partita -------------------------------------------------------------------------------------------------------------


class Partita(Trainer):
    """A method by its name, or written out as `repr` tells it, with the processes side by side; or "auto exact" and
    "auto equivalent-loss", which choose both the method and the plan."""

    def __init__(self, task: Task, name: str, seed: int, num: int) -> None:
        import partita
        from benchmarks.method_entries import entries

        self._model, self._merged = task.model(seed), task.model(seed)
        self._method: Any = None
        self._num, self._total = num, 0
        first = next(task.batches(seed, num))
        if name.startswith("auto "):
            optimizer = task.optimizer(self._model)
            options: Row = {"sync": "auto", "tolerance": name.removeprefix("auto ")}
        else:
            if name.endswith(")"):
                optimizer = task.optimizer(self._model)
                self._method = method_of(name)
            else:
                entry = entries(task.name)[name]
                assert entry.make is not None
                optimizer = task.optimizer(self._model, momentum=entry.momentum, name=entry.optimizer, lr=entry.lr)
                self._method = entry.make()
            data = num if isinstance(self._method, partita.sync.GradientMethod) else 1
            options = {"sync": self._method, "plan": _side_by_side(data)}
        self._step = partita.parallelize(self._model, optimizer, loss_of, first, **options)
        self._chosen = self._step.choice.method if self._method is None else self._method
        self.every = getattr(self._chosen, "every", 1)

    def step(self, batch: Batch) -> float:
        result = self._step(batch)
        self._total += result.bytes_sent
        return float(result.loss)

    def merged(self) -> Any:
        self._step.sync_to(self._merged)
        return self._merged

    @property
    def is_settled(self) -> bool:
        return self._step.is_settled

    def sent(self) -> int | None:
        """Replicas send between steps as well."""
        return getattr(self._step, "bytes_sent", self._total)

    def facts(self) -> Row:
        plan = self._step.plan
        told = f"{plan.mode}{' compiled' if plan.compiled else ''} {plan.axes} x{plan.num_microbatches}"
        facts: Row = {"plan": told, "method": repr(self._chosen)}
        if self._method is None:
            return {**facts, "why": self._step.choice.explain(), "reasons": list(plan.reasons)}
        return {**facts, **_formulas(self._step, self._method, self._model, self._num)}

    def close(self) -> None:
        self._step.close()


def method_of(told: str) -> Any:
    """The method that `repr` told: names of `partita.sync`, called with settings by name.

    Example:
        >>> method_of("DiLoCo(every=20, compress=Rounded(to='int4'))").every
        20
    """
    import partita

    def value(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        assert isinstance(node.func, ast.Name), f"a method must be told by names of partita.sync, but got {told!r}"
        return getattr(partita.sync, node.func.id)(**{str(item.arg): value(item.value) for item in node.keywords})

    return value(ast.parse(told, mode="eval").body)


def _side_by_side(data: int) -> Any:
    import partita

    return partita.Constraints(data=data, pipeline=1, threads_per_worker=1, num_microbatches=1, compiled=False)


def _formulas(step: Any, method: Any, model: Any, num: int) -> Row:
    """Bytes a step, and of the step with the most, by the method's own formulas."""
    import partita
    from benchmarks.method_entries import formula, parts_of_model, sums_of
    from partita.training.replica_balance import told_bytes
    from partita.training.sync.method import Peers

    rank, every = int(os.environ["RANK"]), getattr(method, "every", 1)
    together = isinstance(method, partita.sync.GradientMethod)
    sums = sums_of(step, model) if together else [parts_of_model(model)]
    mean = formula(method, sums, num, rank, every)
    if isinstance(method, partita.sync.StreamingDiLoCo):
        peak = method.peak_bytes(sums[0], Peers(tuple(range(num)), rank))
        return {"formula": mean, "peak_formula": peak + told_bytes(num)}
    told = 0 if together else told_bytes(num)  # in some synchronisations, so that the mean does not show it
    return {"formula": mean, "peak_formula": mean * every + told}


# Plain PyTorch, and what is around it --------------------------------------------------------------------------------


def _update(model: Any, optimizer: Any, batch: Batch) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _own_rows(batch: Batch) -> Batch:
    import torch.distributed as dist

    rank, num = dist.get_rank(), dist.get_world_size()
    return batch[0].tensor_split(num)[rank], batch[1].tensor_split(num)[rank]


def _join() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LIMIT)


def _to_mean(model: Any, merged: Any) -> Any:
    """Copies the mean of the processes' weights into `merged`."""
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for own, mean in zip(model.parameters(), merged.parameters(), strict=True):
            mean.copy_(own)
            dist.all_reduce(mean)
            mean.div_(dist.get_world_size())
    return merged


class Plain(Trainer):
    """One process trains on the whole batch, the others have nothing to do."""

    def __init__(self, task: Task, name: str, seed: int, num: int) -> None:
        self._model = task.model(seed)
        self._optimizer = task.optimizer(self._model)
        self._trains = os.environ["RANK"] == "0"

    def step(self, batch: Batch) -> float:
        return _update(self._model, self._optimizer, batch) if self._trains else 0.0

    def merged(self) -> Any:
        return self._model

    def close(self) -> None:
        """Nothing is open."""


class Ddp(Trainer):
    """DistributedDataParallel, "ddp" or with a hook: "ddp powersgd"."""

    def __init__(self, task: Task, name: str, seed: int, num: int) -> None:
        from torch.nn.parallel import DistributedDataParallel

        _join()
        self._model = task.model(seed)
        self._optimizer = task.optimizer(self._model)
        self._wrapped = DistributedDataParallel(self._model, gradient_as_bucket_view=True, bucket_cap_mb=1000)
        register_hook(self._wrapped, name.removeprefix("ddp").strip(), HOOK_RANK)

    def step(self, batch: Batch) -> float:
        return _update(self._wrapped, self._optimizer, _own_rows(batch))

    def merged(self) -> Any:
        return self._model

    def close(self) -> None:
        """The process group is that of all ways of this process."""


class TorchFt(Trainer):
    """torchft's DiLoCo, "torchft diloco H=20": a manager for each process, the lighthouse on the first machine."""

    def __init__(self, task: Task, name: str, seed: int, num: int) -> None:
        import torch
        import torch.distributed as dist

        os.environ.setdefault("RUST_LOG", "error")  # its servers print every vote otherwise
        import logging

        import torchft
        from torchft.local_sgd import DiLoCo

        for logger in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        _join()
        self.every = int(name.partition("H=")[2])
        self._model, self._merged = task.model(seed), task.model(seed)
        self._optimizer = task.optimizer(self._model)
        host, rank = _own_host(), dist.get_rank()
        self._lighthouse = _lighthouse(host, num) if rank == 0 else None
        address = [self._lighthouse.address() if self._lighthouse else ""]
        dist.broadcast_object_list(address)
        stores: Any = dist
        self._store = stores.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=LIMIT),
            load_state_dict=self._model.load_state_dict,
            state_dict=self._model.state_dict,
            min_replica_size=num,
            use_async_quorum=False,
            timeout=LIMIT,
            quorum_timeout=LIMIT,
            connect_timeout=LIMIT,
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{address[0].rpartition(':')[2]}",
            replica_id=f"replica{rank}",
            hostname=host,
            heartbeat_interval=timedelta(seconds=5),  # waiting, it must not disturb the others
            init_sync=False,
        )
        outer = torch.optim.SGD(self._model.parameters(), **OUTER)
        self._open = contextlib.ExitStack()
        self._open.enter_context(DiLoCo(self._manager, [self._model], self._optimizer, outer, sync_every=self.every))

    def step(self, batch: Batch) -> float:
        return _update(self._model, self._optimizer, _own_rows(batch))

    def merged(self) -> Any:
        return _to_mean(self._model, self._merged)

    def facts(self) -> Row:
        return {"commits": self._manager.current_step()}

    def close(self) -> None:
        self._open.close()
        self._manager.shutdown(wait=False)
        if self._lighthouse is not None:
            self._lighthouse.shutdown()


def _lighthouse(host: str, num: int) -> Any:
    from torchft.coordination import LighthouseServer

    return LighthouseServer(
        bind=f"{host}:0", min_replicas=num, join_timeout_ms=60_000, quorum_tick_ms=10, heartbeat_timeout_ms=60_000
    )


class Hivemind(Trainer):
    """hivemind's averager, "hivemind H=50": the mean of the weights every so many steps."""

    def __init__(self, task: Task, name: str, seed: int, num: int) -> None:
        import hivemind
        import torch.distributed as dist

        _join()
        self.every = int(name.partition("H=")[2])
        self._model, self._merged = task.model(seed), task.model(seed)
        self._optimizer = task.optimizer(self._model)
        self._num_steps = 0
        first: list[Any] = [None]
        place = [f"/ip4/{_own_host()}/tcp/0"]
        if dist.get_rank() == 0:
            self._table = hivemind.DHT(host_maddrs=place, start=True)
            first = [[str(one) for one in self._table.get_visible_maddrs()]]
        dist.broadcast_object_list(first)
        if dist.get_rank():
            self._table = hivemind.DHT(host_maddrs=place, initial_peers=first[0], start=True)
        dist.barrier()
        self._averager = hivemind.averaging.DecentralizedAverager(
            [value.detach().clone() for value in self._model.parameters()],
            self._table,
            start=True,
            prefix=f"{task.name}_{seed}_{self.every}",
            target_group_size=num,
            min_group_size=num,
            min_matchmaking_time=MATCHMAKING_S,
            declare_state_period=300,
            allow_state_sharing=False,
        )
        dist.barrier()

    def step(self, batch: Batch) -> float:
        loss = _update(self._model, self._optimizer, _own_rows(batch))
        self._num_steps += 1
        if self._num_steps % self.every == 0:
            self._agree()
        return loss

    def _agree(self) -> None:
        import torch

        own = list(self._model.parameters())
        with torch.no_grad(), self._averager.get_tensors() as means:
            for mean, value in zip(means, own, strict=True):
                mean.copy_(value)
        if self._averager.step(timeout=LIMIT.total_seconds()) is None:
            raise RuntimeError(f"hivemind's averager found no group within {LIMIT.total_seconds():g} s")
        with torch.no_grad(), self._averager.get_tensors() as means:
            for mean, value in zip(means, own, strict=True):
                value.copy_(mean)

    def merged(self) -> Any:
        return _to_mean(self._model, self._merged)

    def close(self) -> None:
        self._averager.shutdown()
        self._table.shutdown()


def _own_host() -> str:
    """The address of this machine for the others: that by which the first one is reached."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((os.environ["MASTER_ADDR"], 9))
        return str(probe.getsockname()[0])


MAKERS: dict[str, Callable[[Task, str, int, int], Trainer]] = {
    "partita": Partita,
    "plain": Plain,
    "ddp": Ddp,
    "torchft": TorchFt,
    "hivemind": Hivemind,
}

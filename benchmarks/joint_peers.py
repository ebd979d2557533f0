"""What partita's search is compared with: usual ways to find a network for a deadline, made of Optuna and PyTorch.

They share the search's course: candidates are trained side by side on one core each, and the best one is continued on
all cores until the deadline, with the same decay of its rate. What differs is how candidates are proposed and judged:

random            random candidates, each trained for the same time
asha              Optuna's TPE, stopped early by its asynchronous successive halving over epochs, judged by the score
                  that they have
asha, then plan   the same, with the best plan that partita finds for the network that was chosen

The process of the first core makes the final training, so that nothing is imported twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin

import torch  # isort: skip
import optuna

from benchmarks.common import Row
from benchmarks.joint_task import Config, adam, data, loss_fn, network, suggest, test_loss
from benchmarks.processes import Message
from partita.search.training_run import decay, take_cores

EPOCH_ROWS = 1000
MOST_EPOCHS, FACTOR = 27, 3
NUM_IN_TURN = 4  # random candidates of one core
FINAL_SHARE = 0.4  # of the time, as partita's
JUDGED_TIMES = 20  # in the final training


class Training:
    """A candidate that is trained.

    Args:
        runs: a step of it; None: plain PyTorch.
    """

    def __init__(self, config: Config, seed: int) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.model = network(config)
        self.optimizer = adam(config, self.model)
        self.step: Any = None
        self._generator = torch.Generator().manual_seed(seed)
        (self._x, self._y), self._judged = data()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(0, len(self._x), (self.config.batch_size,), generator=self._generator)
        return self._x[chosen], self._y[chosen]

    def train(self, num_rows: float, end_s: float, *, before: Callable[[], None] = lambda: None) -> None:
        """Until so many rows were seen, or an instant has come."""
        seen = 0
        while seen < num_rows and time.time() < end_s:
            before()
            batch = self.batch()
            seen += self.config.batch_size
            if self.step is not None:
                self.step(batch)
                continue
            self.optimizer.zero_grad()
            loss_fn(self.model, batch).backward()
            self.optimizer.step()

    def judge(self) -> float:
        with torch.no_grad():
            score = float(loss_fn(self.model.eval(), self._judged))
        self.model.train()
        return score if score == score else float("inf")

    def save(self, path: Path) -> None:
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], path)

    def load(self, path: Path) -> None:
        model, optimizer = torch.load(path, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def explore(message: Message) -> Message:
    """One core's candidates until an instant: their numbers, values and scores."""
    take_cores([message["core"]])
    way, seed, end_s, folder = message["way"], message["seed"], message["end_s"], Path(message["folder"])
    study = _study(way, seed, folder)
    share_s = (end_s - time.time()) / NUM_IN_TURN
    found: list[Row] = []
    while time.time() < end_s:
        trial = study.ask()
        training = Training(suggest(trial), seed)
        if way == "random":
            training.train(float("inf"), min(end_s, time.time() + share_s))
            score = training.judge()
            study.tell(trial, score)
        else:
            score = _by_epochs(training, study, trial, end_s)
        training.save(folder / f"{trial.number}.pt")
        found.append({"number": trial.number, "params": trial.params, "score": score})
    return {"found": found}


def _study(way: str, seed: int, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))
    if way == "random":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR)
    return optuna.create_study(
        storage=storage, study_name="peer", sampler=sampler, pruner=pruner, direction="minimize", load_if_exists=True
    )


def _by_epochs(training: Training, study: optuna.Study, trial: optuna.Trial, end_s: float) -> float:
    score = float("inf")
    for epoch in range(1, MOST_EPOCHS + 1):
        training.train(EPOCH_ROWS, end_s)
        score = training.judge()
        if time.time() >= end_s:  # this epoch is not a whole one
            break
        trial.report(score, epoch)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return score
    study.tell(trial, score)
    return score


def finish(message: Message) -> Message:
    """Continues a candidate on all cores until an instant: the score of its best weights, and their loss in the
    test."""
    take_cores(message["cores"])
    begin_s, end_s, folder = time.time(), message["end_s"], Path(message["folder"])
    training = Training(Config.of(message["params"]), message["seed"] + 1)
    training.load(folder / f"{message['number']}.pt")
    if message["planned"]:
        training.step = partita.parallelize(training.model, training.optimizer, loss_fn, training.batch())
    best = message["score"]
    rate = training.config.learning_rate

    def set_rate() -> None:
        for group in training.optimizer.param_groups:
            group["lr"] = rate * decay(time.time(), begin_s, end_s)

    kept = {name: value.clone() for name, value in training.model.state_dict().items()}
    while time.time() < end_s:
        training.train(float("inf"), min(end_s, time.time() + (end_s - begin_s) / JUDGED_TIMES), before=set_rate)
        if training.step is not None:
            training.step.sync_to(training.model)
        score = training.judge()
        if score < best:
            best, kept = score, {name: value.clone() for name, value in training.model.state_dict().items()}
    plan = None if training.step is None else training.step.plan.hash
    if training.step is not None:
        training.step.close()
    training.model.load_state_dict(kept)
    return {"score": best, "test": test_loss(training.model), "plan": plan, "ended_s": time.time()}

"""The study: an Optuna study that holds everything a search must not lose.

Its storage is an SQLite file in the search's folder, or what the user names: another database that all machines reach
(``postgresql://...``), or Optuna's gRPC proxy of one (``grpc://host:port``). Where the storage knows heartbeats,
running trials have one; those of a search that is gone are failed by it, and its own earlier ones at once, when it
starts again.

Attributes of the study, each followed by its owner, because checkpoints lie in a search's folder: "search" (its
instants and aims), "final" (the candidate of the final training), "delivered". Of a trial: "owner", "candidate",
"record", "why".
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import socket
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from partita.errors import InputError, SearchError
from partita.search.candidates import Aims, Candidate, as_record, of_record
from partita.search.messages import Suggest, Suggested

HEARTBEAT_S, GRACE_S = 15, 60
STARTUP_TRIALS = 10  # random ones, before TPE knows enough
POPULATION = 20  # of NSGA-II: a search has some hundred trials, not thousands
_LOGGER = logging.getLogger("partita")


def open_storage(storage: str | BaseStorage | None, folder: Path) -> BaseStorage:
    """The storage that the user asks for; None: a file in the folder.

    Raises:
        InputError: it cannot be opened.
    """
    if isinstance(storage, BaseStorage):
        return storage
    url = f"sqlite:///{folder.resolve() / 'study.db'}" if storage is None else storage
    try:
        with _calm():
            if url.startswith("grpc://"):
                host, _, port = url.removeprefix("grpc://").rstrip("/").partition(":")
                return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13_000))
            options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
            return optuna.storages.RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S
            )
    except ImportError as error:
        raise InputError(
            f"the Python driver of {url!r} must be installed: pip install 'psycopg[binary]' for PostgreSQL, grpcio and "
            f"protobuf for grpc://, pymysql for mysql+pymysql:// ({error})"
        ) from error
    except Exception as error:
        raise InputError(
            f"storage must be a database that can be opened, such as sqlite:///study.db, postgresql://host/name or "
            f"grpc://host:port, but {url!r} cannot be: {type(error).__name__}: {error}"
        ) from error


def let_go(storage: BaseStorage) -> None:
    """Closes connections to a database, which are opened again where they are needed."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.engine.dispose()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Only one search at a time works in a folder. The lock goes with the process, however that ends.

    Raises:
        SearchError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SearchError(
                f"another search works in {str(folder)!r}: wait for it, or choose another folder"
            ) from error
        yield


class Study:
    """One search's view of its study; all that is written goes through here.

    Args:
        storage: where it is.
        name: of the study.
        owner: of the trials that this search runs.
        is_alone: nobody else writes to the storage.
    """

    def __init__(
        self, storage: BaseStorage, name: str, *, owner: str, aims: Aims, seed: int, is_alone: bool = False
    ) -> None:
        self._storage, self.owner, self._aims, self._is_alone = storage, owner, aims, is_alone
        with _calm():
            self.optuna = optuna.create_study(
                storage=storage, study_name=name, directions=aims.directions, load_if_exists=True
            )
        if [direction.name.lower() for direction in self.optuna.directions] != aims.directions:
            raise InputError(
                f"the study {name!r} must have been made for the same objectives, but it has other directions than "
                f"{aims.directions}; choose another folder or study"
            )
        num_before = len(self.optuna.get_trials(deepcopy=False))
        own_seed = seed + num_before  # not the same random suggestions once more
        self._random, self._learnt = optuna.samplers.RandomSampler(seed=own_seed), _sampler(aims, own_seed)
        self._ids: dict[int, int] = {}
        self._asked: dict[int, optuna.Trial] = {}
        self._seen: dict[int, float] = {}  # samples of the last point of its curve that a trial has

    # The search itself -----------------------------------------------------------------------------------------

    def read(self, name: str) -> Any:
        """What this search has noted; None: nothing."""
        return self.optuna.user_attrs.get(f"{name}:{self.owner}")

    def write(self, name: str, value: Any) -> None:
        """Notes something of this search."""
        self.optuna.set_user_attr(f"{name}:{self.owner}", value)

    # Trials ----------------------------------------------------------------------------------------------------

    def propose(self, *, learns: bool = True) -> int:
        """A new trial, which asks for its values later; its number. `learns`: values follow from earlier trials, once
        these are `STARTUP_TRIALS`; else they are random."""
        self.optuna.sampler = self._learnt if learns else self._random
        with _calm():
            trial = self.optuna.ask()
        self._asked[trial.number] = trial
        self._begin(trial.number, trial._trial_id)
        return trial.number

    def continued(self, candidate: Candidate) -> int:
        """A new trial that trains a candidate on; its number."""
        first = self._frozen(candidate.number)
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=first.params,
            distributions=first.distributions,
            user_attrs={"continues": candidate.number},
        )
        template.datetime_start = datetime.datetime.now()
        with _calm():
            trial_id = self._storage.create_new_trial(self.optuna._study_id, template)
        number = self._storage.get_trial_number_from_id(trial_id)
        self._seen[number] = candidate.points[-1].samples if candidate.points else -1.0
        self._begin(number, trial_id)
        return number

    def again(self, candidate: Candidate) -> None:
        """Queues what a candidate without a checkpoint was made of: the next proposal is made of it."""
        first = self._frozen(candidate.number)
        failures = {"failures": candidate.failures, "retries": candidate.number}
        self.optuna.enqueue_trial(first.params, user_attrs=failures)

    def _begin(self, number: int, trial_id: int) -> None:
        self._ids[number] = trial_id
        self._storage.set_trial_user_attr(trial_id, "owner", self.owner)
        self.beat(number)

    def failures(self, number: int) -> int:
        """How often what a proposed trial is made of has failed before."""
        return int(self._frozen(number).user_attrs.get("failures", 0))

    def suggest(self, number: int, question: Suggest) -> Suggested:
        """Answers what a trial asks."""
        suggest = getattr(self._asked[number], f"suggest_{question.kind}")
        try:
            with _calm():
                return Suggested(value=suggest(question.name, *question.arguments, **question.options))
        except (ValueError, TypeError) as error:
            return Suggested(error=f"trial.suggest_{question.kind}({question.name!r}, ...): {error}")

    def params(self, number: int) -> dict[str, Any]:
        """What was suggested to a trial so far."""
        return dict(self._frozen(number).params)

    def note(self, number: int, candidate: Candidate, **attributes: Any) -> None:
        """Keeps a candidate as it is, and its curve, with the trial that trains it."""
        for name, value in {"candidate": candidate.number, "record": as_record(candidate), **attributes}.items():
            self._storage.set_trial_user_attr(self._ids[number], name, value)
        if len(self._aims.objectives) == 1:  # Optuna knows curves of one objective only
            seen = self._seen.get(number, -1.0)
            for point in candidate.points:
                if point.samples > seen:
                    self._storage.set_trial_intermediate_value(self._ids[number], int(point.samples), point.score)
                    self._seen[number] = point.samples

    def beat(self, number: int) -> None:
        """Tells that a running trial is alive."""
        if isinstance(self._storage, optuna.storages.RDBStorage):
            self._storage.record_heartbeat(self._ids[number])

    def finish(self, number: int, candidate: Candidate, *, score: float | None) -> None:
        """Ends a trial: complete with a predicted or reached score, pruned if its candidate was rejected or never
        judged, else failed."""
        self.note(number, candidate, why=candidate.why)
        if candidate.state in ("failed", "raised"):
            self.optuna.tell(number, state=TrialState.FAIL)
        elif candidate.state == "rejected" or score is None:
            self.optuna.tell(number, state=TrialState.PRUNED)
        else:
            self.optuna.tell(number, self._aims.values(candidate, score))
        self._asked.pop(number, None)

    # What was before -------------------------------------------------------------------------------------------

    def recover(self) -> tuple[dict[int, Candidate], list[Candidate]]:
        """The own candidates by number, as they were left, and those of them that were being trained. Trials that were
        running, here or elsewhere, and whose process is gone, are failed."""
        candidates: dict[int, Candidate] = {}
        interrupted: list[Candidate] = []
        for trial in self.optuna.get_trials(deepcopy=False):
            if trial.user_attrs.get("owner") != self.owner:
                continue
            self._ids[trial.number] = trial._trial_id
            record, continues = trial.user_attrs.get("record"), trial.user_attrs.get("continues")
            if record:
                candidate = of_record(record)
            elif continues in candidates:
                candidate = candidates[continues]
            else:
                candidate = Candidate(number=trial.number, params=dict(trial.params))
            if trial.state is TrialState.RUNNING:
                interrupted.append(candidate)
                self.optuna.tell(trial.number, state=TrialState.FAIL)
            candidates[candidate.number] = candidate
        self.fail_stale()
        return candidates, interrupted

    def fail_stale(self) -> None:
        """Fails trials of other searches in the same storage whose heart has stopped, and queues them again; and those
        that nobody has begun to run, because a search has ended within the moment between asking and beginning."""
        with _calm():
            before = {trial.number: trial for trial in self._running()}
            optuna.storages.fail_stale_trials(self.optuna)
            left = {trial.number for trial in self._running()}
        for number, trial in before.items():
            if number not in left:
                if "continues" not in trial.user_attrs:  # else its checkpoint lies elsewhere
                    self.optuna.enqueue_trial(trial.params, user_attrs={"retries": number})
            elif "owner" not in trial.user_attrs and (self._is_alone or _age_s(trial) > GRACE_S):
                self.optuna.tell(number, state=TrialState.FAIL)

    def _running(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _frozen(self, number: int) -> FrozenTrial:
        trial_id = self._ids.get(number)
        if trial_id is None:
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self.optuna._study_id, number)
        return self._storage.get_trial(trial_id)


def _age_s(trial: FrozenTrial) -> float:
    start = trial.datetime_start
    return 0.0 if start is None else (datetime.datetime.now() - start).total_seconds()


def owner_of(folder: Path) -> str:
    """A name of a search's folder that no other one has, on this machine or another."""
    file = folder / "owner"
    if not file.exists():
        file.write_text(f"{socket.gethostname()}:{folder.resolve()}:{uuid.uuid4().hex[:8]}", encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _sampler(aims: Aims, seed: int) -> optuna.samplers.BaseSampler:
    if len(aims.objectives) > 1:
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    return optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Without Optuna's lines on the terminal, and its warnings that heartbeats are an experiment and meant for its own
    loop: here they are recorded by the search."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            yield
    finally:
        optuna.logging.set_verbosity(before)

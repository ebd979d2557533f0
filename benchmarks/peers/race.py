"""The race of one pair: every peer prepares it, then they step in turns, round by round, in an order that rotates.

Only one peer runs at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import families
from benchmarks.common import Row, first_line, median
from benchmarks.peers.field import Field
from benchmarks.peers.roster import BY_NAME, PARTITA
from benchmarks.peers.verdict import judge
from benchmarks.peers.workload import Workload, save_arrays
from benchmarks.processes import Message


class Starters:
    """The peers that have prepared a pair, with the steps that a turn of each takes; who fails is out.

    Attributes:
        num_steps: in a turn, by peer.
        prepared: replies to the preparation, by peer.
        not_raced: why a peer does not take part by its nature.
        errors: why a peer failed.
    """

    def __init__(self, field: Field, family: str, scale: str, *, turn_s: float) -> None:
        self._field = field
        self.num_steps: dict[str, int] = {}
        self.prepared: dict[str, Row] = {}
        self.not_raced: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            message = {"do": "prepare", "family": family, "scale": scale, **_arrays(field, family, scale, Path(folder))}
            for name in field.names:
                self._prepare(name, message, turn_s)

    def _prepare(self, name: str, message: Message, turn_s: float) -> None:
        reply = self._field.ask(name, message)
        if reply.get("error_type") == "NotRaced":
            self.not_raced[name] = first_line(reply["error"])
            return
        if "error" not in reply:
            self.prepared[name] = reply
            reply = self._field.ask(name, {"do": "turn", "num_steps": 3})
        if "error" in reply:
            self._fail(name, reply)
        else:
            self.num_steps[name] = min(1000, max(3, round(turn_s / median(reply["times_s"]))))

    def turn(self, name: str) -> list[float] | None:
        """Step times in seconds of one turn; None if the peer fails, which is then out."""
        reply = self._field.ask(name, {"do": "turn", "num_steps": self.num_steps[name]})
        if "error" in reply:
            self._fail(name, reply)
            return None
        times_s: list[float] = reply["times_s"]
        return times_s

    def forget(self) -> None:
        for name in self.num_steps:
            self._field.ask(name, {"do": "forget"})

    def _fail(self, name: str, reply: Row) -> None:
        self.errors[name] = f"{reply['error_type']}: {first_line(reply['error'])}"
        self.num_steps.pop(name, None)


def _arrays(field: Field, family: str, scale: str, folder: Path) -> Message:
    """The message's part for peers that do not build the torch model themselves."""
    if not any(BY_NAME[name].needs == "jax" for name in field.names):
        return {}
    path = folder / "arrays.npz"
    save_arrays(Workload(family, scale), path)
    return {"arrays": str(path)}


def rotated(names: Sequence[str], index: int) -> list[str]:
    """The order of round `index`.

    >>> rotated(["a", "b", "c"], 4)
    ['b', 'c', 'a']
    """
    turn = index % len(names) if names else 0
    return [*names[turn:], *names[:turn]]


def race(field: Field, family: str, scale: str, *, num_rounds: int, turn_s: float) -> Row:
    """One row: medians and minima of all peers over interleaved rounds."""
    starters = Starters(field, family, scale, turn_s=turn_s)
    rounds: dict[str, list[list[float]]] = {name: [] for name in starters.num_steps}
    for index in range(num_rounds):
        for name in rotated(list(rounds), index):
            times_s = starters.turn(name)
            if times_s is None:
                rounds.pop(name)
            else:
                rounds[name].append(times_s)
    starters.forget()
    prepared = starters.prepared
    return {
        "pair": f"{family}:{scale}",
        "draws": families.get(family).draws,
        **judge(rounds),
        "plan": prepared[PARTITA]["plan"] if PARTITA in prepared else None,
        "plans": {name: reply["plan"] for name, reply in prepared.items()},
        "trials_s": {name: reply["trials_s"] for name, reply in prepared.items() if reply["trials_s"]},
        "first_losses": {name: reply["loss"] for name, reply in prepared.items()},
        "not_raced": starters.not_raced or None,
        "errors": starters.errors or None,
    }

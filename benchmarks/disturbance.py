"""How much a step slows down while another process keeps one core half busy: partita beside its peers.

    python -m benchmarks.disturbance --json benchmarks/results/disturbance.json --check

A neighbour burns half of every 5 ms on one of the cores. In every round each peer has a quiet turn and a disturbed one,
in an order that alternates; the orders of peers rotate. The capacity that was taken is the neighbour's own processor
time over the capacity of all cores in its turns: 0.25 on two cores if nothing competes. A step's slow-down is

    s = (median over rounds of disturbed / quiet median step time) - 1

and partita's must be at most the taken capacity plus 15 %: s <= taken + 0.15. For comparison, work that
spreads freely over what is left of the cores slows by taken / (1 - taken).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.common import Report, Row, median, option_parser, show
from benchmarks.peers.field import Field
from benchmarks.peers.options import add_peer_options, interpreters_of, names_of, pairs_of
from benchmarks.peers.race import Starters, rotated
from benchmarks.peers.roster import PARTITA, num_cores
from benchmarks.processes import Child, Message

PAIRS = (
    ("conv1d", "small"), ("gpt2", "small"), ("resnet", "small"), ("unet", "small"), ("masked_tokens", "large"),
)  # fmt: skip
SHARE, PERIOD_S = 0.5, 0.005  # of one core
ALLOWANCE = 0.15
LEAST_TAKEN = 0.1  # of all cores; with less there is nothing to judge
COLUMNS = ("pair", "taken", "slow_down", "limit", "least_peer", "least_peer_slow_down", "slow_downs", "errors")

# One disturbed turn: quiet and disturbed median step time in seconds, and the share of all cores that was taken.
Pairing = tuple[float, float, float]


@contextmanager
def disturbed(neighbour: Child, core: int, taken: Message) -> Iterator[None]:
    """The neighbour is busy meanwhile; afterwards `taken` holds its `cpu_s` and `wall_s`."""
    neighbour.ask({"do": "start", "core": core, "share": SHARE, "period_s": PERIOD_S}, 10.0)
    try:
        yield
    finally:
        taken |= neighbour.ask({"do": "stop"}, 10.0)


def pair_of_turns(starters: Starters, name: str, neighbour: Child, core: int, *, quiet_first: bool) -> Pairing | None:
    """One quiet and one disturbed turn of a peer; None if it fails."""
    times_s: dict[bool, float] = {}
    taken: Message = {}
    for quiet in (quiet_first, not quiet_first):
        if quiet:
            turn = starters.turn(name)
        else:
            with disturbed(neighbour, core, taken):
                turn = starters.turn(name)
        if turn is None:
            return None
        times_s[quiet] = median(turn)
    return times_s[True], times_s[False], taken["cpu_s"] / (taken["wall_s"] * num_cores())


def measure(field: Field, neighbour: Child, family: str, scale: str, options: argparse.Namespace) -> Row:
    """One row: slow-downs of all peers and what was taken from them."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    starters = Starters(field, family, scale, turn_s=options.round_seconds)
    pairings: dict[str, list[Pairing]] = {name: [] for name in starters.num_steps}
    for index in range(options.rounds):
        for name in rotated(list(pairings), index):
            pairing = pair_of_turns(starters, name, neighbour, core, quiet_first=index % 2 == 0)
            if pairing is None:
                pairings.pop(name)
            else:
                pairings[name].append(pairing)
    starters.forget()
    return {
        "pair": f"{family}:{scale}",
        **judge(pairings),
        "plans": {name: reply["plan"] for name, reply in starters.prepared.items()},
        "not_raced": starters.not_raced or None,
        "errors": starters.errors or None,
    }


def judge(pairings: Mapping[str, Sequence[Pairing]]) -> Row:
    """Slow-downs by peer, what was taken from each, and partita's limit."""
    slow_downs = {name: median([busy / quiet for quiet, busy, _ in turns]) - 1 for name, turns in pairings.items()}
    taken = {name: median([share for *_, share in turns]) for name, turns in pairings.items()}
    row: Row = {"slow_downs": slow_downs, "taken_by_peer": taken, "turns": {n: list(t) for n, t in pairings.items()}}
    others = [name for name in slow_downs if name != PARTITA]
    if others:
        row["least_peer"] = min(others, key=slow_downs.__getitem__)
        row["least_peer_slow_down"] = slow_downs[row["least_peer"]]
    if PARTITA in slow_downs:
        row |= {"slow_down": slow_downs[PARTITA], "taken": taken[PARTITA], "limit": taken[PARTITA] + ALLOWANCE}
        row["free_spread_slow_down"] = taken[PARTITA] / (1 - taken[PARTITA])
    return row


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    measured = [row for row in rows if row.get("slow_down") is not None]
    above = [row["slow_down"] - row["taken"] for row in measured]
    summary = {
        "num_pairs": len(measured),
        "largest_slow_down_above_taken": max(above, default=float("nan")),
        "median_slow_down": median([row["slow_down"] for row in measured]),
        "median_slow_downs": _medians_by_peer(measured),
    }
    misses = [
        f"{row['pair']}: partita may slow by {row['limit']:.0%} at most, of which {row['taken']:.0%} was taken, but "
        f"slows by {row['slow_down']:.0%}"
        for row in measured
        if row["slow_down"] > row["limit"]
    ]
    misses += [
        f"{row['pair']}: the neighbour must take {LEAST_TAKEN:.0%} of the cores, but takes {row['taken']:.0%}"
        for row in measured
        if row["taken"] < LEAST_TAKEN
    ]
    misses += [f"{row['pair']}: not measured; {row.get('errors')}" for row in rows if row.get("slow_down") is None]
    if not rows:
        misses.append("one pair at least must be measured")
    return summary, misses


def _medians_by_peer(rows: Sequence[Row]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row["slow_downs"]})
    return {name: median([row["slow_downs"][name] for row in rows if name in row["slow_downs"]]) for name in names}


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=6)
    add_peer_options(parser, pairs=PAIRS)
    options = parser.parse_args()
    pairs = pairs_of(parser, options)
    field = Field(names_of(parser, options), interpreters=interpreters_of(options), timeout_s=options.timeout)
    settings = {
        "num_rounds": options.rounds, "turn_s": options.round_seconds, "share": SHARE, "period_s": PERIOD_S,
        "peers": field.names, "absent": field.absent,
    }  # fmt: skip
    report = Report("disturbance", settings, path=options.json)
    try:
        with Child("benchmarks.peers.neighbour", "burn") as neighbour:
            for family, scale in pairs:
                report.add(measure(field, neighbour, family, scale, options))
                row = report.rows[-1]
                print(f"{row['pair']}: {row['slow_downs']} {row['errors'] or ''}", file=sys.stderr, flush=True)
    finally:
        field.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

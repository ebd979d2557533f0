"""Training over slow links: partita's automatic plan beside its peers, on emulated machines.

    python -m benchmarks.slow_network --json benchmarks/results/slow_network.json --check

Two and four machines (`benchmarks.slow_machines`; needs root), one process each; links of 1 Gbit/s, 100 Mbit/s and
10 Mbit/s both ways, and two where machines differ in what they send. Every peer has processes of its own on the same
machines; all prepare a model, then step in turns, round by round, in an order that rotates; only one peer runs at a
time. A step takes as long as on its slowest machine; judged is the median over rounds of the median step of a round.

Bytes are counted three times: those that the plan predicts, those that `result.bytes_sent` tells (both of values only)
and those that the interfaces count (without headers), each summed over the machines, for a step. What else goes over
the interfaces (signs of life of the processes, gloo's preambles) is in the last of them; below `LEAST_BYTES` a step
they are not compared. Two further peers are partita with a plan that is spread over the machines by force, by rows of
the batch and by stages: an automatic plan that uses one machine has no bytes to compare. They count for that alone.

`--check` fails unless the automatic plan is at least as fast as every exact peer everywhere, at least twice as fast as
DDP at 100 Mbit/s where parameters are many, and predicted and measured bytes agree within 5 %.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, median, option_parser, show
from benchmarks.processes import serve
from benchmarks.slow_field import Field
from benchmarks.slow_machines import Machines, why_not
from benchmarks.slow_peers import FORCED, INEXACT, MODELS, PARAMETER_HEAVY, PARTITA, PEERS, Peer

MBIT = 125_000.0  # bytes a second
LARGEST_RATIO = 1.03  # to the fastest exact peer: what two medians of one thing differ by
LEAST_GAIN = 2.0  # over DDP at 100 Mbit/s with many parameters
LARGEST_BYTES_ERROR = 0.05
LEAST_BYTES = 16 * 1024
COLUMNS = ("network", "model", *PEERS, "best_peer", "ratio", "gain_over_ddp", "bytes_error", "plan", "errors")


@dataclass(frozen=True)
class Network:
    """What each machine can send, bytes a second."""

    name: str
    rates: tuple[float, ...]


NETWORKS = (
    Network("2 x 1 Gbit/s", (1000 * MBIT,) * 2),
    Network("2 x 100 Mbit/s", (100 * MBIT,) * 2),
    Network("2 x 10 Mbit/s", (10 * MBIT,) * 2),
    Network("2: 100 and 20 Mbit/s", (100 * MBIT, 20 * MBIT)),
    Network("4 x 1 Gbit/s", (1000 * MBIT,) * 4),
    Network("4 x 100 Mbit/s", (100 * MBIT,) * 4),
    Network("4: 3 x 1 Gbit/s, 100 Mbit/s", (1000 * MBIT,) * 3 + (100 * MBIT,)),
)


def step_times(replies: list[Row]) -> list[float]:
    """Of each step the time on the slowest machine."""
    return [max(times) for times in zip(*(reply["times_s"] for reply in replies), strict=True)]


def compare(field: Field, names: Sequence[str], model: str, *, num_rounds: int, round_s: float) -> Row:
    """One row: every peer's median, what was sent, and the plan."""
    assert isinstance(field.machines, Machines)
    errors: dict[str, str] = {}
    facts: dict[str, Row] = {}
    num_steps: dict[str, int] = {}
    for name in names:
        replies = field.ask(name, {"do": "prepare", "model": model})
        if isinstance(replies, str):
            errors[name] = replies
            continue
        num_steps[name] = min(100, max(1, round(round_s / step_times(replies)[-1])))
        if name in (PARTITA, *FORCED):
            facts[name] = {key: value for key, value in replies[0].items() if key != "times_s"}
    rounds: dict[str, list[float]] = {name: [] for name in num_steps}
    wire: dict[str, list[float]] = {name: [] for name in num_steps}
    told: dict[str, list[float]] = {name: [] for name in facts}
    sent_again: dict[str, int] = {}
    for index in range(num_rounds):
        order = list(rounds)
        turn = index % len(order) if order else 0
        for name in order[turn:] + order[:turn]:
            before, again = field.machines.traffic(), field.machines.retransmissions()
            replies = field.ask(name, {"do": "turn", "num_steps": num_steps[name]})
            if isinstance(replies, str):
                errors[name] = replies
                rounds.pop(name)
                continue
            payload = sum(a.payload_since(b) for a, b in zip(field.machines.traffic(), before, strict=True))
            rounds[name].append(median(step_times(replies)))
            wire[name].append(payload / num_steps[name])
            sent_again[name] = sent_again.get(name, 0) + field.machines.retransmissions() - again
            if name in told:
                told[name].append(sum(reply["bytes_sent"] for reply in replies))
    for name in rounds:
        field.ask(name, {"do": "forget"})
    return {
        "model": model,
        **judge({name: median(times) for name, times in rounds.items()}),
        "plan": facts.get(PARTITA, {}).get("plan"),
        "plans": facts,
        "bytes_sent": {name: median(values) for name, values in told.items() if values},
        "wire_bytes": {name: median(values) for name, values in wire.items() if values},
        "bytes_error": worst_bytes(
            {name: bytes_error(facts[name].get("predicted_bytes_sent"), told[name], wire[name]) for name in told}
        ),
        "rounds": rounds,
        "retransmissions": sent_again,
        "errors": errors or None,
    }


def judge(medians: dict[str, float]) -> Row:
    """Partita beside the fastest exact peer, and beside DDP."""
    row: Row = dict(medians)
    exact = [name for name in medians if name != PARTITA and name not in (*INEXACT, *FORCED)]
    if PARTITA in medians and exact:
        row["best_peer"] = min(exact, key=medians.__getitem__)
        row["ratio"] = medians[PARTITA] / medians[row["best_peer"]]
    if PARTITA in medians and "ddp" in medians:
        row["gain_over_ddp"] = medians["ddp"] / medians[PARTITA]
    return row


def bytes_error(predicted: float | None, told: list[float], wire: list[float]) -> float | None:
    """The larger of the relative differences of the prediction to what the result tells and to the interfaces' count;
    None where next to nothing is sent or predicted."""
    if predicted is None or not told or not wire:
        return None
    measured = [median(told), median(wire)]
    if max(predicted, *measured) < LEAST_BYTES:
        return None
    return max(abs(predicted / value - 1) if value else float("inf") for value in measured)


def worst_bytes(errors: dict[str, float | None]) -> float | None:
    return max((error for error in errors.values() if error is not None), default=None)


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    ratios = [row["ratio"] for row in rows if row.get("ratio") is not None]
    found = [row["bytes_error"] for row in rows if row.get("bytes_error") is not None]
    heavy = [
        row for row in rows if "100 Mbit" in row["network"] and ":" not in row["network"] and is_heavy(row["model"])
    ]
    gains = [row["gain_over_ddp"] for row in heavy if row.get("gain_over_ddp") is not None]
    summary = {
        "num_rows": len(rows),
        "median_ratio": median(ratios),
        "largest_ratio": max(ratios, default=float("nan")),
        "least_gain_over_ddp_at_100_Mbit_s": min(gains, default=float("nan")),
        "largest_bytes_error": max(found, default=float("nan")),
    }
    return summary, [miss for row in rows for miss in misses_of(row, row in heavy)]


def is_heavy(model: str) -> bool:
    return model in PARAMETER_HEAVY


def misses_of(row: Row, must_gain: bool) -> list[str]:
    """One sentence for each limit that a row misses."""
    where = f"{row['network']}, {row['model']}"
    if row.get("ratio") is None:
        return [f"{where}: not compared; {row.get('errors')}"]
    misses = [f"{where}: {name} did not run: {reason}" for name, reason in (row.get("errors") or {}).items()]
    if row["ratio"] > LARGEST_RATIO:
        misses.append(
            f"{where}: partita / {row['best_peer']} must be at most {LARGEST_RATIO}, but is {row['ratio']:.3f}"
        )
    if must_gain and row.get("gain_over_ddp", 0.0) < LEAST_GAIN:
        misses.append(f"{where}: must be {LEAST_GAIN:g} times as fast as DDP, but is {row.get('gain_over_ddp')}")
    if row.get("bytes_error") is not None and row["bytes_error"] > LARGEST_BYTES_ERROR:
        misses.append(
            f"{where}: bytes must agree within {LARGEST_BYTES_ERROR:.0%}, but predicted are "
            f"{ {name: facts['predicted_bytes_sent'] for name, facts in row['plans'].items()} }, told "
            f"{row['bytes_sent']}, on the wire {row['wire_bytes']}"
        )
    return misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=1.0, help="of steps of one peer in one round")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B")
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B")
    parser.add_argument("--networks", default="", metavar="TEXT", help='only networks with this text, e.g. "2 x"')
    parser.add_argument("--timeout", type=float, default=2400.0, help="seconds for one preparation or turn")
    options = parser.parse_args()
    if options.child:
        serve(Peer(options.child))
        return 0
    reason = why_not()
    if reason is not None:
        print(f"slow_network: skipped; {reason}", file=sys.stderr)
        return 0
    names = tuple(name.strip() for name in options.peers.split(","))
    models = tuple(name.strip() for name in options.models.split(","))
    networks = [network for network in NETWORKS if options.networks in network.name]
    if not set(names) <= set(PEERS) or not set(models) <= set(MODELS) or not networks:
        parser.error(f"--peers must name some of {PEERS}, --models of {MODELS}, --networks part of a network's name")
    settings = {"num_rounds": options.rounds, "round_s": options.round_seconds, "optimizer": "AdamW"}
    report = Report("slow_network", settings, path=options.json)
    for network in networks:
        run_network(report, network, names, models, options)
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


def run_network(
    report: Report, network: Network, names: tuple[str, ...], models: tuple[str, ...], options: Any
) -> None:
    """Adds a row for each model. The caches of the machines start empty, as on machines that are new to partita."""
    with tempfile.TemporaryDirectory() as cache, Machines(network.rates) as machines:
        field = Field("benchmarks.slow_network", PEERS, machines, Path(cache), options.timeout)
        try:
            for model in models:
                row = compare(field, names, model, num_rounds=options.rounds, round_s=options.round_seconds)
                report.add({"network": network.name, **row})
                told = {name: row.get(name) for name in ("ratio", "gain_over_ddp", "bytes_error", "plan", "errors")}
                print(f"{network.name}, {model}: {told}", file=sys.stderr, flush=True)
        finally:
            field.close()


if __name__ == "__main__":
    sys.exit(main())

"""What the rounds of a race say: ratios of a pair, figures and limits over all pairs. Pure functions of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import Row, median
from benchmarks.peers.roster import PARTITA, SINGLE_CORE

LARGEST_MEAN_RATIO = 0.67  # geometric mean over pairs of partita's step time / the best peer's
LARGEST_RATIO = 1.0  # of any pair
SMALLEST_SPEED_UP = 1.9  # over the fastest single-core run of any peer, where arithmetic decides
COMPUTE_BOUND_S = 0.1  # a pair whose fastest single-core step takes this long is compute-bound
SMALLEST_NUM_FAMILIES = 12
LOSS_TOLERANCE = 1e-4  # relative, of first losses of peers that see the whole batch

WHOLE_BATCH = (*SINGLE_CORE, "eager all", "compiled all", "jax", PARTITA)


def judge(rounds: Mapping[str, Sequence[Sequence[float]]]) -> Row:
    """Medians and minima by peer, partita's ratio to the best of the others, and its speed-up over one core.

    Args:
        rounds: step times in seconds by peer, round and step.

    A peer's time is the median over rounds of the median step of a round; its fastest time the least of all.
    """
    medians = {name: median([median(times) for times in turns]) for name, turns in rounds.items() if turns}
    fastest = {name: min(min(times) for times in turns) for name, turns in rounds.items() if turns}
    row: Row = {**medians, "fastest_time_s": fastest, "rounds": {n: [median(t) for t in v] for n, v in rounds.items()}}
    others = [name for name in medians if name != PARTITA]
    if PARTITA not in medians or not others:
        return row
    row["best_peer"] = min(others, key=medians.__getitem__)
    row["ratio"] = medians[PARTITA] / medians[row["best_peer"]]
    row["ratio_of_fastest"] = fastest[PARTITA] / min(fastest[name] for name in others)
    single = [name for name in SINGLE_CORE if name in medians]
    if single:
        row["best_single_core"] = min(single, key=medians.__getitem__)
        row["single_core_time_s"] = medians[row["best_single_core"]]
        row["speed_up"] = row["single_core_time_s"] / medians[PARTITA]
        row["compute_bound"] = row["single_core_time_s"] >= COMPUTE_BOUND_S
    return row


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive values, or NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """Figures over all pairs, and one sentence for each limit that is missed."""
    compared = [row for row in rows if row.get("ratio") is not None]
    ratios = [row["ratio"] for row in compared]
    speed_ups = {row["pair"]: row["speed_up"] for row in compared if row.get("compute_bound")}
    summary = {
        "num_pairs": len(compared),
        "num_families": len({row["pair"].split(":")[0] for row in compared}),
        "geometric_mean_ratio": geometric_mean(ratios),
        "geometric_mean_ratio_of_fastest": geometric_mean([row["ratio_of_fastest"] for row in compared]),
        "median_ratio": median(ratios),
        "largest_ratio": max(ratios, default=float("nan")),
        "num_compute_bound": len(speed_ups),
        "smallest_speed_up": min(speed_ups.values(), default=float("nan")),
        "least_step_time_s": min((row[row["best_peer"]] for row in compared), default=float("nan")),
        "largest_single_core_time_s": max((row.get("single_core_time_s", 0.0) for row in compared), default=0.0),
        "wins": _wins(compared),
    }
    return summary, [*_misses_of_the_whole(summary), *(miss for row in rows for miss in _misses_of_pair(row))]


def _wins(rows: Sequence[Row]) -> dict[str, int]:
    """How often each peer was the best but for partita."""
    best = [row["best_peer"] for row in rows]
    return {name: best.count(name) for name in sorted(set(best))}


def _misses_of_the_whole(summary: Mapping[str, Any]) -> list[str]:
    misses = []
    mean = summary["geometric_mean_ratio"]
    if not mean <= LARGEST_MEAN_RATIO:  # also where it is NaN
        misses.append(f"the geometric mean of ratios must be at most {LARGEST_MEAN_RATIO}, but is {mean:.3f}")
    if summary["num_families"] < SMALLEST_NUM_FAMILIES:
        misses.append(
            f"at least {SMALLEST_NUM_FAMILIES} families must be compared, but there are {summary['num_families']}"
        )
    if not summary["num_compute_bound"]:
        misses.append(f"a single-core step of some pair must take {COMPUTE_BOUND_S} s or more, but none does")
    return misses


def _misses_of_pair(row: Row) -> list[str]:
    pair = row["pair"]
    if row.get("ratio") is None:
        return [f"{pair}: not compared; {row.get('errors')}"]
    misses = []
    if row["ratio"] > LARGEST_RATIO:
        misses.append(
            f"{pair}: partita / {row['best_peer']} must be at most {LARGEST_RATIO}, but is {row['ratio']:.3f}"
        )
    if row.get("compute_bound") and row["speed_up"] < SMALLEST_SPEED_UP:
        misses.append(
            f"{pair}: speed over {row['best_single_core']} must be at least {SMALLEST_SPEED_UP}, "
            f"but is {row['speed_up']:.2f}"
        )
    if row.get("errors"):
        misses.append(f"{pair}: every peer must finish, but {row['errors']}")
    return misses + _different_work(row)


def _different_work(row: Row) -> list[str]:
    """Peers whose first loss tells that they trained something else; not where the loss draws random numbers."""
    losses = {name: loss for name, loss in row.get("first_losses", {}).items() if name in WHOLE_BATCH}
    if row.get("draws") or len(losses) < 2:
        return []
    expected = median(list(losses.values()))
    return [
        f"{row['pair']}: the first loss must be the same, but is {loss} for {name} and {expected} in the median"
        for name, loss in losses.items()
        if not math.isclose(loss, expected, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE)
    ]

"""When a loss is reached, what trainings are asked for until it is, and what the benchmark concludes from times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.loss_child import Learner, traffic
from benchmarks.loss_curves import SLACK, mean_of, smoothed, steps_to, target_of, time_of_first, whole_turns
from benchmarks.loss_race import (
    AUTO_EXACT,
    AUTO_LOSS,
    EXACT,
    MOST_FACTOR,
    WAYS,
    Curves,
    Learnt,
    Timed,
    Way,
    learn,
    loss_error,
    outcome,
    race,
)
from benchmarks.loss_trainers import method_of
from benchmarks.slow_machines import Traffic
from benchmarks.time_to_loss import STREAMING, WHOLE, fewer_at_peak, judge, learnt_by, misses_of, summarise
from partita import sync

FALLING = [(step, 10.0 / step) for step in range(1, 21)]
losses = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=30).map(
    lambda values: [(10 * place + 9, loss) for place, loss in enumerate(values)]
)


@given(losses)
def test_exact_training_reaches_its_own_target_within_its_share_of_the_steps(curve: list[tuple[int, float]]) -> None:
    target = target_of(curve)
    assert target >= SLACK * smoothed(curve)[-1][1]
    reached = steps_to(curve, target)
    last = curve[-1][0]
    first_there = next(step for step, _ in curve if step >= 0.8 * last)
    assert reached is not None and reached <= first_there


@given(losses, st.floats(0.1, 10.0))
def test_from_where_a_loss_is_reached_it_stays(curve: list[tuple[int, float]], target: float) -> None:
    reached, seen = steps_to(curve, target), smoothed(curve)
    if reached is None:
        assert seen[-1][1] > target
        return
    assert all(loss <= target for steps, loss in seen if steps >= reached + 1e-6)
    before = [loss for steps, loss in seen if steps < reached - 1e-6]
    assert not before or before[-1] > target


def test_a_loss_that_is_left_again_is_not_reached() -> None:
    assert steps_to([(10, 1.0), (20, 1.0), (30, 1.0), (40, 40.0)], 2.0) is None
    assert steps_to([(10, 1.0), (20, 40.0), (30, 1.0), (40, 1.0), (50, 1.0), (60, 1.0)], 2.0) == pytest.approx(
        40 + 10 * (14 - 2) / (14 - 1)
    )
    assert steps_to([(10, 1.0)], 2.0) == 10.0
    assert steps_to([], 2.0) is None
    assert steps_to([(10, math.nan), (20, math.nan)], 2.0) is None


def test_means_go_as_far_as_all_seeds_do() -> None:
    assert mean_of([[(1, 2.0), (2, 4.0)], [(1, 4.0)]]) == [(1, 3.0)]


def test_times_from_the_first_step_on_are_measured_as_far_as_they_go() -> None:
    assert time_of_first([3.0, 2.0], 0.5, 4) == 6.0
    assert time_of_first([3.0, 2.0, 9.0], 0.5, 2) == 5.0
    assert [whole_turns(1.0, 0.01, 50), whole_turns(1.0, 0.03, 50), whole_turns(1.0, 0.0, 1) > 1000] == [100, 50, True]


# Training ------------------------------------------------------------------------------------------------------------


class Scripted:
    """A field whose ways lose 10 / steps, or `speed` times as fast."""

    num = 2

    def __init__(self, speed: float = 1.0, fails: str = "") -> None:
        self.speed, self.fails = speed, fails
        self.steps: dict[str, int] = {}
        self.asked: list[tuple[str, str, int]] = []

    def ask(self, role: str, message: dict[str, Any]) -> list[dict[str, Any]] | str:
        if message.get("name") == self.fails and message["do"] == "prepare":
            return "TypeError: cannot"
        self.asked.append((message["do"], message["way"], message.get("steps", 0)))
        if message["do"] == "prepare":
            self.steps[message["way"]] = 0
            return [{"prepare_time_s": 1.0, "every": 1}] * 2
        if message["do"] == "forget":
            del self.steps[message["way"]]
            return [{}, {}]
        before = self.steps[message["way"]]
        after = self.steps[message["way"]] = before + message["steps"]
        own = range(before + 1, after + 1)
        curve = [(step, 10.0 / (self.speed * step)) for step in own if (step + 1) % 10 == 0]
        reply = {
            "times_s": [0.1 for _ in own], "losses": [1.0 / step for step in own], "sent": [100 for _ in own],
            "wire": None, "curve": curve, "every": 5, "is_settled": True, "plan": "one",
        }  # fmt: skip
        return [reply, {**reply, "times_s": [0.2 for _ in own], "curve": []}]


def test_training_goes_on_until_the_target_is_reached_or_twice_as_long() -> None:
    way = Way("slow", "partita")
    quick = learn(Scripted(), way, "digits", 80, 2, target=10.0 / 60)
    assert [len(curve) for curve in quick.curves] == [8, 8] and len(quick.losses) == 80
    assert quick.steps_to(10.0 / 60) is not None
    slow = learn(Scripted(speed=0.75), way, "digits", 80, 2, target=10.0 / 75)
    reached = slow.steps_to(10.0 / 75)
    assert reached is not None and 100 <= reached < 130
    assert slow.at(80)[0] == pytest.approx(10.0 / (0.75 * 79))
    never = Scripted(speed=0.1)
    assert learn(never, way, "digits", 80, 1, target=10.0 / 75).steps_to(10.0 / 75) is None
    assert sum(steps for _, _, steps in never.asked) == MOST_FACTOR * 80 and not never.steps
    assert "cannot" in learn(Scripted(fails="slow"), way, "digits", 80, 1, None).error


def test_curves_are_kept(tmp_path: Path) -> None:
    path, field = tmp_path / "curves.json", Scripted()
    first = Curves(path).of(field, Way("bf16", "partita"), "digits", 80, 1)
    num = len(field.asked)
    again = Curves(path).of(field, Way("bf16", "partita"), "digits", 80, 1)
    assert len(field.asked) == num and again.steps_to(0.2) == first.steps_to(0.2)
    assert Curves(path).target(field, "digits", 80, 1) == pytest.approx(SLACK * 10 / 3 * (1 / 69 + 1 / 59 + 1 / 49))


def test_ways_step_in_turns_and_a_failed_one_does_not_take_others_with_it() -> None:
    ways = [EXACT, Way("bad", "partita"), Way("ddp", "ddp", like="exact")]
    field = Scripted(fails="bad")
    found = race(field, ways, "digits", rounds=2, round_s=1.0, settle_s=1.0)
    assert found["bad"] == "TypeError: cannot"
    timed = found["exact"]
    assert isinstance(timed, Timed) and timed.rounds_s == pytest.approx([0.2, 0.2]) and timed.num_steps == 10
    assert timed.row()["bytes_per_step"] == 100 and timed.row()["peak_bytes"] == 100
    assert [way for do, way, _ in field.asked if do == "prepare"] == ["exact", "exact", "ddp"]
    assert [way for do, way, _ in field.asked if do == "turn"][3:] == ["exact", "ddp", "ddp", "exact"]
    assert not field.steps
    learnt = Learnt(curves=[FALLING], losses=[1.0 / step for step in range(1, 21)])
    row = outcome(EXACT, 20, 1.0, learnt, timed)
    assert row["time_to_loss_s"] == pytest.approx(row["steps_to_loss"] * 0.2) and row["loss_error"] == 0.0
    assert row["bytes_to_loss"] == row["steps_to_loss"] * 100 and row["plan"] == "one"
    assert outcome(EXACT, 20, 0.01, learnt, timed)["steps_to_loss"] is None
    assert outcome(EXACT, 20, 0.01, learnt, "lost")["errors"] == "lost"


def test_a_process_trains_and_judges_and_counts_no_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    learner = Learner()
    whole = {"way": "plain/0", "name": "plain", "kind": "plain", "task": "digits", "seed": 0, "processes": 2}
    learner({"do": "prepare", **whole})
    first = learner({"do": "turn", "way": "plain/0", "steps": 15, "judge_every": 10})
    second = learner({"do": "turn", "way": "plain/0", "steps": 45, "judge_every": 10})
    assert [steps for steps, _ in first["curve"]] == [9] and [steps for steps, _ in second["curve"]] == [
        19,
        29,
        39,
        49,
        59,
    ]
    assert second["curve"][-1][1] < 0.7 * first["curve"][0][1]
    assert len(first["times_s"]) == len(first["losses"]) == 15 and first["sent"] is None and first["is_settled"]
    learner({"do": "forget", "way": "plain/0"})
    with pytest.raises(LookupError, match="plain/0"):
        learner({"do": "turn", "way": "plain/0", "steps": 1})


def test_what_an_emulated_machine_has_sent_is_read_from_its_interface(tmp_path: Path) -> None:
    path = tmp_path / "dev"
    path.write_text(
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n"
        "    lo:      12       1    0    0    0     0          0         0       12       1    0    0\n"
        "  net0: 1000 10 0 0 0 0 0 0 5000 50 0 0 0 0 0 0\n"
    )
    assert traffic(path) == Traffic(5000, 50)
    path.write_text("    lo:      12       1    0    0    0     0          0         0       12       1    0    0\n")
    assert traffic(path) is None and traffic(tmp_path / "none") is None


# Judging -------------------------------------------------------------------------------------------------------------


def test_ways_that_share_losses_share_those_of_one_that_is_judged() -> None:
    judged = {way.name for way in WAYS if not way.like and not way.chooses}
    assert all(way.like in judged for way in WAYS if way.like)
    assert {way.name for way in WAYS if way.exact} == {"exact", AUTO_EXACT, "plain", "ddp"}


def rows_of(**times: float | None) -> list[dict[str, Any]]:
    exact = {way.name: way.exact for way in WAYS}
    names = {name: name.replace("_", " ") for name in times} | {"auto_loss": AUTO_LOSS}
    return [
        {"network": "2 x", "task": "chars", "entry": names[name], "exact": exact[names[name]], "time_to_loss_s": time_s,
         "target": 1.0, "loss": 1.2}
        for name, time_s in times.items()
    ]  # fmt: skip


def test_exact_choices_are_compared_with_exact_ways_and_others_with_all() -> None:
    rows = rows_of(exact=5.0, ddp=4.0, bf16=2.0, int8=None, auto_exact=4.4, auto_loss=2.0)
    judge(rows)
    found = {row["entry"]: row for row in rows}
    assert found[AUTO_EXACT]["best"] == "ddp" and found[AUTO_EXACT]["ratio"] == pytest.approx(1.1)
    assert found[AUTO_LOSS]["best"] == "bf16" and found[AUTO_LOSS]["ratio"] == 1.0
    summary, misses = summarise(rows)
    assert len(misses) == 1 and "1.100 times" in misses[0] and summary["auto exact: largest ratio"] == 1.1


def test_every_limit_that_is_missed_is_told() -> None:
    row = rows_of(auto_loss=None)[0]
    assert "must reach a loss" in misses_of(row, "partita")[0]
    assert (
        misses_of({**row, "errors": "lost"}, "ddp") == [] and len(misses_of({**row, "errors": "lost"}, "partita")) == 1
    )
    method = rows_of(bf16=1.0)[0]
    good = {"bytes_error": 0.0, "peak_bytes": 10, "peak_formula": 10.0, "loss_error": 0.001}
    assert misses_of({**method, **good}, "partita") == []
    bad = {"bytes_error": 0.1, "formula": 1.0, "bytes_per_step": 1.1, "peak_bytes": 11, "peak_formula": 10.0}
    assert len(misses_of({**method, **bad, "loss_error": 0.5, "is_settled": False}, "partita")) == 4


def test_a_chosen_method_that_was_judged_has_its_losses() -> None:
    def timed(method: str) -> Timed:
        return Timed(1.0, [1.0], facts=[{"method": method}])

    learnt = Learnt(curves=[FALLING])
    known = {(2, "chars", "bf16"): learnt, (2, "chars", "int8"): Learnt(error="lost")}
    found = {"bf16": timed("Rounded(to='bf16')"), "int8": timed("Rounded(to='int8')"), AUTO_LOSS: timed("Exact()")}
    assert learnt_by("Rounded(to='bf16')", 2, "chars", found, known) is learnt
    assert learnt_by("Rounded(to='bf16')", 4, "chars", found, known) is None
    assert learnt_by("Rounded(to='int8')", 2, "chars", found, known) is None
    assert learnt_by("Exact()", 2, "chars", {**found, "bf16": "lost"}, known) is None


def test_peaks_of_fragments_are_held_against_those_of_the_whole() -> None:
    rows = [
        {"network": network, "task": "chars", "entry": entry, "peak_bytes": peak}
        for network, entry, peak in [("a", WHOLE, 400), ("a", STREAMING, 100), ("b", WHOLE, 400), ("c", STREAMING, 9)]
    ]
    assert fewer_at_peak(rows, "chars") == [4.0] and fewer_at_peak(rows, "conv") == []


def test_losses_of_the_timed_training_are_held_against_the_judged_ones() -> None:
    assert loss_error([1.0, 2.0, 3.3], [1.0, 2.0, 3.0]) == pytest.approx(0.1)
    assert loss_error([], [1.0]) == 0.0


@pytest.mark.parametrize(
    "method",
    [
        sync.Exact(),
        sync.PowerSGD(rank=2),
        sync.DiLoCo(every=20, compress=sync.Rounded(to="int4")),
        sync.StreamingDiLoCo(every=50, fragments=4, delay=2),
        sync.LocalSGD(every=5, compress=sync.TopK(density=0.1)),
    ],
    ids=repr,
)
def test_a_method_that_was_chosen_is_made_from_what_it_tells(method: object) -> None:
    assert method_of(repr(method)) == method
    with pytest.raises(ValueError, match="malformed"):
        method_of("DiLoCo(every=[open('/etc/passwd')])")

"""The deadline as an absolute instant, and how the time until then is dealt out.

    start ------------------ exploring ----------------- explore_end ---- final training ---- last -- deadline
          candidates side by side, promoted in rungs of time          the best one, wide        margin

Of the time until `last`, the last `final_share` belongs to the final training: one candidate is continued on all cores,
and others beside it on those that its plan leaves idle.
Successive halving gives each of its rungs the same time, the last one to a single candidate; as exploring here has
about as much to gain from many short rungs as from a long last one, the default is a bit less than half. `margin`
is kept for handing over the result.

Rungs are times: rung k is `FACTOR`^k times the first one, of training alone. The first is `FACTOR`^-`MOST_RUNGS` of the
final training, but at least `STARTUPS` times what a trial takes to begin, because less would be spent on beginnings.
The last one is at most `LAST_RUNG_SHARE` of the final training. Simulated on curves of 56 candidates (53 s on two
cores, 35 s of final training, 0.5 s to begin, 40 orders, `benchmarks.allocation`), first rungs of 0.25 s come to a loss
of 1.59, 0.44 s to 1.54, 0.75 s to 1.56, 1.3 s to 1.57, 2.3 s to 1.58 and 3.9 s to 1.60, as fewer candidates are tried;
with 1 s to begin 0.3 s to 1.59, 0.45 s to 1.56, 1 s to 1.57, 3 s to 1.59; with 36 s in all 0.3 to 0.65 s are best.

Sources: successive halving Jamieson and Talwalkar 2016, section 3; rungs and factor Li et al. 2020 (ASHA), section 3.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass

from partita.arguments import told
from partita.errors import InputError

FACTOR = 3
MOST_RUNGS = 4
LAST_RUNG_SHARE = 0.5
STARTUPS = 1.0
LEAST_RUNG_S = 0.2
MARGIN_SHARE, LEAST_MARGIN_S, MOST_MARGIN_S = 0.02, 0.3, 5.0
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FORM = (
    'deadline must be seconds from now, a text such as "90s", "20m", "1h30m" or "2d", a timedelta, or a datetime, '
    "and lie in the future"
)


def instant_of(deadline: object, *, now_s: float) -> float:
    """A deadline as seconds since 1970 (`time.time`). A text "@SECONDS" is such an instant itself.

    Raises:
        InputError: it is no deadline, or lies in the past.

    >>> instant_of("1h30m", now_s=1000.0)
    6400.0
    """
    at_s = _instant_of(deadline, now_s)
    if at_s is None or not math.isfinite(at_s):
        raise InputError(f"{_FORM}, but got {told(deadline)}")
    if at_s <= now_s:
        raise InputError(f"{_FORM}, but {told(deadline)} is {now_s - at_s:.0f} s ago")
    return at_s


def _instant_of(deadline: object, now_s: float) -> float | None:
    if isinstance(deadline, bool):
        return None
    if isinstance(deadline, (int, float)):
        return now_s + deadline
    if isinstance(deadline, datetime.timedelta):
        return now_s + deadline.total_seconds()
    if isinstance(deadline, datetime.datetime):
        return deadline.timestamp()
    if not isinstance(deadline, str):
        return None
    text = deadline.strip().replace(" ", "").lower()
    if re.fullmatch(r"@\d+(\.\d+)?", text):
        return float(text[1:])
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        return None
    return now_s + sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time of a search; all instants are seconds since 1970, so that a search that starts again meets the same
    ones."""

    start_s: float
    deadline_s: float
    final_share: float

    @property
    def margin_s(self) -> float:
        return min(MOST_MARGIN_S, max(LEAST_MARGIN_S, MARGIN_SHARE * (self.deadline_s - self.start_s)))

    @property
    def last_s(self) -> float:
        """Until then the result must be written."""
        return self.deadline_s - self.margin_s

    @property
    def explore_end_s(self) -> float:
        return self.start_s + (1 - self.final_share) * (self.last_s - self.start_s)

    @property
    def final_s(self) -> float:
        return self.last_s - self.explore_end_s

    def first_rung_s(self, startup_s: float) -> float:
        """The training time after which a candidate is judged first, where beginning a trial takes `startup_s`."""
        wanted_s = max(LEAST_RUNG_S, STARTUPS * startup_s, self.final_s / math.pow(FACTOR, MOST_RUNGS))
        return min(wanted_s, max(LEAST_RUNG_S, (self.explore_end_s - self.start_s) / FACTOR))

    def last_rung(self, first_rung_s: float) -> int:
        """The rung beyond which a candidate goes on in the final training only."""
        rungs = math.log(max(1.0, LAST_RUNG_SHARE * self.final_s / first_rung_s), FACTOR)
        return math.floor(rungs)

    def num_slots(self, num_cores: int, now_s: float) -> int:
        """How many trials run side by side: one a core in the first half of exploring, then fewer and wider ones, down
        to two (or one, on one core). Trials beside each other exchange nothing, so they use cores best; towards the end
        a promising one must get through a long rung."""
        left = (self.explore_end_s - now_s) / max(1e-9, self.explore_end_s - self.start_s)
        return max(min(2, num_cores), math.ceil(num_cores * min(1.0, 2 * left)))


def rung_s(first_s: float, rung: int) -> float:
    """The training time at whose end a candidate reaches a rung."""
    return first_s * math.pow(FACTOR, rung)

"""How much of the planner's work pays before a training of some seconds.

A graph with its prices takes about ten times as long as an outline of the step, and so does the one plan of a worker a
core; searching and trying plans takes forty times as long, compiling them sixty times and more, on fast machines and
slow ones, for small models and large ones. What pays loses no more than about a tenth of the training, a price by plans
a quarter.

Of six networks for characters that were trained for 36 s on two cores, finding the best of all plans took 3.8 to 9 s of
them, and steps then took 0.46 to 0.93 of plain PyTorch's time; the plan was always, or nearly, a worker a core.
Compiled plans came to 0.64 to 0.83 of the steps of plain PyTorch in that time.
"""

from __future__ import annotations

from enum import IntEnum

PRICED_FROM, QUICK_FROM, SEARCHED_FROM, COMPILED_FROM = 40.0, 100.0, 400.0, 600.0  # times what an outline takes
# What trying and compiling take hardly depends on the model.
LEAST_QUICK_S, LEAST_SEARCHED_S, LEAST_COMPILED_S = 15.0, 90.0, 180.0


class Effort(IntEnum):
    """Plain PyTorch; beside it a worker a core; all plans; also compiled."""

    PLAIN, QUICK, SEARCHED, COMPILED = range(4)


def effort_for(training_s: float, outline_s: float) -> Effort:
    """What pays for so much training of a candidate whose outline took `outline_s` (0: unknown).

    >>> effort_for(20.0, 0.1).name, effort_for(20.0, 0.5).name, effort_for(3600.0, 0.5).name
    ('QUICK', 'PLAIN', 'COMPILED')
    """
    if training_s >= max(LEAST_COMPILED_S, COMPILED_FROM * outline_s):
        return Effort.COMPILED
    if training_s >= max(LEAST_SEARCHED_S, SEARCHED_FROM * outline_s):
        return Effort.SEARCHED
    return Effort.QUICK if training_s >= max(LEAST_QUICK_S, QUICK_FROM * outline_s) else Effort.PLAIN


def is_split(training_s: float, outline_s: float) -> bool:
    """Whether anything is tried beside plain PyTorch."""
    return effort_for(training_s, outline_s) > Effort.PLAIN


def is_priced(training_s: float, outline_s: float) -> bool:
    """Whether plans are priced for so much training."""
    return training_s >= PRICED_FROM * outline_s

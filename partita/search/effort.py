"""How much of the planner's work pays before a training of some seconds.

A graph with its prices takes about ten times as long as an outline of the step, searching and trying plans twenty
times, compiling them sixty times and more, on fast machines and slow ones, for small models and large ones. What pays
loses no more than about a tenth of the training, a price by plans a quarter.
"""

from __future__ import annotations

PRICED_FROM, PLANNED_FROM, COMPILED_FROM = 40.0, 200.0, 600.0  # times what an outline takes
LEAST_PLANNED_S, LEAST_COMPILED_S = 30.0, 180.0  # what trying and compiling take hardly depends on the model


def is_priced(training_s: float, outline_s: float) -> bool:
    """Whether plans are priced for so much training of a candidate whose outline took `outline_s` (0: unknown)."""
    return training_s >= PRICED_FROM * outline_s


def is_planned(training_s: float, outline_s: float) -> bool:
    """Whether plans are searched and tried."""
    return training_s >= max(LEAST_PLANNED_S, PLANNED_FROM * outline_s)


def is_compiled(training_s: float, outline_s: float) -> bool:
    """Whether they may be compiled."""
    return training_s >= max(LEAST_COMPILED_S, COMPILED_FROM * outline_s)

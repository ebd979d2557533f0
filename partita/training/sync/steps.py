"""How many more steps training needs for the same loss under a method: the rule by which ``sync="auto"`` reckons.

With F the steps for a loss as a multiple of those of exact training, P processes and H steps between agreements:

    16-bit gradients                F = 1
    integers with error feedback    F = 1.02 (8 bits), 1.06 (4 bits)
    PowerSGD with SGD, rank >= 4    F = 1.05
    replicas that agree every H     F = 1 + 0.05 max(0, P - Q) ln(H), but at most P, which one alone needs for the
                                    samples; times that of what compresses their differences. Q = 4 with SGD, else 1

The last one fits what `benchmarks.method_outcomes.steps_factor` finds of a small decoder on characters, early in its
training (300 steps, AdamW), within 5 %. P = 4: H = 5: 1.25, H = 10: 1.34, H = 20: 1.42, H = 50: 1.56, H = 105: 1.66,
and one process that never hears of the others 2.1. P = 2: H = 5: 1.07, H = 10: 1.09, H = 20: 1.11, H = 105: 1.21.
A perceptron and a small convolution net, which train by SGD with momentum, need fewer steps than exact training, on two
and on four processes (H = 5: 0.71 to 0.97, H = 20: 0.73 to 0.80, H = 50: 0.52 to 0.83; `benchmarks.time_to_loss`), as
the outer momentum adds to theirs. How much of that is left where rates are tuned for it, is not known: so it counts as
no gain, and beyond four processes, which were not tried, as the loss that AdamW has. Outer steps after more than 50
steps are not chosen: with the paper's momentum, which they have, the perceptron on four processes did not come to the
loss at all (H = 100: 0.26 after 900 steps, where exact training has 0.09). Methods of which too little
is known (`TopK`, `DGC`, `DeMo`, `Stale`, `Gossip`, `PowerSGD` with other optimizers than SGD, which trains badly) have
no rule and are never chosen.
"""

from __future__ import annotations

import math

import torch

from partita.training.sync.exact import Exact
from partita.training.sync.method import GradientMethod
from partita.training.sync.outer import DiLoCo, LocalSGD, StreamingDiLoCo
from partita.training.sync.powersgd import PowerSGD
from partita.training.sync.replica import ReplicaMethod
from partita.training.sync.rounded import Rounded

FACTOR_OF_DRIFT = 0.05
NUM_HARMLESS_WITH_SGD = 4  # replicas
MOST_STEPS_APART = 50  # of outer steps
FACTORS_OF_ROUNDING = {"bf16": 1.0, "fp16": 1.0, "fp32": 1.0, "int8": 1.02, "int4": 1.06}
FACTOR_OF_POWERSGD = 1.05
LEAST_RANK = 4


def steps_factor(
    method: GradientMethod | ReplicaMethod, num_processes: int, optimizer: torch.optim.Optimizer
) -> float | None:
    """Steps that a method needs for a loss, as a multiple of those that exact training needs; None where there is no
    rule.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        >>> round(steps_factor(DiLoCo(every=50), 4, optimizer), 2)
        1.59
    """
    if isinstance(method, Exact):
        return 1.0
    if isinstance(method, Rounded):
        has_feedback = method.to.startswith("int") and method.error_feedback is not False
        return FACTORS_OF_ROUNDING[method.to] if has_feedback or not method.to.startswith("int") else None
    if isinstance(method, PowerSGD):
        is_known = method.rank >= LEAST_RANK and method.error_feedback and isinstance(optimizer, torch.optim.SGD)
        return FACTOR_OF_POWERSGD if is_known else None
    if isinstance(method, (DiLoCo, StreamingDiLoCo)) and method.every > MOST_STEPS_APART:
        return None
    if isinstance(method, (LocalSGD, DiLoCo, StreamingDiLoCo)):
        inner = steps_factor(method.compress, num_processes, torch.optim.SGD([torch.zeros(1)], lr=1.0))
        num_harmless = NUM_HARMLESS_WITH_SGD if isinstance(optimizer, torch.optim.SGD) else 1
        num_drifting = max(0, num_processes - num_harmless)
        drift = min(1 + FACTOR_OF_DRIFT * num_drifting * math.log(method.every), num_processes)
        return None if inner is None else drift * inner
    return None

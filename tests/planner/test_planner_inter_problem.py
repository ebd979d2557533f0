"""What must hold of a problem, and what its errors say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.inter_cases import chain_problem
from partita.errors import InputError
from partita.planner.inter import Links, solve_inter

PROBLEM = chain_problem(3, ("a", "b"), num_microbatches=2, batch_rows=4, row_s={"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ops": 0}, "num_ops must be at least 1"),
        ({"devices": ()}, "at least one device"),
        ({"links": Links.uniform(3, 0.0, 1.0)}, "2 x 2, but got"),
        ({"microbatch_counts": (3,)}, "must divide batch_rows=4, but got 3"),
        ({"microbatch_counts": ()}, "must not be empty"),
        ({"schedules": ("2f2b",)}, "must be one of"),
        ({"chunk_counts": (1,)}, "at least 2"),
        ({"stage_sizes": (0,)}, "at least 1"),
        ({"orders": ((0, 0),)}, "each once"),
        ({"before": ((0, 9),)}, "two ops of 0 .. 2"),
    ],
)
def test_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(PROBLEM, **changes)  # type: ignore[arg-type]


def test_an_unknown_kind_is_named() -> None:
    devices = (PROBLEM.devices[0], replace(PROBLEM.devices[1], kind="c"))
    with pytest.raises(InputError, match="'c' is not among"):
        solve_inter(replace(PROBLEM, devices=devices))


def test_a_boundary_has_as_many_lanes_as_its_smaller_side() -> None:
    speed = np.array([[1.0, 2.0, 4.0], [2.0, 1.0, 8.0], [5.0, 6.0, 1.0]])
    problem = chain_problem(3, ("a", "a", "a"), num_microbatches=1, batch_rows=1, row_s={"a": 1.0})
    problem = replace(problem, links=Links(latency_s=speed / 10, bytes_per_s=speed))
    assert problem.link((0, 1), (2,)) == (0.8, pytest.approx(1 / 4))
    assert problem.link((0,), (1,)) == (0.2, pytest.approx(1 / 2))
    assert problem.orders == ((0, 1, 2),)

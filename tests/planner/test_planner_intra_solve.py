"""Optima against enumeration, the price against enumeration, what does not fit, and shadow prices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.intra_cases import (
    assignments,
    best_by_enumeration,
    cost_by_enumeration,
    least_peak_by_enumeration,
    random_problem,
)
from partita.errors import InfeasibleError, InputError, SolverError
from partita.planner.intra import (
    Assignment,
    Choice,
    Conversion,
    Input,
    InputChoice,
    IntraProblem,
    Op,
    Value,
    Window,
    make_timetable,
    memory_price_s_per_gib,
    price,
    smallest_peak,
    solve_intra,
)
from partita.planner.intra import solve as solve_module
from partita.units import GIB


@pytest.mark.slow
@settings(max_examples=350, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_optima_are_those_of_enumeration(seed: int) -> None:
    problem = random_problem(seed)
    best = best_by_enumeration(problem)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            solve_intra(problem)
        least = least_peak_by_enumeration(problem)
        assert least is None or f"({least} bytes)" in str(caught.value)
        return
    solution = solve_intra(problem)
    assert solution.objective_s == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert solution.status == "optimal"
    assert solution.lower_bound_s <= best * (1 + 1e-6)
    assert solution.gap <= 1e-5
    assert problem.memory_bytes is None or solution.peak_bytes <= problem.memory_bytes
    assert solution.priced == price(problem, solution.assignment)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_assignment_is_priced_as_enumeration_prices_it(seed: int) -> None:
    problem = random_problem(seed)
    every = list(assignments(problem))
    for decisions in every[:: max(1, len(every) // 50)]:
        expected = cost_by_enumeration(problem, decisions)
        if expected is None:
            with pytest.raises(InputError):
                price(problem, Assignment(*decisions))
            continue
        priced = price(problem, Assignment(*decisions))
        assert priced.time_s == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
        assert priced.peak_bytes == expected[1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_smallest_peak_is_that_of_enumeration(seed: int) -> None:
    problem = replace(random_problem(seed), memory_bytes=None)
    least = least_peak_by_enumeration(problem)
    if least is None:
        with pytest.raises(InfeasibleError):
            smallest_peak(problem)
        return
    peak, bound = smallest_peak(problem)
    assert peak == least
    assert bound <= least


def block_problem(memory_bytes: int | None, *, tied: bool = False) -> IntraProblem:
    """Two blocks of one op; the backward of each reads what its op gave (10 bytes)."""

    def value(name: str) -> Value:
        return Value(name, ("R",), (10,))

    def op(name: str, window: Window, inputs: tuple[int, ...], output: int, block: int | None = None) -> Op:
        choice = Choice("only", 1.0, (0,) * len(inputs), (0,))
        tie = "block" if tied and block is not None else None
        return Op(name, window, inputs, (output,), (choice,), block, block is not None, tie)

    names = ("x", "a", "ya", "b", "yb", "gb", "ga")
    return IntraProblem(
        values=tuple(map(value, names)),
        ops=(
            op("a", Window.FORWARD, (0,), 1, 0),
            op("out_a", Window.FORWARD, (1,), 2),
            op("b", Window.FORWARD, (2,), 3, 1),
            op("out_b", Window.FORWARD, (3,), 4),
            op("back_b", Window.BACKWARD, (3,), 5),
            op("back_a", Window.BACKWARD, (5, 1), 6),
        ),
        inputs=(Input("x", 0, (InputChoice("R", 0, fixed_bytes=10),)),),
        num_blocks=2,
        memory_bytes=memory_bytes,
    )


def inner_blocks(problem: IntraProblem) -> IntraProblem:
    """The same with the readers inside the blocks, so that what the blocks give inside need not be saved."""
    ops = [replace(op, block=0) if op.name == "out_a" else op for op in problem.ops]
    ops = [replace(op, block=1) if op.name == "out_b" else op for op in ops]
    return replace(problem, ops=tuple(ops))


def test_memory_is_bought_with_recomputation_block_by_block() -> None:
    free = solve_intra(inner_blocks(block_problem(None)))
    assert free.assignment.recompute == (False, False)
    assert free.objective_s == 6.0
    less = solve_intra(inner_blocks(block_problem(free.peak_bytes - 1)))
    assert sum(less.assignment.recompute) >= 1
    assert less.objective_s == 6.0 + sum(less.assignment.recompute)
    assert less.peak_bytes < free.peak_bytes


def test_tied_blocks_are_recomputed_alike() -> None:
    free = solve_intra(inner_blocks(block_problem(None, tied=True)))
    tied = solve_intra(inner_blocks(block_problem(free.peak_bytes - 1, tied=True)))
    assert tied.assignment.recompute == (True, True)


def test_what_does_not_fit_says_what_would() -> None:
    problem = inner_blocks(block_problem(5))
    with pytest.raises(InfeasibleError, match="limit of 5 B") as caught:
        solve_intra(problem)
    peak, _ = smallest_peak(problem)
    assert f"({peak} bytes)" in str(caught.value)
    assert solve_intra(replace(problem, memory_bytes=peak)).peak_bytes <= peak
    with pytest.raises(InfeasibleError):
        solve_intra(replace(problem, memory_bytes=peak - 1))


def two_placements(memory_bytes: int) -> IntraProblem:
    """One weight of 2 GiB, whole and fast or cut and gathered."""
    weight = Value("w", ("R", "S"), (2 * GIB, GIB), {(1, 0): Conversion(5.0)}, overlappable=True)
    choices = (Choice("whole", 1.0, (0,), (0,)), Choice("cut", 3.0, (1,), (0,)))
    return IntraProblem(
        values=(weight, Value("y", ("R",), (8,))),
        ops=(Op("mm", Window.FORWARD, (0,), (1,), choices),),
        inputs=(Input("w", 0, (InputChoice("R", 0, fixed_bytes=2 * GIB), InputChoice("S", 1, fixed_bytes=GIB))),),
        memory_bytes=memory_bytes,
    )


def test_the_price_of_memory_is_the_time_that_a_gib_saves() -> None:
    problem = two_placements(GIB + 100)
    solution = solve_intra(problem)
    assert solution.objective_s == 3.0
    assert memory_price_s_per_gib(problem, solution) == pytest.approx(2.0)
    ample = two_placements(8 * GIB)
    assert memory_price_s_per_gib(ample, solve_intra(ample)) == 0.0


def test_hidden_exchanges_cost_nothing_up_to_the_compute_that_hides_them() -> None:
    gathered = replace(
        two_placements(GIB * 8),
        ops=(Op("mm", Window.FORWARD, (0,), (1,), (Choice("whole", 4.0, (0,), (0,)),)),),
        inputs=(Input("w", 0, (InputChoice("S", 1, fixed_bytes=GIB),)),),
    )
    assert solve_intra(gathered).objective_s == pytest.approx(9.0)
    assert solve_intra(replace(gathered, hidden_share=0.5)).objective_s == pytest.approx(7.0)
    assert solve_intra(replace(gathered, hidden_share=1.0)).objective_s == pytest.approx(5.0)
    assert solve_intra(replace(gathered, hidden_share=1.0, num_microbatches=3)).objective_s == pytest.approx(15.0)


def test_missing_conversions_are_told_from_missing_memory() -> None:
    problem = two_placements(8 * GIB)
    ops = (replace(problem.ops[0], choices=problem.ops[0].choices[1:]),)
    inputs = (replace(problem.inputs[0], choices=problem.inputs[0].choices[:1]),)
    with pytest.raises(InfeasibleError, match="convertible"):
        solve_intra(replace(problem, ops=ops, inputs=inputs))


def test_an_answer_that_does_not_cost_what_is_claimed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = solve_module.price

    def dearer(*args: object) -> object:
        priced = real(*args)  # type: ignore[arg-type]
        return replace(priced, time_s=priced.time_s * 2)

    monkeypatch.setattr(solve_module, "price", dearer)
    with pytest.raises(SolverError, match=r"HiGHS says 2\.99.* s and the price is 6\.0 s"):
        solve_intra(two_placements(GIB + 100))


def test_without_time_the_smallest_assignment_is_taken_and_its_gap_told() -> None:
    problem = inner_blocks(block_problem(None))
    peak, _ = smallest_peak(problem)
    table = make_timetable(problem)
    search = solve_module._Search(replace(problem, memory_bytes=peak), table, recompute=True, limit=peak, end_s=0.0)
    solution = search.take_smallest()
    assert solution is not None
    assert solution.status == "limit"
    assert solution.peak_bytes == peak
    assert solution.gap > 0
    tighter = replace(problem, memory_bytes=peak - 1)
    less = solve_module._Search(tighter, table, recompute=True, limit=peak - 1, end_s=0.0)
    assert less.take_smallest() is None

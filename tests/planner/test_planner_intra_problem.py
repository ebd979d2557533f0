"""What a problem must be, and the order of a step."""

from __future__ import annotations

from typing import Any

import pytest

from partita.errors import InputError
from partita.planner.intra import (
    Choice,
    Input,
    InputChoice,
    IntraProblem,
    Op,
    Value,
    Window,
    make_timetable,
)


def parts(**changes: Any) -> dict[str, Any]:
    choice = Choice("only", 1.0, (0,), (0,))
    return {
        "values": tuple(Value(name, ("R",), (4,)) for name in ("x", "a", "b", "g")),
        "ops": (
            Op("f", Window.FORWARD, (0,), (1,), (choice,), 0, True),
            Op("h", Window.FORWARD, (1,), (2,), (choice,), 0, False),
            Op("back", Window.BACKWARD, (1,), (3,), (choice,)),
        ),
        "inputs": (Input("x", 0, (InputChoice("R", 0, 0),), 3),),
        "num_blocks": 1,
        **changes,
    }


def test_a_step_runs_a_blocks_ops_again_before_they_are_read() -> None:
    table = make_timetable(IntraProblem(**parts()))
    assert table.steps == [(0, False), (1, False), (0, True), (2, False)]
    assert table.inner == [None, 0, None, None]
    assert table.saved == [1]
    assert (table.forward[1].first, table.forward[1].last) == (1, 1)
    assert (table.backward[1].first, table.backward[1].last) == (3, 3)
    assert table.backward[0].reruns == [(0, 0)]


def test_an_alias_keeps_what_it_is_part_of_alive() -> None:
    values = [Value(name, ("R",), (4,)) for name in ("x", "a", "b", "g")]
    values[2] = Value("b", ("R",), (4,), alias_of=1)
    last = Op("late", Window.FORWARD, (2,), (), (Choice("only", 1.0, (0,), ()),))
    ops = (*parts()["ops"][:2], last, parts()["ops"][2])
    table = make_timetable(IntraProblem(**parts(values=tuple(values), ops=ops)))
    assert table.forward[1].last == table.position[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_share": 1.5}, "hidden_share"),
        ({"num_microbatches": 0}, "num_microbatches"),
        ({"num_in_flight": 2}, "num_in_flight"),
        ({"num_blocks": 0}, "block 0"),
        ({"ops": tuple(reversed(parts()["ops"]))}, "after backward ones|before it is there"),
        ({"values": (*parts()["values"][:3], Value("g", ("R",), ()))}, "bytes"),
        ({"inputs": (Input("x", 0, (InputChoice("R", 0),), 3),)}, "placements"),
        ({"inputs": (Input("x", 0, (), None),)}, "choice"),
        ({"inputs": parts()["inputs"] * 2}, "one source"),
        ({"ops": (*parts()["ops"], Op("f", Window.BACKWARD, (0,), (1,), ()))}, "there already"),
        ({"ops": (Op("f", Window.FORWARD, (0,), (1,), (Choice("c", 1.0, (7,), (0,)),)), *parts()["ops"][1:])}, "place"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        IntraProblem(**parts(**changes))


def test_tied_ops_need_equally_many_choices() -> None:
    one, two, back = parts()["ops"]
    choice = one.choices[0]
    tied = (
        Op(one.name, one.window, one.inputs, one.outputs, (choice, choice), 0, True, "t"),
        Op(two.name, two.window, two.inputs, two.outputs, (choice,), 0, False, "t"),
        back,
    )
    with pytest.raises(InputError, match="tied"):
        IntraProblem(**parts(ops=tied))

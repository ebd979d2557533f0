"""`check`: valid programs pass, broken ones are named, and no mutation that passes may change the result."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.errors import ProgramError
from partita.program import ProgramSet, check, lower
from partita.program.instructions import (
    AllReduce,
    Free,
    Instruction,
    Program,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Slice,
    TensorSpec,
    Update,
)
from partita.program.order import check_order

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import CASES, Job, captured, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")

ONE = TensorSpec((2,), torch.float32)
PLANS = {
    "grid": ("partly", {"data": 2, "pipeline": 2, "processes": (0, 0, 1, 1), "microbatches": 2}),
    "one_process": ("partly", {"data": 2, "pipeline": 2}),
    "exchanges": ("batch_norm", {"data": 2, "processes": (0, 1)}),
}


def program(worker: int, *instructions: Instruction, process: int = 0, loss: str = "") -> Program:
    return Program(worker, process, 0, instructions, (), loss)


def programs(*items: Program) -> ProgramSet:
    return ProgramSet(items, {})


@functools.cache
def valid(name: str):
    case, options = PLANS[name]
    model, graph, batches = captured(CASES[case], 8)
    made = lower(graph, make_plan(graph, **options))
    return model, graph, batches, made


def changed(made: ProgramSet, worker: int, instructions: list[Instruction]) -> ProgramSet:
    items = [
        dataclasses.replace(item, instructions=tuple(instructions)) if item.worker == worker else item
        for item in made.programs
    ]
    return dataclasses.replace(made, programs=tuple(items))


def result(name: str, made: ProgramSet, seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    model, graph, batches, _ = valid(name)
    torch.manual_seed(5)
    job = Job(graph, made, model, seed=seed)
    job.step(batches[0], 0.1)
    return job.memory


@functools.cache
def right_result(name: str) -> dict[int, dict[str, torch.Tensor]]:
    return result(name, valid(name)[3])


def caught_or_harmless(name: str, made: ProgramSet) -> None:
    try:
        check(made)
        check_order(made)
    except ProgramError:
        return
    for seed in range(2):
        for process, memory in result(name, made, seed).items():
            for register, value in memory.items():
                torch.testing.assert_close(value, right_result(name)[process][register])


@pytest.mark.parametrize("name", PLANS)
def test_valid_programs_pass(name: str) -> None:
    check(valid(name)[3])
    check_order(valid(name)[3])


MUTATIONS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@MUTATIONS
@given(st.sampled_from(list(PLANS)), st.data())
def test_a_dropped_instruction_is_caught_or_harmless(name: str, data: st.DataObject) -> None:
    made = valid(name)[3]
    item = data.draw(st.sampled_from(made.programs))
    index = data.draw(st.integers(0, len(item.instructions) - 1))
    instructions = list(item.instructions)
    del instructions[index]
    caught_or_harmless(name, changed(made, item.worker, instructions))


@MUTATIONS
@given(st.sampled_from(list(PLANS)), st.data())
def test_swapped_instructions_are_caught_or_harmless(name: str, data: st.DataObject) -> None:
    made = valid(name)[3]
    item = data.draw(st.sampled_from(made.programs))
    places = st.integers(0, len(item.instructions) - 1)
    first, second = data.draw(places), data.draw(places)
    instructions = list(item.instructions)
    instructions[first], instructions[second] = instructions[second], instructions[first]
    caught_or_harmless(name, changed(made, item.worker, instructions))


@MUTATIONS
@given(st.sampled_from(["grid", "one_process"]), st.data())
def test_a_retargeted_message_is_caught(name: str, data: st.DataObject) -> None:
    made = valid(name)[3]
    item = data.draw(st.sampled_from(made.programs))
    places = [i for i, instruction in enumerate(item.instructions) if isinstance(instruction, (Send, Recv))]
    index = data.draw(st.sampled_from(places))
    instruction = item.instructions[index]
    assert isinstance(instruction, (Send, Recv))
    peer = data.draw(st.sampled_from([p for p in range(-1, len(made.programs) + 1) if p != instruction.peer]))
    instructions = list(item.instructions)
    instructions[index] = dataclasses.replace(instruction, peer=peer)
    with pytest.raises(ProgramError):
        check(changed(made, item.worker, instructions))


@MUTATIONS
@given(st.sampled_from(list(PLANS)), st.data())
def test_another_group_or_key_is_caught(name: str, data: st.DataObject) -> None:
    made = valid(name)[3]
    item = data.draw(st.sampled_from(made.programs))
    kinds = (AllReduce, ReduceScatter)
    places = [i for i, one in enumerate(item.instructions) if isinstance(one, kinds) and len(one.group) > 1]
    if not places:
        return
    index = data.draw(st.sampled_from(places))
    instruction = item.instructions[index]
    assert isinstance(instruction, kinds)
    wrong = data.draw(
        st.sampled_from([{"key": "another"}, {"group": (item.worker,)}, {"group": (*instruction.group, 99)}])
    )
    instructions = list(item.instructions)
    instructions[index] = dataclasses.replace(instruction, **wrong)
    with pytest.raises(ProgramError):
        check(changed(made, item.worker, instructions))


def test_a_deadlock_names_who_waits_for_whom() -> None:
    wait = [program(w, Recv("n:a", 1 - w, "a", ONE), Send("n:a", 1 - w, "a", ONE), Free(("n:a",))) for w in range(2)]
    with pytest.raises(ProgramError, match=r"worker 0, instruction 0 \(Recv\) waits.*worker 1.*waits.*worker 0"):
        check(programs(*wait))


def test_collectives_in_another_order_deadlock() -> None:
    first, second = (AllReduce((), (), (0, 1), key) for key in ("a", "b"))
    with pytest.raises(ProgramError, match=r"deadlock.*'a'.*\[1\].*'b'.*\[0\]"):
        check(programs(program(0, first, second), program(1, second, first)))


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((Send("n:a", 1, "a", ONE),), "reads 'n:a'"),
        ((Free(("n:a",)),), "reads 'n:a'"),
        ((Send("p:w", 1, "a", ONE),), "is not"),
        ((Send("p:w", 7, "a", ONE),), "existing receiver"),
        ((Run("nothing", (), (), None, 0, 0, ()),), "segment of the set"),  # type: ignore[arg-type]
        ((AllReduce((), (), (1, 2), "a"),), "group"),
    ],
)
def test_a_broken_program_says_what_must_hold(instructions: tuple[Instruction, ...], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check(programs(program(0, *instructions), program(1)))


def test_a_message_of_another_shape_is_caught() -> None:
    receiver = program(1, Recv("n:a", 0, "a", TensorSpec((3,), torch.float32)), Free(("n:a",)))
    with pytest.raises(ProgramError, match="sent"):
        check(programs(program(0, Send("p:w", 1, "a", ONE)), receiver))


def test_a_register_that_stays_is_named() -> None:
    receiver = program(1, Recv("n:a", 0, "a", ONE))
    with pytest.raises(ProgramError, match=r"still holds.*n:a"):
        check(programs(program(0, Send("p:w", 1, "a", ONE)), receiver))


def test_an_element_that_nobody_updates_is_named() -> None:
    parts = (Slice("w", 0, 1),)
    scatter = ReduceScatter(("p:w",), (ONE,), (0,), "g", parameters=("w",), slices=(parts,), replicated=(False,))
    with pytest.raises(ProgramError, match=r"'w'.*exactly once.*of 2 elements"):
        check(programs(program(0, scatter, Update(parts), Free(("g:0",)))))

"""The engine on hand-made programs: every instruction, accumulation, feeds, updates, failures, time-outs."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from runtime_cases import engine, no_update, plan_for, program, program_set, run, segment, spec

from partita.errors import InputError, PlanError, ProgramError, StepError, WaitTimeoutError, WorkerError
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Draw,
    Feed,
    Free,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Slice,
    TensorSpec,
    Update,
)
from partita.runtime.engine import Engine, State

SQUARE = segment("square", lambda x: ((x * x).sum(),), torch.ones(2, 3))
SAME = segment("same", lambda x: (x.view(6),), torch.ones(2, 3))


def test_feed_run_and_loss() -> None:
    batch = torch.arange(12.0).view(4, 3)
    feeds = [Feed("x:0@0", leaf=0, dim=0, start=2, length=2)]
    programs = program_set([program(0, [run(SQUARE, ["x:0@0"], ["n:loss"])], feeds=feeds)], [SQUARE])
    with engine(programs) as machine:
        assert machine.step([batch]).loss == (batch[2:] ** 2).sum()
        assert machine.step({0: batch[1:]}, row_offsets={0: 1}).loss == (batch[2:] ** 2).sum()
        with pytest.raises(InputError, match=r"entries 2:4 .* shape is \(3, 3\)"):
            machine.step([batch[:3]])
        assert machine.step([batch]).loss == (batch[2:] ** 2).sum()  # bad input does not spoil the engine


def test_accumulation_adds_over_microbatches_without_touching_what_a_segment_returned() -> None:
    feeds = [Feed(f"x:0@{k}", leaf=0, dim=0, start=2 * k, length=2) for k in range(3)]
    steps = [run(SAME, [f"x:0@{k}"], ["n:total"], accumulate=True, microbatch=k) for k in range(3)]
    programs = program_set([program(0, steps, feeds=feeds, loss="n:total")], [SAME])
    batch = torch.arange(18.0).view(6, 3)
    before = batch.clone()
    with engine(programs) as machine:
        for _ in range(3):  # `SAME` returns a view of the batch, so adding in place would change the batch
            assert torch.equal(machine.step([batch]).loss, before.view(3, 6).sum(0))
            assert torch.equal(batch, before)


def test_a_sent_value_is_not_changed_by_later_accumulation() -> None:
    """Values are handed over by reference: after a send, addition must make a new tensor."""
    feeds = [Feed(f"x:0@{k}", leaf=0, dim=0, start=2 * k, length=2) for k in range(3)]
    add = [run(SAME, [f"x:0@{k}"], ["n:total"], accumulate=True, microbatch=k) for k in range(3)]
    what = TensorSpec((6,), torch.float32)
    sender = program(
        0, [add[0], add[1], Send("n:total", 1, "v", what), add[2], AllReduce((), (), (0, 1), "b")], feeds=feeds, loss=""
    )
    receiver = program(1, [AllReduce((), (), (0, 1), "b"), Recv("n:loss", 0, "v", what)])
    with engine(program_set([sender, receiver], [SAME])) as machine:
        batch = torch.arange(18.0).view(6, 3)
        assert torch.equal(machine.step([batch]).loss, batch.view(3, 6)[:2].sum(0))


def _many(num_workers: int, instruction: Any, width: int, result: str) -> Any:
    """Every worker feeds its own row of leaf 0, executes `instruction`; the loss of worker 0 is `result`."""
    feeds = [[Feed("x:0@0", leaf=0, dim=0, start=worker, length=1)] for worker in range(num_workers)]
    return program_set(
        [
            program(worker, [instruction], feeds=feeds[worker], loss=result if worker == 0 else "")
            for worker in range(num_workers)
        ]
    )


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("width", [3, 20_000])  # summed by everybody, and by ranges
def test_all_reduce_is_the_same_sum_on_all_workers(num_workers: int, width: int) -> None:
    group = tuple(range(num_workers))
    what = TensorSpec((1, width), torch.float32)
    reduce = AllReduce(("x:0@0",), (what,), group, "sum", outputs=("n:out",))
    programs = _many(num_workers, reduce, width, "n:out")
    batch = torch.randn(num_workers, width)
    with engine(programs) as machine:
        for _ in range(3):
            total = machine.step([batch]).loss
            torch.testing.assert_close(total, batch.sum(0, keepdim=True))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_all_gather_and_all_to_all(num_workers: int) -> None:
    group = tuple(range(num_workers))
    batch = torch.randn(num_workers, 2 * num_workers)
    what = TensorSpec((1, 2 * num_workers), torch.float32)
    ones, twos = (1,) * num_workers, (2,) * num_workers
    with engine(_many(num_workers, AllGather("x:0@0", "n:out", what, group, "g", 0, ones), 0, "n:out")) as machine:
        assert torch.equal(machine.step([batch]).loss, batch)
    turn = AllToAll("x:0@0", "n:out", what, group, "t", 0, ones, 1, twos)
    with engine(_many(num_workers, turn, 0, "n:out")) as machine:
        assert torch.equal(machine.step([batch]).loss, batch[:, :2])


def test_reduce_scatter_along_a_dim_with_unequal_sizes() -> None:
    what = TensorSpec((1, 5), torch.float32)
    scatter = ReduceScatter(("x:0@0",), (what,), (0, 1), "s", outputs=("n:out",), dim=1, sizes=(2, 3))
    batch = torch.randn(2, 5)
    with engine(_many(2, scatter, 5, "n:out")) as machine:
        torch.testing.assert_close(machine.step([batch]).loss, batch.sum(0, keepdim=True)[:, :2])


def _training_programs() -> Any:
    """Two workers with half a batch each: gradients of ``sum(x @ w)`` and of a replicated bias, by slices."""
    part = segment(
        "grad", lambda x, w: ((x @ w).sum(), x.sum(0).view(3, 1), torch.ones(2)), torch.ones(2, 3), torch.ones(3, 1)
    )
    specs = (TensorSpec((3, 1), torch.float32), TensorSpec((2,), torch.float32))
    slices = ((Slice("w", 0, 2),), (Slice("w", 2, 3), Slice("b", 0, 2)))
    scatter = ReduceScatter(
        ("n:w", "n:b"), specs, (0, 1), "grads", parameters=("w", "b"), slices=slices, replicated=(False, True)
    )
    loss = AllReduce(("n:loss",), (TensorSpec((), torch.float32),), (0, 1), "loss")
    programs = [
        program(
            worker,
            [run(part, ["x:0@0", "p:w"], ["n:loss", "n:w", "n:b"]), loss, scatter, Update(slices[worker])],
            feeds=[Feed("x:0@0", leaf=0, dim=0, start=2 * worker, length=2)],
        )
        for worker in range(2)
    ]
    return program_set(programs, [part])


def _descend(parameters: dict[str, Tensor]) -> Any:
    def update(worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
        for item, gradient in zip(slices, gradients, strict=True):
            parameters[item.parameter].view(-1)[item.start : item.end].sub_(gradient.view(-1))

    return update


def test_gradients_are_reduced_and_applied_by_slices() -> None:
    parameters = {"w": torch.zeros(3, 1), "b": torch.zeros(2)}
    batch = torch.randn(4, 3)
    with engine(_training_programs(), parameters=parameters, update=_descend(parameters)) as machine:
        first = machine.step([batch])
        assert first.loss == 0 and first.timeline is None and first.bytes_sent == 0
        torch.testing.assert_close(parameters["w"], -batch.sum(0).view(3, 1))
        assert torch.equal(parameters["b"], torch.full((2,), -1.0))  # replicated: not added up
        second = machine.step([batch], update=False)
        torch.testing.assert_close(second.loss, -(batch @ batch.sum(0)).sum())
        assert torch.equal(parameters["b"], torch.full((2,), -1.0))


def test_accumulate_only_adds_to_the_next_update() -> None:
    parameters = {"w": torch.zeros(3, 1), "b": torch.zeros(2)}
    batch = torch.randn(4, 3)
    with engine(_training_programs(), parameters=parameters, update=_descend(parameters)) as machine:
        machine.step([batch], accumulate_only=True)
        machine.step([batch], accumulate_only=True)
        assert not parameters["w"].any()
        machine.step([batch])
        torch.testing.assert_close(parameters["w"], -3 * batch.sum(0).view(3, 1))
        machine.step([batch])  # nothing is left of the earlier ones
        torch.testing.assert_close(parameters["w"], -4 * batch.sum(0).view(3, 1))


def test_timeline_has_one_event_per_instruction_in_order() -> None:
    parameters = {"w": torch.zeros(3, 1), "b": torch.zeros(2)}
    with engine(_training_programs(), parameters=parameters, update=_descend(parameters)) as machine:
        timeline = machine.step([torch.randn(4, 3)], record=True).timeline
    assert timeline is not None
    for worker in range(2):
        events = timeline.of_worker(worker)
        assert [event.kind for event in events] == ["Run", "AllReduce", "ReduceScatter", "Update"]
        assert [event.index for event in events] == [0, 1, 2, 3]
        assert all(0 <= event.start_s <= event.end_s <= timeline.step_time_s for event in events)
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(events))


def test_buffers_are_written_back_after_the_step_and_only_if_asked() -> None:
    part = segment("count", lambda b: (b + 1, b.sum()), torch.zeros(2))
    programs = program_set(
        [program(0, [run(part, ["b:count"], ["n:count", "n:loss"])], buffers={"count": "n:count"})], [part]
    )
    buffers = {"count": torch.zeros(2)}
    with engine(programs, buffers=buffers) as machine:
        machine.step([], commit_buffers=False)
        assert not buffers["count"].any()
        machine.step([])
        assert torch.equal(buffers["count"], torch.ones(2))


def test_receiving_a_parameter_overwrites_it_in_place() -> None:
    part = segment("twice", lambda x: (x * 2,), torch.ones(2))
    what = TensorSpec((2,), torch.float32)
    sender = program(0, [run(part, ["p:w"], ["n:loss"]), Send("n:loss", 1, "w", what)])
    receiver = program(1, [Recv("p:w", 0, "w", what)], loss="")
    parameters = {"w": torch.ones(2)}
    with engine(program_set([sender, receiver], [part]), parameters=parameters) as machine:
        machine.step([])
        machine.step([])
    assert torch.equal(parameters["w"], torch.full((2,), 4.0))


def test_free_drops_registers() -> None:
    programs = program_set(
        [program(0, [run(SQUARE, ["x:0@0"], ["n:loss"]), Free(("x:0@0",))], feeds=[Feed("x:0@0", leaf=0)])], [SQUARE]
    )
    seen: dict[str, bool] = {}
    with engine(programs) as machine:
        ops = machine.workers[0].ops
        ops.append(lambda registers: seen.update(freed="x:0@0" not in registers))
        machine.step([torch.ones(2, 3)])
    assert seen == {"freed": True}


# Randomness ------------------------------------------------------------------------------------------------------


def test_draws_and_random_segments_give_plain_numbers_and_leave_the_generator_where_plain_leaves_it() -> None:
    drawn = segment("draw", lambda: (torch.rand(2, 3),))
    part = segment(
        "noise", lambda x, d: ((x + d + torch.bernoulli(x)).sum(),), torch.rand(2, 3), torch.rand(2, 3), random=True
    )
    one = TensorSpec((2, 3), torch.float32)
    feeds = [Feed("x:0@0", leaf=0), Feed("d:u@0", draw="u")]
    programs = program_set(
        [program(0, [run(part, ["x:0@0", "d:u@0"], ["n:loss"])], feeds=feeds)],
        [part],
        draws=(Draw(name="u", module=drawn.module, spec=one),),
    )
    batch = torch.rand(2, 3)
    torch.manual_seed(5)
    expected = [(batch + torch.rand(2, 3) + torch.bernoulli(batch)).sum() for _ in range(3)]
    after = torch.rand(4)
    torch.manual_seed(5)
    with engine(programs) as machine:
        for value in expected:
            assert torch.equal(machine.step([batch]).loss, value)
    assert torch.equal(torch.rand(4), after)


# Failures --------------------------------------------------------------------------------------------------------


def _two_that_meet(part: Any) -> Any:
    barrier = AllReduce((), (), (0, 1), "meet")
    feeds = [Feed("x:0@0", leaf=0)]
    return program_set(
        [
            program(0, [run(part, ["x:0@0"], ["n:loss"]), barrier], feeds=feeds),
            program(1, [barrier], loss=""),
        ],
        [part],
    )


def _install(machine: Engine, worker: int, index: int, op: Any) -> None:
    machine.workers[worker].ops[index] = op


def test_an_exception_in_a_worker_ends_all_with_its_cause() -> None:
    with engine(_two_that_meet(SQUARE)) as machine:
        machine.step([torch.ones(2, 3)])

        def broken(registers: Any) -> None:
            raise ValueError("the user's own words")

        _install(machine, 0, 0, broken)
        with pytest.raises(WorkerError, match=r"worker 0 \(process 0, stage 0\) .*Run square@0 .*own words") as caught:
            machine.step([torch.ones(2, 3)])
        assert isinstance(caught.value.__cause__, ValueError)
        for worker in machine.workers:
            assert not worker.thread.is_alive()
        with pytest.raises(StepError, match=r"cannot step again.*own words"):
            machine.step([torch.ones(2, 3)])


def test_a_wait_past_its_limit_names_who_waits_for_whom() -> None:
    with engine(_two_that_meet(SQUARE), timeout_s=0.3) as machine:
        release = threading.Event()
        _install(machine, 0, 0, lambda registers: release.wait(10))
        try:
            with pytest.raises(WaitTimeoutError) as caught:
                machine.step([torch.ones(2, 3)])
        finally:
            release.set()
        message = str(caught.value)
        assert "Worker 1 must not wait longer than timeout_s=0.3 in instruction 0 (AllReduce meet)" in message
        assert "worker 0 is at instruction 0 (Run square@0 forward)" in message


def test_a_receive_past_its_limit_names_the_sender() -> None:
    what = TensorSpec((2,), torch.float32)
    programs = program_set([program(0, [], loss="p:w"), program(1, [Recv("n:v", 0, "late", what)], loss="")])
    with (
        engine(programs, parameters={"w": torch.zeros(2)}, timeout_s=0.2) as machine,
        pytest.raises(
            WaitTimeoutError, match=r"Recv late from 0.*worker\(s\) 0 did not come.*worker 0 is not in a step"
        ),
    ):
        machine.step([])


def test_an_exception_in_the_update_is_a_worker_error() -> None:
    def refuse(worker: int, slices: Any, gradients: Any) -> None:
        raise RuntimeError(f"no update for {slices[0].parameter}")

    parameters = {"w": torch.zeros(3, 1), "b": torch.zeros(2)}
    with (
        engine(_training_programs(), parameters=parameters, update=refuse) as machine,
        pytest.raises(WorkerError, match="no update for"),
    ):
        machine.step([torch.randn(4, 3)])


def test_closed_engines_refuse_and_closing_twice_is_harmless() -> None:
    machine = engine(_two_that_meet(SQUARE))
    machine.close()
    machine.close()
    assert not any(worker.thread.is_alive() for worker in machine.workers)
    with pytest.raises(StepError, match="close"):
        machine.step([torch.ones(2, 3)])


def test_an_engine_checks_what_it_is_given() -> None:
    programs = program_set([program(0, [run(SQUARE, ["p:w"], ["n:loss"])])], [SQUARE])
    with pytest.raises(PlanError, match="'p:w' is missing"):
        engine(programs)
    with pytest.raises(PlanError, match="process 1 has none"):
        engine(programs, process=1, parameters={"w": torch.ones(2, 3)})
    with pytest.raises(ProgramError, match="must have the loss"):
        engine(program_set([program(0, [], loss="")]))
    with pytest.raises(PlanError, match="transport"):
        engine(program_set([program(0, [], loss="p:w"), program(1, [], process=1)]), parameters={"w": torch.ones(1)})


def test_workers_compute_without_recording_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    programs = program_set([program(0, [run(SQUARE, ["p:w"], ["n:loss"])])], [SQUARE])
    with engine(programs, parameters={"w": weight}) as machine:
        assert not machine.step([]).loss.requires_grad
    assert torch.is_grad_enabled()


# Stress ----------------------------------------------------------------------------------------------------------


def _random_programs(rng: random.Random, num_workers: int, num_rounds: int) -> Any:
    """Rounds of sums and rotations among random members; also the register that holds each worker's last value."""
    what = TensorSpec((1, 4), torch.float32)
    instructions: list[list[Any]] = [[] for _ in range(num_workers)]
    register = ["x:0@0"] * num_workers
    for turn in range(num_rounds):
        members = sorted(rng.sample(range(num_workers), rng.randint(2, num_workers)))
        kind = rng.choice(["reduce", "rotate"])
        if kind == "reduce":
            for worker in members:
                names = ((register[worker],), (what,), tuple(members), f"r{turn}")
                instructions[worker].append(AllReduce(*names, outputs=(f"n:{turn}",)))
        else:
            for index, worker in enumerate(members):
                peer = members[(index + 1) % len(members)]
                instructions[worker].append(Send(register[worker], peer, f"m{turn}", what))
            for index, worker in enumerate(members):
                instructions[worker].append(Recv(f"n:{turn}", members[index - 1], f"m{turn}", what))
        for worker in members:
            register[worker] = f"n:{turn}"
    return instructions, register


def _expected(instructions: list[list[Any]], batch: Tensor) -> list[dict[str, Tensor]]:
    """The same programs, one instruction at a time."""
    values = [{"x:0@0": batch[worker : worker + 1]} for worker in range(len(batch))]
    rounds = max(int(i.key[1:]) for part in instructions for i in part)
    for turn in range(rounds + 1):
        here = [(w, i) for w, part in enumerate(instructions) for i in part if i.key[1:] == str(turn)]
        sums = [values[w][i.registers[0]] for w, i in here if isinstance(i, AllReduce)]
        sent = {(w, i.peer): values[w][i.register] for w, i in here if isinstance(i, Send)}
        for worker, instruction in here:
            if isinstance(instruction, AllReduce):
                values[worker][f"n:{turn}"] = torch.stack(sums).sum(0)
            elif isinstance(instruction, Recv):
                values[worker][f"n:{turn}"] = sent[instruction.peer, worker]
    return values


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_with_random_delays(seed: int) -> None:
    rng = random.Random(seed)
    num_workers = rng.choice([2, 3, 4])
    instructions, last = _random_programs(rng, num_workers, 12)
    feeds = [[Feed("x:0@0", leaf=0, dim=0, start=worker, length=1)] for worker in range(num_workers)]
    programs = program_set([program(w, instructions[w], feeds=feeds[w], loss=last[w]) for w in range(num_workers)])
    batch = torch.rand(num_workers, 4).double().float()
    expected = _expected(instructions, batch)
    with engine(programs) as machine:
        for worker in machine.workers:
            worker.ops[:] = [_delayed(op, rng.random() * 3e-4) for op in worker.ops]
        for _ in range(60):
            machine.step([batch])
            outcome = machine.step([batch])
            torch.testing.assert_close(outcome.loss, expected[0][last[0]])


def _delayed(op: Any, delay_s: float) -> Any:
    def run_later(registers: Any) -> None:
        if delay_s > 1e-4:
            time.sleep(delay_s)
        op(registers)

    return run_later


def test_helpers_agree_with_torch() -> None:
    assert spec(torch.ones(2)) == TensorSpec((2,), torch.float32)
    programs = program_set([program(0, [], loss="p:w")])
    assert isinstance(run(SQUARE, ["x"], ["y"]), Run)
    state = State(parameters={"w": torch.ones(1)})
    with Engine(programs, plan_for(programs), process=0, state=state, update=no_update) as machine:
        assert machine.step([]).loss == 1

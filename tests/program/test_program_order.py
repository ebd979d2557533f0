"""`check_order`: programs that run to their end, but for some order of their workers with a wrong value."""

from __future__ import annotations

import pytest
import torch

from partita.errors import ProgramError
from partita.graph.graph import Phase
from partita.graph.storages import GraphMemory
from partita.program import ProgramSet
from partita.program.check import check_flow
from partita.program.instructions import (
    AllReduce,
    Feed,
    Free,
    Instruction,
    Program,
    Recv,
    ReduceScatter,
    Run,
    Segment,
    Send,
    Slice,
    TensorSpec,
    Update,
)
from partita.program.order import check_order

WEIGHT = TensorSpec((2,), torch.float32)
MODULE = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
SEGMENT = Segment("s", MODULE, (WEIGHT,), (WEIGHT,), 0, 0, GraphMemory())
WHOLE = (Slice("w", 0, 2),)


def run(output: str, source: str = "p:w", *, adds: bool = False) -> Run:
    return Run("s", (source,), (output,), Phase.BACKWARD, 0, 0, (adds,))


def scatter(*group: int, slices: tuple[tuple[Slice, ...], ...] = (WHOLE,)) -> ReduceScatter:
    names, key = ("n:w",), f"g{group}"
    return ReduceScatter(names, (WEIGHT,), group, key, parameters=("w",), slices=slices, replicated=(False,))


def barrier(*group: int) -> AllReduce:
    return AllReduce((), (), group, "barrier")


def both(*lists: tuple[Instruction, ...], processes: tuple[int, ...] = (0, 0)) -> ProgramSet:
    items = [Program(w, processes[w], 0, tuple(instructions), ()) for w, instructions in enumerate(lists)]
    return ProgramSet(tuple(items), {"s": SEGMENT})


END = (Update(WHOLE), Free(("g:0", "n:w")))
READER = (run("n:w"), Free(("n:w",)))


def test_an_update_beside_a_read_in_the_same_process_is_a_race() -> None:
    racing = both((run("n:w"), scatter(0), *END), READER)
    check_flow(racing)
    with pytest.raises(ProgramError, match=r"worker 0, instruction 2 may change 'p:w' while worker 1"):
        check_order(racing)


def test_a_barrier_between_them_is_enough() -> None:
    check_order(both((run("n:w"), scatter(0), barrier(0, 1), *END), (*READER, barrier(0, 1))))


def test_workers_of_different_processes_have_weights_of_their_own() -> None:
    check_order(both((run("n:w"), scatter(0), *END), READER, processes=(0, 1)))


def test_a_message_orders_as_well() -> None:
    told = Recv("n:x@0", 1, "x", WEIGHT)
    reader = (run("n:x@0"), Send("n:x@0", 0, "x", WEIGHT), Free(("n:x@0",)))
    writer = (run("n:w"), scatter(0), told, run("n:y@0", "n:x@0"), Send("n:y@0", 1, "y", WEIGHT))
    reader = (*reader, Recv("n:y@0", 0, "y", WEIGHT), run("n:z", "n:y@0"), Free(("n:y@0", "n:z")))
    check_order(both((*writer, Free(("n:x@0", "n:y@0")), *END), reader))


def test_half_a_gradient_is_not_applied() -> None:
    unsummed = tuple((run("n:w"), scatter(w), *END) for w in range(2))
    check_flow(both(*unsummed, processes=(0, 1)))
    with pytest.raises(ProgramError, match=r"'w' with the sum over workers \[0, 1\]"):
        check_order(both(*unsummed, processes=(0, 1)))


def test_a_gradient_is_not_counted_twice() -> None:
    again = AllReduce(("g:0",), (WEIGHT,), (0, 1), "again")
    once = AllReduce(("g:0",), (WEIGHT,), (0, 1), "once")
    check_order(both(*((run("n:w"), scatter(w), once, *END) for w in range(2)), processes=(0, 1)))
    with pytest.raises(ProgramError, match="twice"):
        check_order(both(*((run("n:w"), scatter(w), once, again, *END) for w in range(2)), processes=(0, 1)))


def test_nothing_is_added_to_a_reduced_gradient() -> None:
    late = (run("n:w", adds=True), scatter(0), run("n:w", adds=True), *END)
    with pytest.raises(ProgramError, match="reduced already"):
        check_order(both(late))


def test_a_received_value_is_read() -> None:
    sender = (run("n:x@0"), Send("n:x@0", 1, "x", WEIGHT), Free(("n:x@0",)))
    unread = both(sender, (Recv("n:x@0", 0, "x", WEIGHT), Free(("n:x@0",))))
    check_flow(unread)
    with pytest.raises(ProgramError, match=r"frees 'n:x@0', written by its instruction 0, which nothing has read"):
        check_order(unread)


def test_a_fed_value_is_read() -> None:
    fed = Program(0, 0, 0, (Free(("x:0@0",)),), (Feed("x:0@0", leaf=0),))
    with pytest.raises(ProgramError, match="fed, which nothing has read"):
        check_order(ProgramSet((fed,), {}))


def test_new_weights_are_sent_after_their_update_only() -> None:
    send, receive = Send("p:w", 1, "p:w", WEIGHT), Recv("p:w", 0, "p:w", WEIGHT)
    head = (run("n:w"), scatter(0))
    check_order(both((*head, *END, send), (*READER, receive), processes=(0, 1)))
    early = both((*head, send, *END), (*READER, receive), processes=(0, 1))
    check_flow(early)
    with pytest.raises(ProgramError, match=r"may send 'p:w' before worker 0 has updated its part"):
        check_order(early)

"""One process of a two-process job for `test_runtime_processes.py`: ``process_script.py RANK PORT MODE``.

Both processes have two workers. Every step adds up the workers' rows in several ways; at step 3 rank 1 may misbehave.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import job_of_two

rank, port, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
job_of_two.enter(rank, port)

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from runtime_cases import plan_for, program, program_set  # noqa: E402

from partita.errors import StepError  # noqa: E402
from partita.program.instructions import (  # noqa: E402
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Feed,
    Recv,
    ReduceScatter,
    Send,
    Slice,
    Start,
    TensorSpec,
    Update,
)
from partita.program.wire import sent_bytes  # noqa: E402
from partita.runtime.engine import Engine, State  # noqa: E402
from partita.runtime.processes import connect  # noqa: E402

ROWS = TensorSpec((1, 4), torch.float32)
GROUP = (0, 1, 2, 3)
PAIRS = ((0, 2), (1, 3))  # two groups over the same processes at once
WORKERS = ((0, 0), (1, 0), (2, 1), (3, 1))  # worker, process


COLUMN = TensorSpec((4, 1), torch.float32)


def programs(loss: str) -> Any:
    made = []
    for worker, process in WORKERS:
        pair = PAIRS[worker % 2]
        peer, slices = pair[1 - pair.index(worker)], tuple((Slice("w", i, i + 1),) for i in range(4))
        instructions = [
            AllReduce(("x:0@0",), (ROWS,), GROUP, "sum", outputs=("n:sum",)),
            AllReduce(("x:0@0",), (ROWS,), pair, f"pair{worker % 2}", outputs=("n:pair",)),
            AllGather("x:0@0", "n:all", ROWS, GROUP, "gather", 0, (1, 1, 1, 1)),
            AllToAll("x:0@0", "n:turned", ROWS, GROUP, "turn", 0, (1, 1, 1, 1), 1, (1, 1, 1, 1)),
            Start(AllReduce(("n:turned",), (COLUMN,), pair, f"column{worker % 2}")),
            Send("n:pair", peer, f"mail{worker}", ROWS),
            Recv("n:mail", peer, f"mail{peer}", ROWS),
            Send("x:1@0", peer, f"flags{worker}", TensorSpec((3,), torch.bool)),
            Recv("n:flags", peer, f"flags{peer}", TensorSpec((3,), torch.bool)),
            Send("x:2@0", peer, f"half{worker}", TensorSpec((2,), torch.bfloat16)),
            Recv("n:half", peer, f"half{peer}", TensorSpec((2,), torch.bfloat16)),
            AllReduce(("x:2@0",), (TensorSpec((2,), torch.bfloat16),), GROUP, "halves", outputs=("n:halves",)),
            ReduceScatter(("n:sum",), (ROWS,), GROUP, "slices", parameters=("w",), slices=slices),
            Update(slices[worker]),
            Await(AllReduce(("n:turned",), (COLUMN,), pair, f"column{worker % 2}")),
            AllReduce((), (), GROUP, "end"),
        ]
        feeds = [Feed("x:0@0", leaf=0, dim=0, start=worker, length=1), Feed("x:1@0", leaf=1), Feed("x:2@0", leaf=2)]
        made.append(program(worker, instructions, feeds=feeds, process=process, loss=loss))
    return program_set(made)


def predicted_bytes(together: Any) -> int:
    """What this process sends in a step."""
    process_of = {one.worker: one.process for one in together.programs}
    collectives: dict[str, Any] = {}
    total = 0
    for one in (item for made in together.programs if made.process == rank for item in made.instructions):
        if isinstance(one, Send):
            total += one.spec.num_bytes
        collective = one.collective if isinstance(one, Start) else one
        if isinstance(collective, (AllReduce, AllGather, AllToAll, ReduceScatter)):
            collectives[collective.key] = collective
    return total + sum(sent_bytes(one, process_of)[rank] for one in collectives.values())


def misbehave(step: int) -> None:
    if rank != (0 if mode == "kill0" else 1) or step != 3:
        return
    if mode == "raise":
        raise ValueError("the user's own words")
    if mode.startswith("kill"):
        os.kill(os.getpid(), 9)
    if mode == "leave":
        os._exit(0)
    if mode == "hang":
        time.sleep(60)


def main() -> None:
    transport = connect(timeout_s=60)
    parameters = {"w": torch.zeros(4)}
    step = 0

    def update(worker: int, slices: Any, gradients: list[torch.Tensor]) -> None:
        misbehave(step)
        parameters["w"][slices[0].start] += gradients[0][0]

    state = State(parameters=parameters)
    timeout_s = 3.0 if mode == "hang" else 40.0
    for loss in ("n:mail", "n:turned") if mode == "ok" else ("n:mail",):  # a second engine on the same transport
        together = programs(loss)
        parameters["w"].zero_()
        engine = Engine(
            together,
            plan_for(together),
            process=rank,
            state=state,
            update=update,
            transport=transport,
            timeout_s=timeout_s,
        )
        for step in range(1, 6):
            batch = torch.arange(16.0).view(4, 4) + step
            leaves = [batch, torch.tensor([True, False, True]), torch.ones(2, dtype=torch.bfloat16)]
            try:
                outcome = engine.step(leaves)
            except StepError as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                raise SystemExit(3) from None
            sums = {"n:mail": batch[0:1] + batch[2:3], "n:turned": batch[:, 0:1] + batch[:, 2:3]}
            assert torch.equal(outcome.loss, sums[loss]), outcome.loss
            assert outcome.bytes_sent == predicted_bytes(together), (outcome.bytes_sent, predicted_bytes(together))
            assert sum(outcome.sent_to.values()) == outcome.bytes_sent and rank not in outcome.sent_to
        mine = torch.arange(16.0).view(4, 4).sum(0) * 5 + 4 * 15
        expected = 4 * mine  # the sum, summed over four workers
        start = 2 * rank
        assert torch.equal(parameters["w"][start : start + 2], expected[start : start + 2]), (parameters, expected)
        engine.close()
    print("done", flush=True)


main()

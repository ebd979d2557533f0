"""One process of a job of two for `test_runtime_ending.py`: ``ending_script.py RANK PORT MODE FOLDER``.

The last function called at the end of the process (the first that is registered) writes down its threads.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import job_of_two

rank, port, mode, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
script_pid = os.getpid()


def write_threads() -> None:
    names = [one.name for one in threading.enumerate()]
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    (folder / f"threads-{rank}{'' if os.getpid() == script_pid else '-fork'}").write_text("\n".join(names))


atexit.register(write_threads)
job_of_two.enter(rank, port)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import partita  # noqa: E402

if mode in ("group of the script", "destroyed by the script"):
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
step = partita.parallelize(
    model,
    optimizer,
    lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    batch,
    plan=partita.Constraints(data=2, pipeline=1, compiled=False),
    timeout_s=30,
)
for _ in range(3):
    step(batch)


def leave(*_: object) -> None:
    if mode == "left":
        sys.exit(5)
    raise KeyboardInterrupt


if mode in ("closed", "group of the script"):
    step.close()
elif mode == "raised":
    raise ValueError("of the script")
elif mode == "fork":
    child = os.fork()
    if child == 0:
        # Must neither say goodbye for its parent nor wait for threads that it does not have. The interpreter itself is
        # not taken down: torch's own groups would then wait for their threads, which are the parent's.
        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    step(batch)
elif mode == "destroyed by the script":
    step.close()
    dist.destroy_process_group()
elif mode in ("left", "interrupted") and rank == 1:
    signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    step(batch)  # the other process does not take part yet, so the worker waits in a message
    while True:
        step(batch)
elif mode in ("left", "interrupted"):
    try:
        threading.Event().wait(1.5)
        while True:
            step(batch)
    except partita.PartitaError as error:
        print(f"told: {error}")
if mode == "group of the script":  # it is as it was
    value = torch.ones(1)
    dist.all_reduce(value)
    assert value.item() == 2
    dist.destroy_process_group()
print("finished")

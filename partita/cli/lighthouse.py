"""`partita lighthouse`: the small server that an elastic job's processes find each other by."""

from __future__ import annotations

import signal
import threading

from partita.cli.output import print_json


def lighthouse(
    *, host: str = "", port: int = 29_510, min_replicas: int = 1, join_s: float = 1.0, json: bool = False
) -> int:
    """Run the lighthouse of an elastic job until it is interrupted. Start it on a machine that stays, and pass the
    address that it prints to the processes as TORCHFT_LIGHTHOUSE.

    Args:
        host: address to listen at; by default all of this machine's.
        port: to listen at; 0: any that is free.
        min_replicas: no step is made by fewer processes.
        join_s: so long living processes are waited for that are not ready yet, seconds. For replicas that agree every
            so many steps, what the slowest may be behind the fastest in these.
        json: print the address as JSON.
    """
    from partita.training.membership import lighthouse as start

    server = start(host, port, min_replicas, join_s)
    if json:
        print_json({"address": server.address()})
    else:
        print(f"export TORCHFT_LIGHTHOUSE={server.address()}", flush=True)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    server.shutdown()
    return 0

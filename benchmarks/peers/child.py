"""The program of a peer's processes: prepares a pair, then steps when it is its turn.

`python -m benchmarks.peers.child --child PEER`, started by `field`.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings

from benchmarks.common import Row
from benchmarks.peers.choose import NUM_WARM_UP_STEPS, Prepared
from benchmarks.peers.roster import BY_NAME
from benchmarks.peers.workload import Workload
from benchmarks.processes import Message, serve


class Contestant:
    """Answers `prepare`, `turn` and `forget`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._module = importlib.import_module(f"benchmarks.peers.{BY_NAME[name].module}")
        self._prepared: Prepared | None = None

    def __call__(self, message: Message) -> Row:
        match message["do"]:
            case "prepare":
                return self._prepare(Workload(message["family"], message["scale"], message.get("arrays")))
            case "turn":
                return self._turn(message["num_steps"])
            case "forget":
                self._forget()
                return {}
        raise ValueError(f"`do` must be prepare, turn or forget, but is {message['do']!r}")

    def _prepare(self, workload: Workload) -> Row:
        warnings.simplefilter("ignore")
        self._forget()
        self._prepared = prepared = self._module.prepare(self.name, workload)
        for _ in range(NUM_WARM_UP_STEPS):
            prepared.step(next(prepared.stream))
        return {"loss": prepared.first_loss, "plan": prepared.plan, "trials_s": prepared.trials_s}

    def _turn(self, num_steps: int) -> Row:
        assert self._prepared is not None, "a pair must be prepared before its turn"
        times_s: list[float] = []
        for _ in range(num_steps + 1):
            batch = next(self._prepared.stream)
            start_s = time.perf_counter()
            self._prepared.step(batch)
            times_s.append(time.perf_counter() - start_s)
        return {"times_s": times_s[1:]}  # the first one finds the caches filled by another peer

    def _forget(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None


if __name__ == "__main__":
    serve(Contestant(sys.argv[sys.argv.index("--child") + 1]))

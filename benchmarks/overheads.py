"""What the runtime takes for itself, against the least that the machine can do it for.

    python -m benchmarks.overheads --json overheads.json

Four things, each with a limit that is measured in turns with it, so that a busy machine slows both alike:

* one instruction: a `Free` of nothing, from steps with many and with few of them; the limit is a loop that calls empty
  functions.
* all-reduce in a process: from the last worker's arrival until all have the sum; the limit is that the same threads
  read and write the same bytes by `torch.add`, each its own part, without waiting for each other.
* hand-over: half a round of a value that two workers send to and fro; the limit is two threads that release each
  other's locks.
* all-reduce across two processes of one worker each; the limit is an exchange of the same bytes over TCP by blocking
  sockets, half of them before and half after they have been added.

Times are medians; `ratio` is ours over the limit, the median of the ratios of the turns.
"""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.common import Report, Row, describe_machine, first_line, median, option_parser, show
from benchmarks.processes import Child, Group, Message, free_port, serve
from benchmarks.random_programs import plan_of
from partita.graph.graph import Phase
from partita.graph.storages import GraphMemory
from partita.program.instructions import (
    AllReduce,
    Free,
    Instruction,
    Program,
    ProgramSet,
    Recv,
    Run,
    Segment,
    Send,
    Slice,
    TensorSpec,
)
from partita.runtime.allocator import keep_freed_memory
from partita.runtime.engine import Engine, State
from partita.runtime.processes import connect
from partita.units import KIB, MIB

NUM_TURNS = 9
SIZES = (4, 256, 4 * KIB, 32 * KIB, 256 * KIB, MIB, 8 * MIB, 64 * MIB)
COLUMNS = ("what", "bytes", "limit_us", "ours_us", "ratio", "ratio_low", "ratio_high", "ours_gb_per_s")
_LOSS = "n:loss"
Turns = list[tuple[float, float]]  # seconds: limit, ours


# Engines of hand-made programs ---------------------------------------------------------------------------------------


def _nothing() -> tuple[Tensor, ...]:
    return (torch.zeros(()),)


def _make_engine(
    instructions: Sequence[Sequence[Instruction]],
    cores: Sequence[int],
    *,
    processes: Sequence[int] | None = None,
    process: int = 0,
    parameters: Mapping[str, Tensor] | None = None,
    transport: Any = None,
) -> Engine:
    """An engine whose workers give a loss of zero and then execute `instructions`."""
    graph = fx.Graph()
    graph.output(graph.call_function(_nothing))
    spec = TensorSpec((), torch.float32)
    segment = Segment("nothing", fx.GraphModule(torch.nn.Module(), graph), (), (spec,), 0, 0, GraphMemory())
    first = Run("nothing", (), (_LOSS,), Phase.FORWARD, 0, 0, (False,))
    processes = processes or [0] * len(instructions)
    programs = tuple(
        Program(worker, processes[worker], 0, (first, *items), (), loss=_LOSS)
        for worker, items in enumerate(instructions)
    )
    plan = plan_of(programs, cores)
    return Engine(
        ProgramSet(programs, {"nothing": segment}),
        plan,
        process=process,
        state=State(parameters=dict(parameters or {})),
        update=_no_update,
        transport=transport,
        compiled=False,
    )


def _no_update(worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
    raise AssertionError("these programs update nothing")


def _step_s(engine: Engine) -> float:
    begin_s = time.perf_counter()
    engine.step(())
    return time.perf_counter() - begin_s


def _in_turns(limit: Callable[[], float], ours: Callable[[], float], num_turns: int = NUM_TURNS) -> Turns:
    """Both, one after the other, several times; once before to warm up."""
    limit(), ours()
    return [(limit(), ours()) for _ in range(num_turns)]


# One instruction -----------------------------------------------------------------------------------------------------


def instruction_turns(cores: Sequence[int]) -> Turns:
    """Seconds of one more instruction in a program of one worker."""
    few, many = 10, 5010
    engines = [_make_engine([[Free(("n:none",))] * number], cores) for number in (few, many)]
    ops: list[Callable[[dict[str, Tensor]], None]] = [_empty] * (many - few)

    def limit() -> float:
        registers: dict[str, Tensor] = {}
        begin_s = time.perf_counter()
        for op in ops:
            op(registers)
        return (time.perf_counter() - begin_s) / len(ops)

    def ours() -> float:
        short, long = (statistics.median(_step_s(engine) for _ in range(7)) for engine in engines)
        return (long - short) / (many - few)

    turns = _in_turns(limit, ours)
    for engine in engines:
        engine.close()
    return turns


def _empty(registers: dict[str, Tensor]) -> None:
    return


# All-reduce in a process ---------------------------------------------------------------------------------------------


def local_turns(num_bytes: int, cores: Sequence[int]) -> Turns:
    """Seconds of an all-reduce of float32 tensors among workers of this process, one a core."""
    num_elements, group = num_bytes // 4, tuple(range(len(cores)))
    repeats = 20 if num_bytes <= MIB else 3
    spec = TensorSpec((num_elements,), torch.float32)
    programs: list[list[Instruction]] = []
    for worker in group:
        once: list[Instruction] = [
            AllReduce((), (), group, "start"),
            AllReduce((f"p:{worker}",), (spec,), group, "sum", (f"n:{worker}",)),
            Free((f"n:{worker}",)),
        ]
        programs.append(once * repeats)
    values = {str(worker): torch.ones(num_elements) for worker in group}
    engine = _make_engine(programs, cores, parameters=values)

    def ours() -> float:
        return median([time_s for _ in range(5 if num_bytes <= MIB else 2) for time_s in _collective_times(engine)])

    turns = _in_turns(_adding(list(values.values()), cores, repeats * 3), ours)
    engine.close()
    return turns


def _collective_times(engine: Engine) -> list[float]:
    """From the arrival of the last member until the last one has the result, for every all-reduce of a step."""
    timeline = engine.step((), record=True).timeline
    assert timeline is not None
    meetings: dict[int, list[Any]] = {}
    for event in timeline.events:
        if event.label == "AllReduce sum":
            meetings.setdefault(event.index, []).append(event)
    return [max(e.end_s for e in events) - max(e.start_s for e in events) for events in meetings.values()]


def _adding(values: Sequence[Tensor], cores: Sequence[int], repeats: int) -> Callable[[], float]:
    """Seconds in which one thread a core reads its part of all values and writes the sum, at once with the others."""
    out = torch.empty_like(values[0])
    edges = [len(out) * index // len(cores) for index in range(len(cores) + 1)]
    parts = [(low, max(high, low + 1)) for low, high in itertools.pairwise(edges)]

    def part_of(index: int) -> Callable[[], None]:
        low, high = parts[index]
        own, target = [value[low:high] for value in values], out[low:high]

        def add() -> None:
            torch.add(own[0], own[1], out=target) if len(own) > 1 else target.copy_(own[0])
            for value in own[2:]:
                target.add_(value)

        return add

    return lambda: _together([part_of(index) for index in range(len(cores))], cores, repeats)


def _together(works: Sequence[Callable[[], None]], cores: Sequence[int], repeats: int) -> float:
    """Seconds that the slowest thread takes for one call of its work."""
    barrier = threading.Barrier(len(works))
    times = [0.0] * len(works)

    def live(index: int) -> None:
        os.sched_setaffinity(0, {cores[index]})
        torch.set_num_threads(1)
        work = works[index]
        work()
        barrier.wait()
        begin_s = time.perf_counter()
        for _ in range(repeats):
            work()
        times[index] = (time.perf_counter() - begin_s) / repeats

    threads = [threading.Thread(target=live, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(times)


# Hand-over -----------------------------------------------------------------------------------------------------------


def handover_turns(cores: Sequence[int], repeats: int = 300) -> Turns:
    """Seconds from a worker's `Send` until the other one's `Recv` has the value."""
    spec = TensorSpec((1,), torch.float32)
    first: list[Instruction] = []
    second: list[Instruction] = []
    for _ in range(repeats):
        first += [Send("p:v", 1, "there", spec), Recv("n:v", 1, "back", spec)]
        second += [Recv("n:v", 0, "there", spec), Send("n:v", 0, "back", spec)]
    engine = _make_engine([first, second], cores, parameters={"v": torch.ones(1)})
    turns = _in_turns(
        lambda: _lock_handover_s(cores, repeats),
        lambda: statistics.median(_step_s(engine) for _ in range(3)) / (2 * repeats),
    )
    engine.close()
    return turns


def _lock_handover_s(cores: Sequence[int], repeats: int) -> float:
    """Half a round of two threads that wait for each other's release of a lock."""
    there, back = threading.Lock(), threading.Lock()
    there.acquire(), back.acquire()

    def first() -> None:
        there.release()
        back.acquire()

    def second() -> None:
        there.acquire()
        back.release()

    return _together([first, second], cores, repeats) / 2


# All-reduce across processes -----------------------------------------------------------------------------------------


class Crossing:
    """One of two processes: its engine's all-reduce, and the raw exchange of the same bytes."""

    def __init__(self, cores: Sequence[int], port: int) -> None:
        self.cores = cores
        self.transport = connect(timeout_s=60.0)
        self.rank = self.transport.rank
        keep_freed_memory()
        torch.set_num_threads(1)
        self.line = _plain_connection(self.rank, port)

    def turns(self, num_bytes: int) -> Turns:
        """All turns for one size; both processes call it together."""
        num_elements, repeats = num_bytes // 4, 30 if num_bytes <= MIB else 2
        spec = TensorSpec((num_elements,), torch.float32)
        programs = [[AllReduce(("p:v",), (spec,), (0, 1), "sum", ("n:v",)), Free(("n:v",))] * repeats for _ in range(2)]
        engine = _make_engine(
            programs, self.cores, processes=(0, 1), process=self.rank, transport=self.transport,
            parameters={"v": torch.ones(num_elements)},
        )  # fmt: skip
        own, other = torch.ones(num_elements), torch.empty(num_elements)

        def raw() -> float:
            begin_s = time.perf_counter()
            for _ in range(repeats):
                _raw_sum(self.line, own, other, self.rank)
            return (time.perf_counter() - begin_s) / repeats

        turns = _in_turns(raw, lambda: _step_s(engine) / repeats)
        engine.close()
        return turns


def _plain_connection(rank: int, port: int) -> socket.socket:
    """A TCP connection of two processes of this machine."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            line, _ = server.accept()
    else:
        deadline_s = time.monotonic() + 30
        while True:
            try:
                line = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


_INLINE_BYTES = 32 * KIB  # less than the system buffers for a connection: sending it does not wait for the other side


def _raw_sum(line: socket.socket, own: Tensor, other: Tensor, rank: int) -> None:
    """Each process gets the other's addends of its half, adds them, and gives the sums of that half."""
    half = len(own) // 2 or len(own)
    mine, theirs = (slice(0, half), slice(half, None)) if rank == 0 else (slice(half, None), slice(0, half))
    if half == len(own):  # one element: each sends it and adds
        _swap(line, own, other)
        torch.add(own, other, out=other)
        return
    _swap(line, own[theirs], other[mine])
    other[mine].add_(own[mine])
    _swap(line, other[mine], other[theirs])


def _swap(line: socket.socket, outgoing: Tensor, incoming: Tensor) -> None:
    """Send one tensor while another one is received."""
    message, answer = memoryview(outgoing.numpy()).cast("B"), memoryview(incoming.numpy()).cast("B")
    if len(message) <= _INLINE_BYTES:
        line.sendall(message)
        _receive(line, answer)
        return
    sender = threading.Thread(target=line.sendall, args=(message,))
    sender.start()
    _receive(line, answer)
    sender.join()


def _receive(line: socket.socket, answer: memoryview) -> None:
    while answer:
        count = line.recv_into(answer)
        if not count:
            raise ConnectionError("the other process has closed the connection")
        answer = answer[count:]


# The programs --------------------------------------------------------------------------------------------------------


class Measured:
    """A child process's answers: `instruction`, `handover`, `local` (with bytes), `crossing` (with bytes and port)."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._crossing: Crossing | None = None

    def answer(self, message: Message) -> Message:
        cores, what = message["cores"], message["what"]
        if what == "one instruction":
            turns = instruction_turns(cores)
        elif what == "hand-over":
            turns = handover_turns(cores)
        elif what == "all-reduce in a process":
            turns = local_turns(message["bytes"], cores)
        else:
            self._crossing = self._crossing or Crossing(cores, message["port"])
            turns = self._crossing.turns(message["bytes"])
        return {"turns": turns}


def row_of(what: str, num_bytes: int | None, turns: Sequence[Sequence[float]]) -> Row:
    """Medians over the turns; the ratio is the median of the ratios, with its quartiles."""
    ratios = sorted(ours / limit for limit, ours in turns)
    ours_s = median([ours for _, ours in turns])
    return {
        "what": what,
        "bytes": num_bytes,
        "limit_us": median([limit for limit, _ in turns]) * 1e6,
        "ours_us": ours_s * 1e6,
        "ratio": median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "ours_gb_per_s": num_bytes / ours_s / 1e9 if num_bytes else None,
        "turns": [list(turn) for turn in turns],
    }


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--sizes", metavar="A,B", help="bytes of the all-reduces (default: 4 bytes to 64 MiB)")
    options = parser.parse_args()
    if options.child:
        serve(Measured().answer)
        return 0
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else SIZES
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("benchmarks.overheads must have two cores, one for each worker, but may use only one")
    report = Report("overheads", {"cores": cores, "sizes": sizes, "turns": NUM_TURNS}, path=options.json,
                    machine=describe_machine())  # fmt: skip
    with Child("benchmarks.overheads", "one") as child:
        for what in ("one instruction", "hand-over"):
            add(report, what, None, child.ask({"what": what, "cores": cores}, 120.0))
        for size in sizes:
            what = "all-reduce in a process"
            add(report, what, size, child.ask({"what": what, "cores": cores, "bytes": size}, 180.0))
    with Group("benchmarks.overheads", "two", num_processes=2) as group:
        port = free_port()
        for size in sizes:
            what = "all-reduce across processes"
            message = {"what": what, "cores": cores, "bytes": size, "port": port}
            add(report, what, size, group.ask(message, 180.0)[0])
    report.finish({}, [])
    show(report, COLUMNS)
    return report.exit_code(options.check)


def add(report: Report, what: str, num_bytes: int | None, reply: Message) -> None:
    if "error" in reply:
        raise RuntimeError(f"{what}: {first_line(reply['error'])}\n{reply.get('traceback', '')}")
    report.add(row_of(what, num_bytes, reply["turns"]))
    row = report.rows[-1]
    print(f"{what} {num_bytes or ''}: {row['ours_us']:.2f} us, {row['ratio']:.2f} times the limit", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

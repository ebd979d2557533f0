"""Sums and exchanges over connections of partita's own, between threads that play processes."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from partita.errors import StepError
from partita.program.wire import DIRECT_BYTES, LARGEST_OWN_BYTES, sum_bytes
from partita.runtime import sockets
from partita.runtime.arrivals import Arrivals
from partita.runtime.processes import ProcessSession, ProcessTransport, TransportWarning
from partita.runtime.sockets import BrokenLineError, Gate, Mesh, bytes_of, own_address
from partita.runtime.tokens import SECRET, prove, token_of


def meshes(num_processes: int, timeout_s: float = 20.0) -> list[Mesh]:
    ends: list[dict[int, socket.socket]] = [{} for _ in range(num_processes)]
    for a, b in itertools.combinations(range(num_processes), 2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ends[a][b] = socket.create_connection(server.getsockname())
            ends[b][a] = server.accept()[0]
    return [Mesh(peers, rank, timeout_s) for rank, peers in enumerate(ends)]


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of the calls, each in a thread; an exception counts as a result."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def end(made: Sequence[Mesh]) -> None:
    for mesh in made:
        mesh.close()


@pytest.mark.parametrize("num_processes", [2, 3, 4])
@pytest.mark.parametrize("num_elements", [1, 3, 1000, DIRECT_BYTES // 4 + 3, 130_001, 300_001])
def test_a_sum_is_right_and_bit_identical_on_all(num_processes: int, num_elements: int) -> None:
    made = meshes(num_processes)
    generator = torch.Generator().manual_seed(num_elements)
    for _ in range(3):  # memory is kept between sums
        values = [torch.randn(num_elements, generator=generator) for _ in made]
        exact = torch.stack(values).double().sum(0)
        errors = together([lambda m=m, v=v: m.all_reduce(v) for m, v in zip(made, values, strict=True)])
        assert errors == [None] * num_processes
        assert all(torch.equal(value, values[0]) for value in values)
        torch.testing.assert_close(values[0].double(), exact, rtol=1e-5, atol=1e-5)
    moved = 3 * 4 * num_elements * (num_processes - 1)
    sent = [mesh.bytes_sent for mesh in made]
    ring = 4 * num_elements * (num_processes - 1) > DIRECT_BYTES
    expected = 2 * moved / num_processes if ring else moved
    assert all(abs(one - expected) <= 3 * 2 * 4 * num_processes for one in sent), (sent, expected)
    if 4 * num_elements <= LARGEST_OWN_BYTES:
        assert sent == [3 * sum_bytes(num_elements, 4, num_processes, place) for place in range(num_processes)]
    end(made)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_what_is_told_arrives_in_order_and_its_source_is_never_far_ahead(num_processes: int) -> None:
    made, most, num_heard, lead = meshes(num_processes), sockets._MOST_AHEAD, [0] * num_processes, 0

    def tells() -> None:
        nonlocal lead
        for step in range(3 * most + 5):
            made[1].tell(torch.tensor([step, -step], dtype=torch.float64), 1)
            lead = max(lead, step + 1 - min(n for rank, n in enumerate(num_heard) if rank != 1))

    def hears(rank: int) -> list[list[float]]:
        found = []
        for _ in range(3 * most + 5):
            value = torch.zeros(2, dtype=torch.float64)
            made[rank].tell(value, 1)
            found.append(value.tolist())
            num_heard[rank] += 1
            time.sleep(0.001)
        return found

    calls = [tells if rank == 1 else (lambda rank=rank: hears(rank)) for rank in range(num_processes)]
    results = together(calls)
    assert all(results[r] == [[k, -k] for k in range(3 * most + 5)] for r in range(num_processes) if r != 1), results
    assert most // 2 < lead <= most + 1, "it does not wait for each, but for all now and then"
    end(made)


def test_who_waits_to_be_told_is_woken_when_the_source_goes() -> None:
    made = meshes(2)
    made[0].interrupt()
    value = torch.zeros(1)
    assert isinstance(together([lambda: made[1].tell(value, 0)])[0], BrokenLineError)
    end(made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.uint8])
def test_sums_of_other_dtypes(dtype: torch.dtype) -> None:
    made = meshes(2)
    for num_elements in (5, 100_000):
        values = [torch.arange(num_elements).remainder(50).to(dtype), torch.full((num_elements,), 7, dtype=dtype)]
        expected = values[0] + values[1]
        together([lambda m=m, v=v: m.all_reduce(v) for m, v in zip(made, values, strict=True)])
        assert torch.equal(values[0], expected) and torch.equal(values[1], expected)
    end(made)


def test_large_values_move_both_ways_at_once() -> None:
    """Much more than the system buffers: whoever sent all before it received would wait for ever."""
    made = meshes(3)
    out = [{to: [torch.randn(n) for n in (4_000_000, 0, 5)] for to in range(3) if to != rank} for rank in range(3)]
    into = [{of: [torch.empty(n) for n in (4_000_000, 0, 5)] for of in range(3) if of != rank} for rank in range(3)]

    def views(tensors: dict[int, list[Tensor]]) -> dict[int, list[memoryview]]:
        return {rank: [bytes_of(value) for value in values] for rank, values in tensors.items()}

    calls = [lambda m=m, o=o, i=i: m.move(views(o), views(i)) for m, o, i in zip(made, out, into, strict=True)]
    assert together(calls) == [None] * 3
    for sender, receiver in itertools.permutations(range(3), 2):
        for sent, received in zip(out[sender][receiver], into[receiver][sender], strict=True):
            assert torch.equal(sent, received)
    end(made)


def test_who_does_not_answer_is_named_at_the_limit() -> None:
    made = meshes(3, timeout_s=0.5)
    begin_s = time.monotonic()
    with pytest.raises(BrokenLineError, match=r"timed out after 0.5 s; rank\(s\) \[1, 2\] did not answer"):
        made[0].all_reduce(torch.ones(10))
    assert 0.4 < time.monotonic() - begin_s < 5
    end(made)


def test_a_closed_connection_is_told_at_once() -> None:
    made = meshes(2)
    made[1].close()
    for size in (4, 4_000_000):
        with pytest.raises(BrokenLineError, match="closed its connection|connection broke"):
            made[0].all_reduce(torch.ones(size))
    end(made)


@pytest.mark.parametrize("interrupted", [0, 1])
def test_an_interrupt_wakes_both_sides(interrupted: int) -> None:
    made = meshes(2)
    threading.Timer(0.2, made[interrupted].interrupt).start()
    begin_s = time.monotonic()
    waits = [lambda m=m, o=o: m.move({}, {o: [memoryview(bytearray(4))]}) for m, o in ((made[0], 1), (made[1], 0))]
    assert [type(error) for error in together(waits)] == [BrokenLineError] * 2
    assert time.monotonic() - begin_s < 5
    end(made)
    made[0].interrupt()  # harmless afterwards


def test_gates_find_each_other_whoever_comes_first() -> None:
    store = HashStore()
    gates = [Gate(store, rank, "127.0.0.1") for rank in range(3)]

    def open_all(gate: Gate) -> list[Mesh | str]:
        time.sleep(0.1 * gate.rank)
        return [gate.mesh(1, line, ranks, 10.0) for line, ranks in ((1, (0, 1, 2)), (2, (0, 2))) if gate.rank in ranks]

    found = together([lambda gate=gate: open_all(gate) for gate in gates])
    for place, ranks in enumerate(((0, 1, 2), (0, 2))):
        made = [found[rank][place] for rank in ranks]
        values = [torch.full((3,), float(rank + 1)) for rank in ranks]
        together([lambda m=m, v=v: m.all_reduce(v) for m, v in zip(made, values, strict=True)])
        assert all(value.tolist() == [float(sum(rank + 1 for rank in ranks))] * 3 for value in values)
        end(made)
    for gate in gates:
        gate.close()


def test_strangers_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_HELLO_TIME_S", 0.3)
    store = HashStore()
    gates = [Gate(store, rank, "127.0.0.1") for rank in range(2)]
    assert gates[0]._listener is not None
    address = gates[0]._listener.getsockname()
    silent, liar = socket.create_connection(address), socket.create_connection(address)
    liar.sendall(sockets._HELLO.pack(b"0" * 16, 1, 1, 1))
    first, second = together([lambda gate=gate: gate.mesh(1, 1, (0, 1), 10.0) for gate in gates])
    values = [torch.ones(2), torch.ones(2)]
    together([lambda: first.all_reduce(values[0]), lambda: second.all_reduce(values[1])])
    assert values[0].tolist() == [2.0, 2.0]
    assert liar.recv(1) == b""
    end([first, second])
    for one in (silent, liar, *gates):
        one.close()


class Chatter(threading.Thread):
    """Strangers that call again and again, and say anything."""

    def __init__(self, address: Any) -> None:
        super().__init__(daemon=True)
        self._address, self.is_over, self.num_calls = address, False, 0

    def run(self) -> None:
        chance = random.Random(7)
        kept = []
        while not self.is_over:
            with contextlib.suppress(OSError):
                caller = socket.create_connection(self._address, 1.0)
                caller.sendall(chance.randbytes(chance.randrange(60)))
                self.num_calls += 1
                if chance.random() < 0.5:
                    caller.close()
                else:
                    kept.append(caller)  # says no more
            time.sleep(0.001)
        for caller in kept:
            caller.close()


def test_any_number_of_strangers_that_say_anything_do_not_hold_a_job_up() -> None:
    store = HashStore()
    gates = [Gate(store, rank, "127.0.0.1") for rank in range(3)]
    chatter = [Chatter(gate._listener.getsockname()) for gate in gates if gate._listener is not None]
    for one in chatter:
        one.start()
    begin_s = time.monotonic()
    for line in range(5):
        made = together([lambda gate=gate, line=line: gate.mesh(1, line, (0, 1, 2), 20.0) for gate in gates])
        values = [torch.full((5,), float(rank)) for rank in range(3)]
        together([lambda m=m, v=v: m.all_reduce(v) for m, v in zip(made, values, strict=True)])
        assert all(value.tolist() == [3.0] * 5 for value in values)
        end(made)
    assert time.monotonic() - begin_s < 20
    for one in chatter:
        one.is_over = True
        one.join()
    assert all(one.num_calls > 10 for one in chatter)
    for gate in gates:
        gate.close()


def test_who_has_not_the_jobs_secret_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    gates = [Gate(store, rank, "127.0.0.1") for rank in range(2)]
    secret_of = {gate.rank: ("right", "wrong")[gate.rank] for gate in gates}
    here = threading.local()

    def token(public: str) -> bytes:
        return token_of(public, {SECRET: secret_of[here.rank]})

    monkeypatch.setattr(sockets, "token_of", token)

    def open_one(gate: Gate) -> Mesh | str:
        here.rank = gate.rank
        return gate.mesh(1, 1, (0, 1), 1.5)

    reasons = together([lambda gate=gate: open_one(gate) for gate in gates])
    assert all(isinstance(reason, str) and "has no connection to" in reason for reason in reasons)
    for gate in gates:
        gate.close()


@pytest.mark.parametrize("secrets", [["", "", ""], ["a", "a", "a"], ["a", "b", "a"], ["a", "a", ""]])
def test_processes_prove_that_they_belong_to_the_job(secrets: list[str]) -> None:
    store = HashStore()

    def attempt(rank: int) -> str:
        try:
            prove(store, rank, 3, 5.0, {SECRET: secrets[rank]} if secrets[rank] else {})
        except StepError as error:
            return str(error)
        return ""

    told = together([lambda rank=rank: attempt(rank) for rank in range(3)])
    for rank, text in enumerate(told):
        strangers = [other for other in range(3) if secrets[other] != secrets[rank]]
        assert (f"rank(s) {strangers} have another one than rank {rank}" in text) if strangers else not text
    written = [store.get(f"{name}/{rank}") for name in ("nonce", "proof") for rank in range(3)]
    assert all(secret.encode() not in written for secret in secrets if secret)


def test_a_proof_of_another_run_is_of_no_use() -> None:
    first, second = HashStore(), HashStore()
    run = [
        lambda rank=rank, store=store: prove(store, rank, 2, 5.0, {SECRET: "x"})
        for store in (first, second)
        for rank in (0, 1)
    ]
    together(run)
    assert first.get("proof/0") != second.get("proof/0")


def test_if_one_cannot_connect_all_are_told_why() -> None:
    store = HashStore()
    gates = [Gate(store, rank, "127.0.0.1") for rank in range(3)]
    assert gates[0]._listener is not None
    gates[0]._listener.close()  # nobody answers under its address
    begin_s = time.monotonic()
    reasons = together([lambda gate=gate: gate.mesh(1, 1, (0, 1, 2), 60.0) for gate in gates])
    assert all(isinstance(reason, str) and "has no connection to process rank(s)" in reason for reason in reasons)
    assert time.monotonic() - begin_s < 10
    for gate in gates:
        gate.close()


def test_a_process_without_an_address_takes_part_in_no_mesh() -> None:
    store = HashStore()
    gates = [Gate(store, rank, "127.0.0.1" if rank else "") for rank in range(2)]
    reasons = together([lambda gate=gate: gate.mesh(1, 1, (0, 1), 60.0) for gate in gates])
    assert all("rank(s) [0] take no connections" in str(reason) for reason in reasons)
    for gate in gates:
        gate.close()


def test_the_own_address() -> None:
    assert own_address("127.0.0.1", {}) == "127.0.0.1"
    assert own_address("203.0.113.7", {"GLOO_SOCKET_IFNAME": "lo,eth7"}) == "127.0.0.1"
    with pytest.raises(OSError, match="GLOO_SOCKET_IFNAME='nosuch0' must be an interface"):
        own_address("127.0.0.1", {"GLOO_SOCKET_IFNAME": "nosuch0"})


class _Liveness:
    lost = None

    def report(self, session: int, error: BaseException) -> None:
        return


def _session(gate: Any) -> ProcessSession:
    alone: Any = _Liveness()
    arrivals = Arrivals(None, alone, 2, 1.0)
    transport: Any = ProcessTransport(0, 2, alone, arrivals, gate=gate, owns_default=False)
    return ProcessSession(transport, 1)


def test_without_connections_a_warning_says_why() -> None:
    class Shut:
        def mesh(self, *_: Any) -> str:
            return "process rank 1 has no connection to process rank(s) [0] (refused)"

    with pytest.warns(TransportWarning, match=r"through gloo.*\(refused\).*GLOO_SOCKET_IFNAME"):
        assert _session(Shut())._mesh((0, 1), 1.0) is None
    assert _session(None)._mesh((0, 1), 1.0) is None  # where tensors may be on GPUs


def test_a_session_that_fails_wakes_its_workers() -> None:
    made = meshes(2)

    class Open:
        def mesh(self, *_: Any) -> Mesh:
            return made[0]

    session = _session(Open())
    mesh = session._mesh((0, 1), 20.0)
    assert mesh is made[0]
    threading.Timer(0.2, lambda: session.report(ValueError("elsewhere"))).start()
    begin_s = time.monotonic()
    with pytest.raises(StepError, match="a sum was given up .* because the step has failed elsewhere"):
        session.wait(lambda: mesh.all_reduce(torch.ones(3)), "a sum", 20.0)
    assert time.monotonic() - begin_s < 5
    end(made)


def test_stores_with_a_prefix_serve_too() -> None:
    store = HashStore()
    gates = [Gate(PrefixStore("a", store), rank, "127.0.0.1") for rank in range(2)]
    made = together([lambda gate=gate: gate.mesh(1, 1, (0, 1), 10.0) for gate in gates])
    assert all(isinstance(one, Mesh) for one in made), made
    end(made)
    for gate in gates:
        gate.close()

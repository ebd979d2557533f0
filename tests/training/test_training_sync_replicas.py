"""Methods that bring replicas together, on threads: against the formulas written out for all replicas at once."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from sync_cases import Hub, ThreadLine, on_processes

from partita.errors import InputError
from partita.runtime.background import Courier, Errand
from partita.runtime.failure import Failure
from partita.runtime.transport import Line
from partita.training.runner import apply_due, apply_gradients
from partita.training.sync.exact import Exact
from partita.training.sync.fragments import fragments_of
from partita.training.sync.gossip import Gossip
from partita.training.sync.method import Part, Peers
from partita.training.sync.outer import (
    DiLoCo,
    LocalSGD,
    StreamingDiLoCo,
    outer_settings,
)
from partita.training.sync.powersgd import PowerSGD
from partita.training.sync.replica import DivergenceWarning, Replica, ReplicaMethod, ReplicaSync
from partita.training.sync.rounded import Rounded
from partita.training.sync.stale import Stale
from partita.training.sync.topk import TopK

STEPS, ROWS = 12, 12
Weights = dict[str, Tensor]


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 2, generator=generator)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def backward(net: nn.Module, step: int, start: int, end: int) -> None:
    x, y = batch(step)
    nn.functional.mse_loss(net(x[start:end]), y[start:end]).backward()


def weights_of(net: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


class Job:
    """Replicas as threads, each with a model, an optimizer and a method at work."""

    def __init__(self, method: ReplicaMethod, num: int, make_optimizer: Callable[[nn.Module], Any] = sgd) -> None:
        self.method, self.num, self.make_optimizer = method, num, make_optimizer
        self.background = Hub(num)
        self.first = model()  # here: threads share torch's generator

    def run(self, steps: int = STEPS, after: Callable[[ReplicaSync, nn.Module], Any] | None = None) -> list[Any]:
        """By replica: its weights after every step, the bytes that it sent, and what `after` gives."""

        def one(place: int, line: ThreadLine, peers: Peers) -> Any:
            net = copy.deepcopy(self.first)
            failure = Failure()
            own = ThreadLine(self.background, peers.ranks, peers.rank)
            courier = Courier(own, failure, "test")

            def errand(key: str, call: Callable[[Line], None]) -> Errand:
                return Errand(key, call, courier, failure, 20.0)

            named = dict(net.named_parameters())
            sync = self.method.sync_of(
                Replica(
                    parameters={name: value.detach() for name, value in named.items()},
                    buffers={},
                    peers=peers,
                    share=1 / self.num,
                    line=line,
                    errand=errand,
                )
            )
            optimizer, share = self.make_optimizer(net), ROWS // self.num
            history = []
            for step in range(1, steps + 1):
                backward(net, step, place * share, (place + 1) * share)
                if sync.takes_gradients:
                    apply_due(lambda found, _: sync.due(found), optimizer, named, 0.0)
                else:
                    optimizer.step()
                    optimizer.zero_grad()
                with torch.no_grad():
                    sync.after_step(step)
                history.append(weights_of(net))
            for gradients in sync.settle():
                apply_gradients(optimizer, named, gradients)
            found = after(sync, net) if after is not None else None
            courier.close()
            return history, line.bytes_sent + own.bytes_sent, found, weights_of(net)

        return on_processes(self.num, one)


def exact(steps: int = STEPS, make_optimizer: Callable[[nn.Module], Any] = sgd) -> list[Weights]:
    net = model()
    optimizer = make_optimizer(net)
    history = []
    for step in range(1, steps + 1):
        backward(net, step, 0, ROWS)
        optimizer.step()
        optimizer.zero_grad()
        history.append(weights_of(net))
    return history


def assert_close(one: Weights, other: Weights, tolerance: float = 1e-5) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize(
    "method",
    [
        LocalSGD(every=1),
        LocalSGD(every=1, compress=Rounded(to="fp32")),
        DiLoCo(every=1),
        DiLoCo(every=1, outer_lr=1.0, outer_momentum=0.0, compress=PowerSGD(rank=64)),
        StreamingDiLoCo(every=1, fragments=1, delay=0, compress=TopK(density=1.0)),
        Stale(staleness=0),
        Gossip(complete=True),
    ],
    ids=lambda method: str(method) if isinstance(method, int) else type(method).__name__,
)
def test_switched_off_it_is_the_exact_step(method: ReplicaMethod, num: int) -> None:
    wanted = exact()
    for history, *_ in Job(method, num).run():
        for found, other in zip(history, wanted, strict=True):
            assert_close(found, other)


def apart(
    num: int, every: int, lr: float, momentum: float, make_optimizer: Callable[[nn.Module], Any] = sgd
) -> Weights:
    """DiLoCo for all replicas at once, by torch's own Nesterov."""
    agreed = model()
    outer = torch.optim.SGD(agreed.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    nets = [copy.deepcopy(agreed) for _ in range(num)]
    optimizers = [make_optimizer(net) for net in nets]
    share = ROWS // num
    for step in range(1, STEPS + 1):
        for place, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            backward(net, step, place * share, (place + 1) * share)
            optimizer.step()
            optimizer.zero_grad()
        if step % every == 0:
            with torch.no_grad():
                for i, y in enumerate(agreed.parameters()):
                    y.grad = torch.stack([y - list(net.parameters())[i] for net in nets]).mean(0)
            outer.step()
            for net in nets:
                net.load_state_dict(agreed.state_dict())
    return weights_of(agreed)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.02)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_diloco_is_what_torchs_nesterov_makes_of_the_mean(num: int, make_optimizer: Callable[[nn.Module], Any]) -> None:
    method = DiLoCo(every=3, outer_lr=0.5, outer_momentum=0.4)
    wanted = apart(num, 3, 0.5, 0.4, make_optimizer)
    for *_, last in Job(method, num, make_optimizer).run():
        assert_close(last, wanted)


def test_local_sgd_takes_the_mean() -> None:
    wanted = apart(2, 4, 1.0, 0.0)
    for *_, last in Job(LocalSGD(every=4), 2).run():
        assert_close(last, wanted)


def test_replicas_are_apart_between_agreements() -> None:
    first, second = (history for history, *_ in Job(LocalSGD(every=4), 2).run())
    for step, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        assert torch.equal(one["0.weight"], other["0.weight"]) is (step % 4 == 0)


def test_one_fragment_without_delay_is_diloco() -> None:
    settings: dict[str, Any] = {"every": 4, "outer_lr": 0.6, "outer_momentum": 0.5}
    plain = Job(DiLoCo(**settings), 2).run()
    streamed = Job(StreamingDiLoCo(fragments=1, delay=0, compress=Exact(), **settings), 2).run()
    for one, other in zip(plain, streamed, strict=True):
        # It agrees in step 4, 8, ... as well: offsets of fragments begin with 0.
        assert_close(one[-1], other[-1])


def test_fragments_are_exchanged_one_after_the_other() -> None:
    method = StreamingDiLoCo(every=6, fragments=3, delay=1, mixing=0.0, compress=Exact())
    (first, *_), (second, *_) = Job(method, 2).run(18)
    fragments = fragments_of([Part(name, tuple(value.shape)) for name, value in first[0].items()], 3)
    assert len(fragments) == 3 and not all(piece.is_whole for own in fragments for piece in own)
    for number, own in enumerate(fragments):
        equal = [
            step
            for step, (one, other) in enumerate(zip(first, second, strict=True), start=1)
            if all(torch.equal(*(piece.of(values[piece.parameter.name]) for values in (one, other))) for piece in own)
        ]
        assert equal == [step for step in range(1, 19) if step > 1 and (step - 1 - 2 * number) % 6 == 0]


def test_streaming_lowers_the_peak_by_the_number_of_fragments() -> None:
    parts = [Part("table", (600,)), Part("weight", (100,)), Part("bias", (100,))]
    peers = Peers((0, 1), 0)
    whole, streamed = DiLoCo(every=16), StreamingDiLoCo(every=16, fragments=4, compress=Exact())
    assert streamed.peak_bytes(parts, peers) * 4 == whole.sent_bytes(parts, peers) * 16
    assert streamed.sent_bytes(parts, peers) == whole.sent_bytes(parts, peers)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_stale_replicas_make_the_same_updates(staleness: int, make_optimizer: Callable[[nn.Module], Any]) -> None:
    (_, _, _, one), (_, _, _, other) = Job(Stale(staleness=staleness), 2, make_optimizer).run()
    assert_close(one, other, 1e-6)


def test_no_more_than_staleness_sums_are_on_their_way() -> None:
    seen: list[int] = []
    method = Stale(staleness=2)

    def after(sync: ReplicaSync, net: nn.Module) -> None:
        seen.append(sync.staleness)

    Job(method, 2).run(after=after)
    assert all(0 <= number <= 2 for number in seen)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_gossip_leaves_the_mean_as_it_is(num: int) -> None:
    """After each step of its own the mean of all replicas is that of plain averaging, wherever the exchanges went."""

    def after(sync: ReplicaSync, net: nn.Module) -> Weights:
        with torch.no_grad():
            sync.equalise()
        return weights_of(net)

    found = [item[2] for item in Job(Gossip(), num).run(1, after)]
    wanted = exact(1)[0]  # one step of each from the same weights: the mean is the exact step
    for weights in found:
        assert_close(weights, wanted)


def test_two_replicas_that_gossip_are_equal() -> None:
    (first, *_), (second, *_) = Job(Gossip(), 2).run()
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize(
    "method",
    [
        LocalSGD(every=3),
        DiLoCo(every=3, compress=Rounded(to="int8")),
        DiLoCo(every=4, compress=TopK(density=0.1)),
        StreamingDiLoCo(every=6, fragments=2, delay=1),
        Stale(staleness=1),
        Gossip(),
        Gossip(every=2),
        Gossip(complete=True),
    ],
    ids=lambda method: repr(method)[:40],
)
@pytest.mark.parametrize("num", [2, 4])
def test_bytes_are_those_of_the_formula(method: ReplicaMethod, num: int) -> None:
    parts = [Part(name, tuple(value.shape)) for name, value in model().named_parameters()]
    found = Job(method, num).run(13 if isinstance(method, StreamingDiLoCo) else 12)  # its last is taken a step later
    peers = [Peers(tuple(range(3, 3 + 2 * num, 2)), 3 + 2 * place) for place in range(num)]
    for (_, sent, _, _), own in zip(found, peers, strict=True):
        assert sent == pytest.approx(method.sent_bytes(parts, own) * 12, rel=1e-9)


def test_equalised_replicas_hold_the_mean() -> None:
    def after(sync: ReplicaSync, net: nn.Module) -> tuple[Weights, Weights]:
        before = weights_of(net)
        with torch.no_grad():
            sync.equalise()
        return before, weights_of(net)

    (_, _, (a, one), _), (_, _, (b, other), _) = Job(DiLoCo(every=5), 2).run(7, after)
    for name in a:
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], (a[name] + b[name]) / 2)


def test_a_resumed_method_goes_on_with_its_momentum() -> None:
    method = DiLoCo(every=2, outer_lr=0.5, outer_momentum=0.5)

    def after(sync: ReplicaSync, net: nn.Module) -> dict[str, Tensor]:
        kept = {name: value.clone() for name, value in sync.state().items()}
        sync.restart()
        assert float(sync.state()["outer.velocity.0"].abs().max()) == 0
        sync.resume(kept)
        assert all(torch.equal(sync.state()[name], value) for name, value in kept.items())
        sync.resume(None)
        assert torch.equal(sync.state()["outer.agreed.0"], net[0].weight)  # type: ignore[index]
        return kept

    Job(method, 2).run(4, after)


def test_nesterov_after_few_steps_is_warned_of() -> None:
    assert outer_settings(None, None, 5) == (1.0, 0.0)
    assert outer_settings(None, None, 50) == (0.7, 0.5)
    assert outer_settings(None, None, 100) == (0.7, 0.9)
    with pytest.warns(DivergenceWarning, match=r"7\.0 times as far"):
        DiLoCo(every=2, outer_lr=0.7, outer_momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiLoCo(every=2)
        DiLoCo(every=50)


def test_late_gradients_with_momentum_are_warned_of() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.warns(DivergenceWarning, match="up to 4 steps late with momentum 0.9"):
        Stale(staleness=4).check(torch.optim.SGD(weights, lr=0.1, momentum=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stale(staleness=1).check(torch.optim.SGD(weights, lr=0.1, momentum=0.9))
        Stale(staleness=4).check(torch.optim.SGD(weights, lr=0.1))
        Stale(staleness=4).check(torch.optim.AdamW(weights))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LocalSGD(every=0), "every must be a whole number, at least 1, but got int 0"),
        (lambda: LocalSGD(every="10"), "every must be a whole number, at least 1, but got str '10'"),
        (lambda: LocalSGD(after=-1), "after must be a whole number, at least 0"),
        (lambda: DiLoCo(every=2.5), "every must be a whole number"),
        (lambda: DiLoCo(outer_lr=0.0), "outer_lr must be a number, above 0"),
        (lambda: DiLoCo(outer_momentum=1.0), "outer_momentum must be a number, at least 0 and below 1"),
        (lambda: DiLoCo(compress="int4"), r"compress must be a method that adds gradients, but got str 'int4'"),
        (lambda: LocalSGD(compress=DiLoCo()), "compress must be a method that adds gradients"),
        (lambda: StreamingDiLoCo(every=4, fragments=5), "fragments .* at least 1 and at most 4"),
        (lambda: StreamingDiLoCo(every=8, fragments=4, delay=2), "delay must be"),
        (lambda: StreamingDiLoCo(delay=-1), "delay must be a whole number, at least 0"),
        (lambda: StreamingDiLoCo(mixing=1.0), "mixing must be a number, at least 0 and below 1"),
        (lambda: Stale(staleness=-1), "staleness must be a whole number, at least 0"),
        (lambda: Stale(compress=None), "compress"),
        (lambda: Gossip(every=None), "every must be a whole number"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(1, 6))
def test_fragments_are_all_of_the_model_and_about_equal(shapes: list[tuple[int, int]], num: int) -> None:
    parts = [Part(str(i), shape) for i, shape in enumerate(shapes)]
    values = {part.name: torch.zeros(part.shape, dtype=torch.int64) for part in parts}
    fragments = fragments_of(parts, num)
    total = sum(part.num_elements for part in parts)
    sizes = [sum(piece.part.num_elements for piece in own) for own in fragments]
    assert len(fragments) <= num and all(sizes) and sum(sizes) == total
    assert max(sizes, default=0) <= total / num + 9  # a row
    for own in fragments:
        for piece in own:
            assert piece.of(values[piece.parameter.name]).shape == piece.part.shape
            piece.of(values[piece.parameter.name]).add_(1)
    assert all(bool((value == 1).all()) for value in values.values())


def test_a_fragment_has_names_of_its_pieces() -> None:
    parts = [Part("scale", ()), Part("weight", (4, 2)), Part("bias", (3,))]
    names = [[piece.part.name for piece in own] for own in fragments_of(parts, 2)]
    assert names == [["scale", "weight[0:2]"], ["weight[2:4]", "bias"]]

"""Methods that add gradients between processes: every row of the table keeps what all must keep."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from sync_cases import PARTS, exact_sums, gradients, on_processes, run_steps

from partita.errors import InputError
from partita.training.sync.codecs import BLOCK, IntegerCodec, codec_of
from partita.training.sync.demo import Blocks, DeMo
from partita.training.sync.exact import Exact
from partita.training.sync.method import GradientMethod, Part
from partita.training.sync.powersgd import PowerSGD
from partita.training.sync.rounded import Rounded
from partita.training.sync.sparse import Masked
from partita.training.sync.topk import DGC, TopK

MASK = torch.rand(12, 20, generator=torch.Generator().manual_seed(1)) < 0.2
METHODS: dict[str, GradientMethod] = {
    "exact": Exact(),
    "bf16": Rounded(to="bf16"),
    "fp16": Rounded(to="fp16"),
    "int8": Rounded(to="int8"),
    "int4": Rounded(to="int4"),
    "powersgd": PowerSGD(rank=2),
    "powersgd without feedback": PowerSGD(rank=1, error_feedback=False, warm_start=False),
    "topk": TopK(density=0.05),
    "topk without feedback": TopK(density=0.05, error_feedback=False),
    "dgc": DGC(density=0.05),
    "dgc clipped": DGC(density=0.05, clip_norm=1.0),
    "demo": DeMo(components=4, block=8, momentum=0.9),
    "masked": Masked(masks={"weight": MASK}),
}
SWITCHED_OFF: dict[str, GradientMethod] = {
    "fp32": Rounded(to="fp32"),
    "fp32 with feedback": Rounded(to="fp32", error_feedback=True),
    "full rank": PowerSGD(rank=20),
    "exact steps": PowerSGD(rank=1, exact_steps=100),
    "all elements": TopK(density=1.0),
    "all elements, no momentum": DGC(density=1.0, momentum=0.0),
    "all components": DeMo(components=4096, momentum=0.0, sign=False),
    "no masks": Masked(),
}


@pytest.mark.parametrize("num", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_with_compression_switched_off_it_is_the_exact_sum(name: str, num: int) -> None:
    for sums, _, _ in run_steps(SWITCHED_OFF[name], num, 3):
        for step, found in enumerate(sums):
            for one, wanted in zip(found, exact_sums(num, step), strict=True):
                torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_all_processes_hold_the_same_bits_and_send_what_the_formula_says(name: str, num: int) -> None:
    runs = run_steps(METHODS[name], num, 4)
    first = runs[0][0]
    for sums, sent, formed in runs:
        assert all(
            torch.equal(a, b) for one, other in zip(first, sums, strict=True) for a, b in zip(one, other, strict=True)
        )
        assert set(sent) == {METHODS[name].sent_bytes(PARTS, formed.peers)}
        assert [tuple(value.shape) for value in sums[0]] == [part.shape for part in PARTS]


@pytest.mark.parametrize("name", ["int8", "int4", "powersgd", "topk"])
def test_with_error_feedback_nothing_is_lost(name: str) -> None:
    """What all processes have brought in all steps is what came out, but for what they still hold."""
    num, steps = 3, 60
    runs = run_steps(METHODS[name], num, steps)
    came = [sum(step[i] for step in runs[0][0]) for i in range(len(PARTS))]
    went = [sum(exact_sums(num, step)[i] for step in range(steps)) for i in range(len(PARTS))]
    once = max(float(value.norm()) for step in range(steps) for value in exact_sums(num, step))
    for one, other in zip(came, went, strict=True):
        assert float((one - other).norm()) < 12 * once  # bounded, while the whole grows with the steps
    assert all(0 < formed.error < 1 for _, _, formed in runs)


def test_without_error_feedback_it_is() -> None:
    num, steps = 3, 60
    runs = run_steps(METHODS["topk without feedback"], num, steps)
    came = [sum(step[i] for step in runs[0][0]) for i in range(len(PARTS))]
    went = [sum(exact_sums(num, step)[i] for step in range(steps)) for i in range(len(PARTS))]
    assert max(float((a - b).norm()) for a, b in zip(came, went, strict=True)) > 60


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_state_goes_on_as_if_nothing_had_been_interrupted(name: str) -> None:
    method, num = METHODS[name], 2
    whole = run_steps(method, num, 5)

    def interrupted(place, line, peers):  # type: ignore[no-untyped-def]
        first = method.sum_of(PARTS, peers)
        for step in range(3):
            first(gradients(place, step), line)
        kept = {key: value.clone() for key, value in first.state().items()}
        second = method.sum_of(PARTS, peers)
        second.load(kept)
        return [[value.clone() for value in second(gradients(place, step), line)] for step in (3, 4)]

    for (sums, _, _), tail in zip(whole, on_processes(num, interrupted), strict=True):
        assert all(
            torch.equal(a, b)
            for one, other in zip(sums[3:], tail, strict=True)
            for a, b in zip(one, other, strict=True)
        )


def test_a_state_of_other_parts_is_refused() -> None:
    def one(place, line, peers):  # type: ignore[no-untyped-def]
        with pytest.raises(InputError, match="same parts"):
            TopK().sum_of(PARTS, peers).load(TopK().sum_of(PARTS[:1], peers).state())

    on_processes(1, one)


@pytest.mark.parametrize("bits", [4, 8, torch.bfloat16, torch.float16])
@given(st.integers(0, 3 * BLOCK), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_codecs_keep_shape_and_bound(bits: int | torch.dtype, size: int, seed: int) -> None:
    codec = codec_of(bits)
    value = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 5 - 2)
    code = codec.encode(value)
    assert [(tuple(item.shape), item.dtype) for item in code] == [(s.shape, s.dtype) for s in codec.specs(size)]
    assert sum(item.nbytes for item in code) == codec.num_bytes(size)
    found = codec.decode(code, size)
    if isinstance(codec, IntegerCodec):
        for start in range(0, size, BLOCK):
            block = value[start : start + BLOCK]
            step = float(block.abs().max()) / codec.most
            assert float((found[start : start + BLOCK] - block).abs().max()) <= step * 0.5001
    else:
        torch.testing.assert_close(found, value, rtol=8e-3, atol=1e-6)


def test_infinite_values_do_not_stay() -> None:
    value = torch.tensor([1e30, -1e30, 1.0])
    assert torch.isfinite(codec_of(torch.float16).decode(codec_of(torch.float16).encode(value), 3)).all()


def test_powersgd_is_exact_for_gradients_of_its_rank() -> None:
    """After a step of the same column space the iteration has found it."""
    part = (Part("weight", (30, 40)),)
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(30, 2, generator=generator), torch.randn(2, 40, generator=generator)

    def one(place, line, peers):  # type: ignore[no-untyped-def]
        formed = PowerSGD(rank=2).sum_of(part, peers)
        return formed([(place + 1) * left @ right], line)[0]

    for found in on_processes(2, one):
        torch.testing.assert_close(found, 3 * left @ right, rtol=1e-4, atol=1e-4)


def test_powersgd_recovers_from_a_gradient_of_zeros() -> None:
    part = (Part("weight", (30, 40)),)

    def one(place, line, peers):  # type: ignore[no-untyped-def]
        formed = PowerSGD(rank=2).sum_of(part, peers)
        zero = formed([torch.zeros(30, 40)], line)[0]
        return zero, formed([torch.ones(30, 40)], line)[0]

    for zero, later in on_processes(2, one):
        assert float(zero.abs().max()) == 0
        torch.testing.assert_close(later, torch.full((30, 40), 2.0), rtol=1e-4, atol=1e-4)


def test_topk_sends_the_largest() -> None:
    part = (Part("a", (10,)), Part("b", (4,)))

    def one(place, line, peers):  # type: ignore[no-untyped-def]
        formed = TopK(density=0.2).sum_of(part, peers)
        values = [torch.tensor([0.0, 5, -9, 1, 2, 3, 4, 0, 0, 0]), torch.tensor([0.1, -0.3, 0.2, 0.0])]
        return formed([value * (1 if place == 0 else -2) for value in values], line)

    for a, b in on_processes(2, one):
        assert a.tolist() == [0, -5, 9, 0, 0, 0, 0, 0, 0, 0]
        torch.testing.assert_close(b, torch.tensor([0, 0.3, 0, 0]))


def test_dgc_with_all_elements_is_momentum() -> None:
    def one(place, line, peers):  # type: ignore[no-untyped-def]
        formed = DGC(density=1.0, momentum=0.5).sum_of(PARTS, peers)
        return [[value.clone() for value in formed(gradients(place, step), line)] for step in range(3)]

    velocity = [torch.zeros(part.shape) for part in PARTS]
    sums = on_processes(2, one)[0]
    for step in range(3):
        velocity = [0.5 * v + g for v, g in zip(velocity, exact_sums(2, step), strict=True)]
        for found, wanted in zip(sums[step], velocity, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_dgc_warms_up() -> None:
    method = DGC(density=0.01, momentum=0.0, warm_up_steps=8)
    runs = run_steps(method, 2, 10)
    sent = runs[0][1]
    assert sent[0] > sent[2] > sent[4] and sent[8] == sent[9] == method.sent_bytes(PARTS, runs[0][2].peers)
    assert sent[0] == 8 * sum(math.ceil(part.num_elements / 4) for part in PARTS)


def test_methods_with_their_own_momentum_refuse_another() -> None:
    weight = [torch.nn.Parameter(torch.zeros(2))]
    for method in (DGC(), DeMo()):
        method.check(torch.optim.SGD(weight, lr=0.1))
        with pytest.raises(InputError, match="momentum"):
            method.check(torch.optim.SGD(weight, lr=0.1, momentum=0.9))
        with pytest.raises(InputError, match="AdamW"):
            method.check(torch.optim.AdamW(weight))


@pytest.mark.parametrize("shape", [(7,), (64,), (12, 20), (8, 3, 3, 3), (1, 130), (97, 2)])
def test_the_cosine_transform_is_orthonormal(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    blocks = Blocks(shape, 16)
    components = blocks.transform(value)
    assert components.shape == (blocks.num, blocks.size)
    torch.testing.assert_close(components.norm(), value.norm())
    torch.testing.assert_close(blocks.inverse(components), value, rtol=1e-5, atol=1e-5)


def test_demo_gives_signs() -> None:
    sums = run_steps(DeMo(components=2, block=8, momentum=0.5), 2, 2)[0][0]
    assert {float(x) for value in sums[1] for x in value.flatten()} <= {-1.0, 0.0, 1.0}


def test_masks_are_read_when_they_are_used() -> None:
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[0] = True

    def one(place, line, peers):  # type: ignore[no-untyped-def]
        formed = Masked(masks={"weight": mask}).sum_of(PARTS, peers)
        before = [value.clone() for value in formed(gradients(place, 0), line)]
        if place == 0:
            mask[1] = True
        peers_meet = torch.zeros(1)
        line.all_reduce(peers_meet)
        return before, formed(gradients(place, 0), line)

    exact = exact_sums(2, 0)
    for before, after in on_processes(2, one):
        torch.testing.assert_close(before[0][0], exact[0][0])
        assert float(before[0][1:].abs().max()) == 0
        torch.testing.assert_close(after[0][:2], exact[0][:2])
        torch.testing.assert_close(after[2], exact[2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rounded(to="int3"), "to must be"),  # type: ignore[arg-type]
        (lambda: PowerSGD(rank=0), "rank must be a whole number, at least 1"),
        (lambda: PowerSGD(rank=1.5), "rank must be a whole number"),
        (lambda: PowerSGD(exact_steps=-1), "exact_steps must be a whole number, at least 0"),
        (lambda: TopK(density=0.0), "density must be a number, above 0 and at most 1"),
        (lambda: TopK(density=float("nan")), "density"),
        (lambda: TopK(density="1%"), "density must be a number, above 0 and at most 1, but got str"),
        (lambda: DGC(momentum=1.0), "momentum must be a number, at least 0 and below 1"),
        (lambda: DGC(clip_norm=-1.0), "clip_norm must be a number, above 0"),
        (lambda: DGC(warm_up_steps=-1), "warm_up_steps must be a whole number, at least 0"),
        (lambda: DeMo(block=512), "block must be a whole number, at least 1 and at most 256"),
        (lambda: DeMo(components=True), "components must be a whole number"),
        (lambda: Masked(masks={"w": torch.zeros(2)}), "torch.bool"),
        (lambda: Masked(masks={"w": [True]}), "torch.bool"),
        (lambda: Masked(masks=[torch.zeros(2)]), "masks must map names of parameters to tensors"),
    ],
)
def test_bad_settings_are_refused(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        make()

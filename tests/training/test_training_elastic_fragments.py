"""What elastic replicas agree on at a time, and what each has of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from sync_cases import ThreadLine, on_processes

from partita.training.elastic_fragments import Fragments, OuterMethod
from partita.training.sync.method import Peers, State
from partita.training.sync.outer import DiLoCo, LocalSGD, StreamingDiLoCo
from partita.training.sync.rounded import Rounded

INT8 = Rounded(to="int8")
METHODS: dict[str, OuterMethod] = {
    "local_sgd": LocalSGD(every=5, compress=INT8),
    "diloco": DiLoCo(every=10, compress=INT8),
    "streaming": StreamingDiLoCo(every=12, fragments=3, delay=0, compress=INT8),
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(rows, 7, generator=generator) for name, rows in (("one", 40), ("two", 23))}


def copies(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@given(st.sampled_from(sorted(METHODS)), st.integers(0, 60))
def test_every_fragment_has_its_turn_when_that_of_replicas_which_stay_has(name: str, step: int) -> None:
    method = METHODS[name]
    fragments = Fragments(method, weights())
    due, fragment = fragments.next(step)
    num = len(fragments.all)
    turns = [
        (later, one)
        for later in range(step + 1, step + method.every + 1)
        for number, one in enumerate(fragments.all)
        if (later - number * method.every // num) % method.every == 0
    ]
    assert (due, fragment) == turns[0] and len(turns) == num


@pytest.mark.parametrize("name", METHODS)
def test_replicas_agree_to_the_bit_and_their_states_are_resumed(name: str) -> None:
    def one(place: int, line: ThreadLine, peers: Peers) -> tuple[State, State, bool]:
        values = weights()
        fragments = Fragments(METHODS[name], values)
        step = 0
        for _ in range(4):
            for value in values.values():
                value += torch.randn(value.shape, generator=torch.Generator().manual_seed(10 * step + place))
            step, fragment = fragments.next(step)
            before = copies(fragments.state())
            outer = fragment.attempt((0.25, 0.75)[place], peers, line)
            changed = not equal(fragments.state(), before)
            fragment.commit(outer)
        other = Fragments(METHODS[name], weights())
        other.resume(copies(fragments.state()))
        return fragments.agreed(), fragments.state(), not changed and equal(other.state(), fragments.state())

    (agreed, state, is_right), (others_agreed, others_state, others_is_right) = on_processes(2, one)
    assert is_right and others_is_right
    assert equal(agreed, others_agreed) and not equal(state, others_state)
    assert not equal(agreed, Fragments(METHODS[name], weights()).agreed())


def test_who_is_behind_brings_nothing_even_of_broken_weights() -> None:
    def one(place: int, line: ThreadLine, peers: Peers) -> Tensor:
        values = weights()
        fragments = Fragments(METHODS["diloco"], values)
        values["one"].fill_(float("nan") if place else 1.0)
        _, fragment = fragments.next(0)
        return torch.cat([value.reshape(-1) for value in fragment.attempt(float(not place), peers, line)])

    found = on_processes(2, one)
    assert torch.equal(found[0], found[1]) and found[0].isfinite().all() and found[0].any()

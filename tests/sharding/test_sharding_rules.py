"""Every written rule of every op of the models, not only the chosen ones: pieces recombine to the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.sharding.calls import OpCall, Slot, TensorSpec, read_graph
from partita.sharding.experiment import rule_holds
from partita.sharding.rules import Blocks, Cut, Rule, parse_rule
from partita.sharding.rules_views import group_cuts, matching_groups, view_rules
from partita.sharding.ruleset import rules_of

sys.path.insert(0, str(Path(__file__).parent))
from captured import joint_graph
from sharding_models import CASES

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


def cuts(rule: Rule) -> list[Blocks]:
    if rule.extent == 0:
        return [Blocks((1, 1))]
    found = [Blocks((rule.extent - 1, 1))]
    plain = not any(isinstance(s, Cut) and s.outer > 1 for s in (*rule.inputs, *rule.outputs))
    if plain and rule.extent % 2 == 0 and rule.extent >= 4:
        found.append(Blocks((rule.extent - 2, 2), outer=2))
    return found


@pytest.mark.parametrize("name", CASES)
def test_all_rules_of_all_ops(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    module, _, _ = joint_graph(case.model, lambda model, batch: case.loss(model, *batch), case.batch)
    calls = {op.call.key: op.call for op in read_graph(module).ops if not op.call.is_random}
    checked = 0
    for call in calls.values():
        if call.base_name.startswith(("empty", "new_empty")):
            continue  # what the whole run gives is undefined
        for rule in rules_of(call):
            for blocks in cuts(rule):
                assert rule_holds(call, rule, blocks), f"{call.name} {call.inputs} {call.args}: {rule.text()}"
                checked += 1
    assert checked > 10


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32, torch.device("cpu"))


def test_a_wrong_rule_is_found_out() -> None:
    call = OpCall(aten._softmax.default, (Slot(0), 1, False), {}, (spec(3, 4),), (spec(3, 4),), False)
    right, wrong = parse_rule("S0 -> S0", call), parse_rule("S1 -> S1", call)
    assert right is not None and wrong is not None
    assert rule_holds(call, right, Blocks((2, 1)))
    assert not rule_holds(call, wrong, Blocks((2, 2)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_views_by_any_cut(extents: list[int], data: st.DataObject) -> None:
    """Splitting and merging dims at random."""
    flat = [e for e in extents for _ in (0,)]
    breaks = data.draw(st.lists(st.booleans(), min_size=len(flat), max_size=len(flat)))
    merged: list[int] = []
    for extent, new in zip(flat, breaks, strict=True):
        if new or not merged:
            merged.append(extent)
        else:
            merged[-1] *= extent
    for left, right in ((flat, merged), (merged, flat)):
        call = OpCall(aten.view.default, (Slot(0), right), {}, (spec(*left),), (spec(*right),), False)
        for rule in view_rules(call):
            for blocks in cuts(rule):
                assert rule_holds(call, rule, blocks), rule.text()


def test_groups_and_cuts() -> None:
    assert matching_groups((6, 5), (2, 3, 5)) == [([0], [0, 1]), ([1], [2])]
    assert (Cut(1), Cut(0, 1, 6), 7) in group_cuts([(0, 6), (1, 7)], [(0, 42)])


def test_rule_text_is_read_back() -> None:
    call = OpCall(aten.mm.default, (Slot(0), Slot(1)), {}, (spec(3, 4), spec(4, 5)), (spec(3, 5),), False)
    for rule in rules_of(call):
        assert parse_rule(rule.text(), call) == rule
    assert parse_rule("S0 S0 -> S0", call) is None  # 3 and 4 rows cannot be cut alike

"""The rules benchmark judges rightly."""

from __future__ import annotations

import pytest
import torch

from benchmarks import op_samples, rule_trials, rules
from benchmarks.op_samples import Sample
from partita.sharding.rules import parse_rules


def test_samples_are_captured_as_functional_graphs() -> None:
    sample = next(op_samples.samples("nn.functional.linear", 1))
    module = op_samples.graph_of(sample)
    result = module(*sample.tensors, *module.constants.values())
    torch.testing.assert_close(list(result), sample.run(*sample.tensors))


def test_an_op_with_rules_is_found_right() -> None:
    found = rules.search({"op": "softmax"})["found"]
    row = rules.examine({"op": "softmax", "found": found})
    assert row["has_rule"] and row["num_wrong"] == 0 and row["num_tried"] > 0
    assert row["num_found"] > 0


def test_a_wrong_result_is_seen() -> None:
    honest = next(op_samples.samples("abs", 1))
    module = op_samples.graph_of(honest)
    liar = Sample("abs", honest.tensors, lambda *tensors: [tensor * 2 for tensor in tensors])
    verdict = rules.Verdict()
    cuts = next(rules._single_cuts(honest))
    assert not rules._try(module, honest, cuts, liar.run(*liar.tensors), verdict)
    assert len(verdict.wrong) == 1


def test_shares_and_misses_are_counted() -> None:
    row = {"captured": True, "random": False, "num_tried": 4, "num_found": 1, "num_achieved": 1, "wrong": []}
    row |= {"num_rules": 2, "num_rule_runs": 8}
    rows = [
        {**row, "op": "a", "should_have": True, "has_rule": True, "num_wrong": 0},
        {**row, "op": "b", "should_have": True, "has_rule": False, "num_wrong": 1, "wrong": ["x"]},
    ]
    summary, misses = rules.summarise(rows)
    assert summary["share"] == 0.5 and summary["num_wrong_ops"] == 1
    assert len(misses) == 2


def test_rules_of_the_gradients_are_tried() -> None:
    sample = next(op_samples.samples("nn.functional.conv2d", 1))
    trials = rule_trials.try_rules(sample, op_samples.graph_of(sample), set())
    assert trials.wrong == [] and trials.num_rules > 10 and trials.num_runs > 2 * trials.num_rules


def test_a_wrong_rule_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = next(op_samples.samples("softmax", 1))
    wrong = "S0 -> S0", "S1 -> S1", "S2 -> S2"
    monkeypatch.setattr(rule_trials, "rules_of", lambda call: parse_rules(wrong, call))
    trials = rule_trials.try_rules(sample, op_samples.graph_of(sample), set())
    assert any("_softmax" in text and "another result" in text for text in trials.wrong)

from __future__ import annotations

import copy
import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from partita.graph import Graph, InputKind, OutputKind, Phase, capture, run_graph

_SPEC = importlib.util.spec_from_file_location("graph_models", Path(__file__).with_name("graph_models.py"))
assert _SPEC is not None and _SPEC.loader is not None
models: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(models)


def _eager(model: nn.Module, loss_fn: Any, batch: Any) -> tuple[torch.Tensor, dict[str, Any], dict[str, Any]]:
    """Loss, gradients and all non-trained tensors after one step of plain PyTorch, on copies."""
    batch = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)
    torch.manual_seed(7)
    loss = loss_fn(model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    states = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return loss.detach(), gradients, states


def _build(case: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(1)
    return case()


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.__name__)
def test_loss_gradients_and_buffers_are_those_of_plain_pytorch(case: Any) -> None:
    model, loss_fn, batch = _build(case)
    reference = copy.deepcopy(model)
    graph = capture(model, loss_fn, batch)
    state = dict(model.named_parameters()), dict(model.named_buffers())
    torch.manual_seed(7)
    loss, gradients, updated = run_graph(graph, *state, batch)
    drawn = torch.rand(1)
    expected_loss, expected_gradients, expected_states = _eager(reference, loss_fn, batch)
    assert torch.equal(drawn, torch.rand(1)), "the graph must draw as many random numbers as plain PyTorch"
    torch.testing.assert_close(loss, expected_loss.reshape(()), rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)
    before = state[1] | state[0]
    for name, value in expected_states.items():
        assert (name in updated) == (not torch.equal(before[name], value)), name
        torch.testing.assert_close(updated.get(name, before[name]), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.__name__)
def test_capture_leaves_the_model_and_the_generators_alone(case: Any) -> None:
    model, loss_fn, batch = _build(case)
    before = {name: (id(value), value.clone()) for name, value in _all_tensors(model)}
    attributes = {path: {k: repr(v) for k, v in m.__dict__.items()} for path, m in model.named_modules()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    given = [leaf.clone() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    capture(model, loss_fn, batch)
    after = {name: (id(value), value) for name, value in _all_tensors(model)}
    assert {n: i for n, (i, _) in before.items()} == {n: i for n, (i, _) in after.items()}
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    assert attributes == {path: {k: repr(v) for k, v in m.__dict__.items()} for path, m in model.named_modules()}
    assert torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate()
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert all(torch.equal(old, new) and not new.requires_grad for old, new in zip(given, leaves, strict=True))


def _all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.__name__)
def test_graph_is_functional_and_described(case: Any) -> None:
    graph = capture(*_build(case))
    graph.module.graph.lint()
    placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in placeholders] == [item.node for item in graph.inputs]
    assert [node.name for node in graph.module.graph.output_node().args[0]] == [output.node for output in graph.outputs]
    assert graph.outputs[0].kind is OutputKind.LOSS
    for node in graph.nodes:
        assert "val" in node.meta and not node.target.__name__.startswith("native_dropout")
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable
        info = node.meta.get("op")
        assert (info is None) == ("getitem" in str(node.target))
        assert info is None or (info.flops >= 0 and info.num_bytes >= 0 and not info.source.startswith("<"))
    phases = [info.phase for _, info in graph.ops()]
    assert phases.count(Phase.BACKWARD) > 0 and phases[0] is Phase.FORWARD


def test_tied_weights_are_one_input_with_two_names() -> None:
    graph = capture(*models.tied_language_model())
    assert graph.aliases["head.weight"] == graph.aliases["embedding.weight"] == "embedding.weight"
    assert [item.name for item in graph.inputs].count("embedding.weight") == 1
    assert "head.weight" not in [item.name for item in graph.inputs]


def test_frozen_and_unreached_parameters() -> None:
    graph = capture(*models.frozen_and_unreached())
    assert [item.name for item in graph.inputs_of(InputKind.PARAMETER)][:2] == ["a.weight", "a.bias"]
    assert [output.target for output in graph.outputs_of(OutputKind.GRADIENT)] == ["b.weight", "b.bias"]
    assert graph.without_gradient == ("unused.weight", "unused.bias")


def test_frozen_parameters_that_the_step_moves_are_buffers() -> None:
    graph = capture(*models.moving_average())
    assert {item.name for item in graph.inputs_of(InputKind.BUFFER)} == {"target.weight", "target.bias"}
    assert {output.target for output in graph.outputs_of(OutputKind.BUFFER)} == {"target.weight", "target.bias"}


def test_only_changed_buffers_are_outputs() -> None:
    graph = capture(*models.in_place())
    assert [output.target for output in graph.outputs_of(OutputKind.BUFFER)] == ["count", "average"]
    assert [item.name for item in graph.inputs_of(InputKind.BUFFER)] == ["count", "average", "unused"]


def test_constants_are_named_after_the_attribute_that_holds_them() -> None:
    model, loss_fn, batch = models.plain_attribute()
    graph = capture(model, loss_fn, batch)
    assert graph.constants["scale"] is model.scale and len(graph.constants) == 2


def test_batch_leaves_keep_their_place_and_scalars_have_no_batch_dim() -> None:
    graph = capture(*models.nested_batch())
    leaves = {item.name: item.leaf for item in graph.inputs_of(InputKind.BATCH)}
    assert leaves == {"batch['x'][0]": 0, "batch['x'][1][1]": 2, "batch['weight']": 5}
    assert graph.batch_size == 5


def test_batch_size_is_the_extent_that_most_tensors_share() -> None:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return model(batch[0]).mean() + sum(part.float().mean() for part in batch[1:])

    graph = capture(nn.Linear(8, 2), loss_fn, [torch.randn(2, 8), torch.randn(9, 3), torch.randn(9)])
    assert graph.batch_size == 9


def test_meta_model_gives_the_graph_of_the_real_one() -> None:
    model, loss_fn, batch = models.convolution_net()
    real = capture(model, loss_fn, batch)
    meta = capture(copy.deepcopy(model).to("meta"), loss_fn, tuple(leaf.to("meta") for leaf in batch))
    assert meta.fingerprint == real.fingerprint
    assert all(
        node.meta["val"].device.type == "cpu" for node in meta.nodes if isinstance(node.meta["val"], torch.Tensor)
    )


def test_a_model_far_beyond_memory_is_captured_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(100_000, 100_000, bias=False) for _ in range(4)))
    graph = capture(model, models.square, torch.empty(8, 100_000, device="meta"))
    assert graph.flops > 4 * 2 * 8 * 1e10


def test_fingerprint_tells_models_and_batches_apart_but_not_values() -> None:
    def print_of(width: int, num: int, seed: int) -> str:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        return capture(model, models.classify, models.rows(num)).fingerprint

    assert print_of(16, 6, 0) == print_of(16, 6, 1)
    assert len({print_of(16, 6, 0), print_of(17, 6, 0), print_of(16, 7, 0)}) == 3


def test_fingerprint_tells_baked_in_values_apart() -> None:
    model = nn.Linear(8, 2)
    batch = {"x": torch.randn(3, 8), "scale": 0.5}
    first, second = (
        capture(model, lambda m, b: (m(b["x"]) * b["scale"]).sum(), batch | {"scale": s}) for s in (0.5, 0.25)
    )
    assert first.fingerprint != second.fingerprint


def _labels(graph: Graph, phase: Phase) -> dict[str, str]:
    return {str(node.target): info.module for node, info in graph.ops() if info.phase is phase and info.module}


def test_ops_know_phase_module_and_source() -> None:
    graph = capture(*models.batch_norm_and_dropout())
    forward, backward = _labels(graph, Phase.FORWARD), _labels(graph, Phase.BACKWARD)
    assert forward["aten.relu.default"] == backward["aten.threshold_backward.default"] == "2"
    assert forward["aten.bernoulli.p"] == "3"
    assert backward["aten.native_batch_norm_backward.default"] == "1"
    assert all(info.source.startswith(models.__file__) for _, info in graph.ops())


def test_backward_ops_point_to_the_line_of_their_forward_op() -> None:
    graph = capture(*models.custom_function())
    sources = {str(node.target): info.source for node, info in graph.ops()}
    lines = Path(models.__file__).read_text().splitlines()

    def line_of(target: str) -> str:
        return lines[int(sources[target].rpartition(":")[2]) - 1]

    assert "x.round()" in line_of("aten.round.default")
    assert "2 * gradient" in line_of("aten.cos.default")
    assert "F.cross_entropy" in line_of("aten.nll_loss_backward.default")


def test_gradients_inside_the_loss_are_forward() -> None:
    graph = capture(*models.gradient_penalty())
    assert any("tanh_backward" in str(node.target) and info.phase is Phase.FORWARD for node, info in graph.ops())


def test_forward_hooks_take_part() -> None:
    model, loss_fn, batch = models.mlp()
    model[1].register_forward_hook(lambda module, args, output: output * 3)
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    graph = capture(model, loss_fn, batch)
    loss, gradients, _ = run_graph(graph, dict(model.named_parameters()), {}, batch)
    expected_loss, expected, _ = _eager(model, loss_fn, batch)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients["0.weight"], expected["0.weight"])


def test_capture_in_ambient_no_grad_and_autocast() -> None:
    model, loss_fn, batch = models.mlp()
    with torch.no_grad():
        assert capture(model, loss_fn, batch).outputs_of(OutputKind.GRADIENT)
    with torch.autocast("cpu", torch.bfloat16):
        graph = capture(model, loss_fn, batch)
        expected_loss, expected, _ = _eager(copy.deepcopy(model), loss_fn, batch)
    loss, gradients, _ = run_graph(graph, dict(model.named_parameters()), {}, batch)
    torch.testing.assert_close(loss, expected_loss, check_dtype=False)
    torch.testing.assert_close(gradients["0.weight"], expected["0.weight"])


def test_loss_fn_may_close_over_the_model() -> None:
    model, _, batch = models.mlp()
    graph = capture(model, lambda _, b: models.classify(model, b), batch)
    assert len(graph.outputs_of(OutputKind.GRADIENT)) == 4 and not graph.constants


def test_one_tensor_as_the_batch_and_loss_of_one_element() -> None:
    model, batch = nn.Linear(8, 1), torch.randn(1, 8)
    graph = capture(model, lambda m, b: m(b), batch)
    loss, _, _ = run_graph(graph, dict(model.named_parameters()), {}, batch)
    assert loss.shape == () and graph.inputs_of(InputKind.BATCH)[0].name == "batch"

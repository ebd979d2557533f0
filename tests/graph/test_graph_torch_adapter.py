"""Names every part of torch that is not public and that capture uses: a new torch that lacks one fails here first."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch import fx, nn

from partita.graph import torch_adapter


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch._subclasses.fake_tensor", "FakeTensorMode"),
        ("torch._subclasses.fake_tensor", "FakeTensor"),
        ("torch.fx.experimental.proxy_tensor", "make_fx"),
        ("torch.fx.experimental.proxy_tensor", "get_proxy_mode"),
        ("torch.utils._python_dispatch", "TorchDispatchMode"),
        ("torch.utils._python_dispatch", "is_traceable_wrapper_subclass"),
        ("torch.utils._python_dispatch", "_disable_current_modes"),
        ("torch.autograd", "_get_sequence_nr"),
        ("torch._C", "_current_autograd_node"),
        ("torch.utils.checkpoint", "_checkpoint_hook"),
        ("torch.utils.checkpoint", "CheckpointFunction"),
        ("torch._dynamo", "OptimizedModule"),
        ("torch._ops", "OpOverload"),
        ("torch._inductor.codecache", "CppCodeCache"),
        ("torch.fx._lazy_graph_module", "_LazyGraphModule"),
    ],
)
def test_is_there(owner: str, name: str) -> None:
    module = __import__(owner, fromlist=[name])
    assert hasattr(module, name)


def test_make_fx_takes_what_is_passed() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    assert {"decomposition_table", "tracing_mode", "_allow_non_fake_inputs"} <= set(
        inspect.signature(make_fx).parameters
    )
    assert {"_compiled_call_impl"} <= set(vars(nn.Linear(1, 1))) | set(vars(nn.Module))
    assert torch.ops.aten.add_.Tensor._schema.is_mutable and not torch.ops.aten.add.Tensor._schema.is_mutable


def test_sequence_numbers_join_backward_to_forward() -> None:
    x = torch.ones(2, requires_grad=True)
    before = torch_adapter.last_sequence_number()
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(torch_adapter.forward_sequence_number())
            return gradient

    Watch.apply(x).sum().backward()
    assert torch_adapter.forward_sequence_number() is None
    assert seen[0] is not None and seen[0] > before


def test_recomputation_is_switched_off_and_on_again() -> None:
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sin().sin()

    def step(reentrant: bool) -> int:
        calls.clear()
        x = torch.ones(2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant).sum().backward()
        return len(calls)

    with torch_adapter.without_recomputation():
        assert (step(False), step(True)) == (1, 1)
    assert (step(False), step(True)) == (2, 2)


def test_hooks_are_found() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert torch_adapter.gradient_hooks(parameter) == [] and not torch_adapter.has_accumulation_hooks(parameter)
    parameter.register_hook(torch.neg)
    assert torch_adapter.gradient_hooks(parameter) == [torch.neg]
    parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert torch_adapter.has_accumulation_hooks(parameter)


def test_views_and_writes_are_told_apart() -> None:
    aten = torch.ops.aten
    assert all(torch_adapter.is_view(op) for op in (aten.view.default, aten.t.default, aten._unsafe_view.default))
    assert not any(torch_adapter.is_view(op) for op in (aten.add.Tensor, aten.add_.Tensor, aten.clone.default))
    for op in (aten.view.default, aten.unbind.int, aten.split.Tensor, aten.unsafe_split.Tensor):
        assert torch_adapter.viewed_arguments(op) == (0,)
    assert torch_adapter.viewed_arguments(aten.add.Tensor) == torch_adapter.viewed_arguments(len) == ()
    assert torch_adapter.mutates(aten.add_.Tensor) and not torch_adapter.mutates(aten.view.default)


def test_unannotated_views_share_storage() -> None:
    x = torch.ones(4, 2)
    for op in torch_adapter._UNANNOTATED_VIEWS:
        arguments = {"_unsafe_view": ([8],), "lift_fresh": (), "unsafe_split_with_sizes": ([2, 2],)}
        results = op(x, *arguments.get(op._schema.name.removeprefix("aten::"), (2,)))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            assert result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), op


def test_dropout_in_parts_is_plain_dropout() -> None:
    table = torch_adapter.eager_random()
    native, backward = (
        table[torch.ops.aten.native_dropout.default],
        table[torch.ops.aten.native_dropout_backward.default],
    )
    x = torch.randn(50, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(x, 0.4)
    torch.manual_seed(3)
    value, mask = native(x, 0.4, True)
    assert torch.equal(value, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(backward(torch.ones(50), mask, 1 / 0.6), gradient)
    for p, train in ((0.0, True), (1.0, True), (0.5, False)):
        reference = torch.native_dropout(x, p, train)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(native(x, p, train), reference, strict=True))


def test_ops_tell_whether_they_take_a_generator() -> None:
    aten = torch.ops.aten
    assert torch_adapter.takes_generator(aten.bernoulli.p)
    assert not torch_adapter.takes_generator(aten.rand.default)
    assert torch_adapter.overload_with_generator(aten.rand.default) is aten.rand.generator
    assert torch_adapter.overload_with_generator(aten.randint.low) is aten.randint.low_generator
    assert torch_adapter.overload_with_generator(aten.add.Tensor) is None


def test_a_module_writes_its_code_when_several_threads_first_run_it() -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(200):
        value = graph.call_function(torch.ops.aten.add.Tensor, (value, 1.0))
    graph.output((value,))
    module = torch_adapter.module_of(graph)
    assert module._needs_recompile()
    start, found = threading.Barrier(4), []

    def run() -> None:
        start.wait()
        found.append(module(torch.zeros(2)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.tolist() for (result,) in found] == 4 * [[200.0, 200.0]]
    assert not module._needs_recompile() and "add_tensor_199" in module.code
    assert copy.deepcopy(module)(torch.zeros(1))[0].item() == 200.0

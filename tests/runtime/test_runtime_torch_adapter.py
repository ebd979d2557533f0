"""The private parts of torch that the runtime relies on, by name: this fails first when torch changes them."""

from __future__ import annotations

import inspect

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from partita.runtime import torch_adapter


def test_names_exist() -> None:
    import torch._inductor as inductor
    from torch._inductor import config, lowering, mkldnn_ir
    from torch.distributed import distributed_c10d

    parameters = inspect.signature(inductor.standalone_compile).parameters
    assert {"dynamic_shapes", "options", "fake_mode"} <= set(parameters)
    assert isinstance(config.cpp_wrapper, bool)
    assert isinstance(config.fallback_random, bool)
    assert isinstance(config.cpp.threads, int)
    assert isinstance(lowering.lowerings, dict) and callable(mkldnn_ir._create_output_node)
    assert list(inspect.signature(mkldnn_ir.LinearUnary.__init__).parameters)[1:] == [
        "layout",
        "inputs",
        "constant_args",
    ]
    assert callable(distributed_c10d._get_default_store)
    with FakeTensorMode(shape_env=ShapeEnv()):
        assert torch.empty_strided((2, 3), (1, 2)).stride() == (1, 2)


def test_ops_tell_their_names() -> None:
    aten = torch.ops.aten
    assert torch_adapter.op_name(aten.rand_like.default) == ("rand_like", "default")
    assert torch_adapter.op_name(len) == ("", "")
    assert torch.equal(torch_adapter.direct(aten.add.Tensor)(torch.ones(2), 1), torch.full((2,), 2.0))
    assert torch_adapter.direct(len) is len

"""Small hand-made programs for the runtime's tests: segments traced from functions, plans of idle cores, engines."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from partita.graph.graph import Phase
from partita.graph.storages import graph_memory
from partita.plan import Plan, Worker
from partita.program.instructions import Feed, Instruction, Program, ProgramSet, Run, Segment, Slice, TensorSpec
from partita.runtime.engine import Engine, State


def spec(value: Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), value.dtype)


def segment(key: str, function: Callable[..., Sequence[Tensor]], *examples: Tensor, random: bool = False) -> Segment:
    """A segment traced from a function of tensors that returns a tuple of tensors."""
    module = make_fx(function, tracing_mode="fake")(*examples)
    state = torch.get_rng_state()
    outputs = function(*examples)
    torch.set_rng_state(state)
    return Segment(
        key=key,
        module=module,
        input_specs=tuple(map(spec, examples)),
        output_specs=tuple(map(spec, outputs)),
        flops=0,
        num_bytes=0,
        memory=graph_memory(module.graph),
        random=random,
    )


def run(
    part: Segment, inputs: Sequence[str], outputs: Sequence[str], *, accumulate: bool = False, microbatch: int = 0
) -> Run:
    return Run(
        segment=part.key,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        phase=Phase.FORWARD,
        microbatch=microbatch,
        stage=0,
        accumulate=(accumulate,) * len(outputs),
    )


def program(
    worker: int, instructions: Sequence[Instruction], *, feeds: Sequence[Feed] = (), process: int = 0, **options: Any
) -> Program:
    options.setdefault("loss", "n:loss")
    return Program(
        worker=worker, process=process, stage=0, instructions=tuple(instructions), feeds=tuple(feeds), **options
    )


def program_set(programs: Sequence[Program], segments: Sequence[Segment] = (), **options: Any) -> ProgramSet:
    return ProgramSet(programs=tuple(programs), segments={part.key: part for part in segments}, **options)


def plan_for(programs: ProgramSet, *, compiled: bool = False, threads_per_worker: int = 1) -> Plan:
    workers = tuple(
        Worker(index=p.worker, process=p.process, machine=0, cores=(), stage=p.stage, data=p.worker)
        for p in programs.programs
    )
    return Plan(
        mode="graph",
        graph_fingerprint="",
        cluster_fingerprint="",
        axes={"data": len(workers)},
        workers=workers,
        threads_per_worker=threads_per_worker,
        compiled=compiled,
    )


def no_update(worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
    raise AssertionError("this program has no Update")


def engine(programs: ProgramSet, *, parameters: dict[str, Tensor] | None = None, **options: Any) -> Engine:
    state = State(
        parameters=parameters or {}, buffers=options.pop("buffers", {}), constants=options.pop("constants", {})
    )
    options.setdefault("update", no_update)
    options.setdefault("timeout_s", 20.0)
    options.setdefault("process", 0)
    return Engine(programs, plan_for(programs, compiled=options.pop("compiled", False)), state=state, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

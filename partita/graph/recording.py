"""Records one training step as ATen ops: loss and gradients together, then without any mutation.

First recording: the loss and ``torch.autograd.grad`` run on fake tensors and every ATen op is written down, with its
label. Second recording: the written-down ops run under ``torch.func.functionalize``, which turns in-place ops and
writes through views into new values.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from partita.errors import CaptureError, PartitaError
from partita.graph import checks, torch_adapter
from partita.graph.graph import Phase
from partita.graph.labels import UNKNOWN, Label, Labels, Relabel, last_node, source_of_error
from partita.graph.standins import ModelTensors, Substitution, model_tensors, watched_generators
from partita.graph.validation import Answers, UndecidedError, answered


@dataclass
class Recording:
    """One recorded training step.

    Attributes:
        module: takes parameters, buffers, tensor leaves of the batch, the seed, then `constants`; returns the flat
            tuple of the loss, the gradients of `with_gradient` and the new values of `states`.
        labels: node -> where it comes from.
        constants: real tensors that the step closes over, by placeholder name.
        with_gradient: names of the parameters whose gradients are returned.
        states: names of the buffers and frozen parameters whose final values are returned.
        unchecked: lines that check values and are left out.
        made: id of a tensor that an op returned -> the tensor and its node.
    """

    module: fx.GraphModule
    labels: dict[fx.Node, Label]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    with_gradient: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    made: dict[int, tuple[torch.Tensor, fx.Node]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepInputs:
    """What a training step is computed from.

    Attributes:
        tensors: parameters and buffers of the model.
        paths: pytree path of every leaf of the batch.
        leaves: all leaves of the batch.
        spec: their tree structure.
        device: where fake tensors live; None: where the real ones are (those on "meta": on the CPU).
        wide_gradients: gradients of less than 32 bits are cast to float32.
    """

    tensors: ModelTensors
    paths: Sequence[tuple[Any, ...]]
    leaves: Sequence[Any]
    spec: pytree.TreeSpec
    device: torch.device | None
    wide_gradients: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        batch: Any,
        *,
        device: torch.device | str | None = None,
        wide_gradients: bool = False,
    ) -> StepInputs:
        """Those of a model and a batch.

        Raises:
            InputError: the model, the loss function or the batch cannot be used as given.
        """
        checks.check_model(model)
        checks.check_callable(loss_fn)
        paths, spec = pytree.tree_flatten_with_path(batch)
        checks.check_batch(paths)
        return cls(
            tensors=model_tensors(model),
            paths=[path for path, _ in paths],
            leaves=[leaf for _, leaf in paths],
            spec=spec,
            device=None if device is None else torch.device(device),
            wide_gradients=wide_gradients,
        )

    @property
    def batch_size(self) -> int:
        """Extent of dim 0 that the tensors of the batch share (0: none has one)."""
        return checks.shared_batch_size(self._batch())

    def _batch(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def originals(self) -> list[torch.Tensor]:
        return [*self.tensors.parameters.values(), *self.tensors.buffers.values(), *self._batch()]

    def fakes(self) -> list[torch.Tensor]:
        """Tensors without storage, one for each of the originals, and the seed."""
        return [self._fake(tensor) for tensor in self.originals()] + [torch.empty((), dtype=torch.float32)]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        device = self.device or (torch.device("cpu") if tensor.device.type == "meta" else tensor.device)
        return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)


def record(
    model: nn.Module, loss_fn: Callable[[Any, Any], Any], inputs: StepInputs, substitution: Substitution
) -> Recording:
    """The training step as ops, mutations included (the first recording)."""
    drawn_from: list[str] = []
    failed_op = ""

    def attempt(answers: Answers) -> Recording:
        nonlocal failed_op
        result = Recording(module=fx.GraphModule({}, fx.Graph()), labels={})
        step = _Step(model, loss_fn, inputs, substitution, answers, result)
        try:
            result.module = torch_adapter.trace(
                lambda values: step.run(values), [inputs.fakes()], torch_adapter.eager_random()
            )
        finally:
            failed_op = step.failed_op
        return result

    with watched_generators(drawn_from), tracing_flags(), torch_adapter.without_recomputation():
        try:
            recording, unchecked = answered(attempt)
        except PartitaError:
            raise
        except Exception as error:
            raise _capture_error(error, failed_op) from error
    if drawn_from:
        raise CaptureError(
            f"The model draws random numbers from {' and '.join(drawn_from)} while it runs, which a graph "
            f"cannot repeat. "
            "Draw them with torch (torch.rand, torch.randint, ...), or before the step and pass them in the batch.",
            op=drawn_from[0],
        )
    recording.unchecked = unchecked
    return recording


@contextlib.contextmanager
def tracing_flags() -> Iterator[None]:
    """Gradients on, one autograd thread (the recording is per thread), cuDNN's recurrent layers and batch norm as
    plain ops.

    cuDNN's batch norm hides what it writes, its recurrent layers have a workspace of unknown size. Convolutions and
    matrix products are not affected: they choose their library when they run.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", message=".*TF32 acceleration.*"
        )  # of the switch below, on machines without one
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN.*")
        with torch.backends.cudnn.flags(enabled=False):
            yield


@dataclass
class _Step:
    """The function that is recorded."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Any]
    inputs: StepInputs
    substitution: Substitution
    answers: Answers
    result: Recording
    failed_op: str = ""

    def run(self, fakes: list[torch.Tensor]) -> list[torch.Tensor]:
        labels = Labels(self.model, self.answers)
        self.result.labels, self.result.made = labels.labels, labels.made
        with labels:
            try:
                return self._loss_and_gradients(fakes, labels)
            finally:
                self.failed_op = labels.failed

    def _loss_and_gradients(self, fakes: list[torch.Tensor], labels: Labels) -> list[torch.Tensor]:
        *values, seed = fakes
        standins, batch = put_stand_ins(self.inputs, values, self.substitution)
        with labels.modules():
            loss = checks.check_loss(self.loss_fn(self.model, batch))
        trainable = {name: new for name, (_, new) in standins.items() if new.requires_grad}
        self._check_no_backward(trainable)
        labels.phase = Phase.BACKWARD
        with labels.modules():
            gradients = torch.autograd.grad(
                loss, list(trainable.values()), grad_outputs=seed.to(loss.dtype), allow_unused=True
            )
            if self.inputs.wide_gradients:
                gradients = tuple(gradient.float() if _is_half(gradient) else gradient for gradient in gradients)
        reached = {name: gradient for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None}
        if not reached:
            checks.check_loss(loss.detach())  # the loss depends on some tensor, but on no parameter of the model
        labels.phase = Phase.FORWARD
        states = {name: self.substitution.current(name) for name, (old, _) in standins.items() if not _trains(old)}
        kept = {name: value for name, value in states.items() if value is not None}
        self.result.with_gradient, self.result.states = tuple(reached), tuple(kept)
        return [loss.detach(), *reached.values(), *(value.detach() for value in kept.values())]

    @staticmethod
    def _check_no_backward(trainable: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in trainable.items():
            if tensor.grad is not None:
                raise CaptureError(
                    f"loss_fn must return the loss and leave the gradients alone, but it wrote that of '{name}'. "
                    "Remove .backward() from loss_fn, or use torch.autograd.grad(..., create_graph=True) inside it.",
                    op="backward",
                )


def put_stand_ins(
    inputs: StepInputs, values: Sequence[torch.Tensor], substitution: Substitution
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], Any]:
    """Name -> (original, stand-in) of the model's tensors, which the model has from now on, and the batch, made from
    one of `values` for each original.

    Trainable parameters become new leaves. The rest are copies, so that in-place updates never touch an input.
    """
    originals = inputs.originals()
    names = [*inputs.tensors.parameters, *inputs.tensors.buffers]
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, original, value in zip(names, originals, values, strict=False):
        new = value.detach().requires_grad_() if _trains(original) else value.clone()
        for hook in torch_adapter.gradient_hooks(original) if _trains(original) else ():
            new.register_hook(hook)
        found[name] = original, new
    substitution.put({id(original): new for original, new in found.values()})
    tensors = iter(
        value.clone().requires_grad_(original.requires_grad)
        for original, value in zip(originals[len(names) :], values[len(names) :], strict=True)
    )
    leaves = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs.leaves]
    return found, pytree.tree_unflatten(leaves, inputs.spec)


def _trains(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad


def _is_half(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and gradient.dtype in (torch.bfloat16, torch.float16)


_WHY = (
    (
        "_local_scalar_dense",
        "a Python number is read from a tensor's data (.item(), float(), int(), if, bool(), .tolist())",
    ),
    ("nonzero", "the number of results depends on the data (nonzero, boolean indexing, torch.where with one argument)"),
    ("masked_select", "the number of results depends on the data (boolean indexing)"),
    ("unique", "the number of results depends on the data (torch.unique)"),
    ("repeat_interleave", "the number of results depends on the data (repeat_interleave with a tensor of counts)"),
)
_CURE = (
    "Write it with ops whose shapes do not depend on the data (torch.where, multiplication by a mask, a fixed "
    "number of iterations), or compute it before the step and pass it in the batch."
)


def _capture_error(error: Exception, failed_op: str) -> CaptureError:
    """What the user has to know about an exception that stopped the recording."""
    op = str(getattr(error, "func", "")) or failed_op
    if not op:
        found = re.search(r"aten\.\w+(\.\w+)?", str(error))
        op = found.group(0) if found else type(error).__name__
    source = error.source if isinstance(error, UndecidedError) else source_of_error(error.__traceback__)
    for part, why in _WHY:
        if part in op:
            return CaptureError(
                f"The model must be one graph, but in {op} at {source} {why}. {_CURE}", op=op, source=source
            )
    return CaptureError(
        f"The model must be one graph, but {op} at {source} raised {type(error).__name__}: {error}. "
        "If plain PyTorch runs this batch, the step does something that only works on real data: reading values "
        f"(.numpy(), .tolist()), changing Python state, or an op without shape rules. {_CURE}",
        op=op,
        source=source,
    )


def lift_constants(recording: Recording) -> None:
    """Makes every real tensor that the step closes over a placeholder at the end (the same tensor once)."""
    graph = recording.module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    by_tensor: dict[int, fx.Node] = {}
    last = placeholders[-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(recording.module, str(node.target))
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"The model uses {node.target}, an op with a graph of its own (flex_attention, cond, "
                f"while_loop), which "
                "cannot be split. Use plain ops (scaled_dot_product_attention, torch.where).",
                op=str(node.target),
            )
        if id(value) not in by_tensor:
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(by_tensor)}")
            last.meta["val"] = node.meta.get("val")
            by_tensor[id(value)] = last
            recording.constants[last.name] = value
        node.replace_all_uses_with(by_tensor[id(value)])
        graph.erase_node(node)
    recording.module.recompile()


def functionalize(recording: Recording, inputs: StepInputs, seed_dtype: torch.dtype) -> Recording:
    """The same step without mutations (the second recording); the seed has the type of the loss."""
    relabel = Relabel(recording.module, recording.labels)
    fakes = [*inputs.fakes()[:-1], torch.empty((), dtype=seed_dtype)]
    fakes += [
        torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype, device=_real(t))
        for t in recording.constants.values()
    ]

    def run(*values: torch.Tensor) -> Any:
        result = torch.func.functionalize(relabel.run, remove="mutations")(*values)
        _label_rest(relabel.labels)
        return result

    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        try:
            module = torch_adapter.trace(run, fakes, {})
        except Exception as error:
            raise _capture_error(error, "") from error
    return Recording(
        module=module,
        labels=relabel.labels,
        constants=recording.constants,
        with_gradient=recording.with_gradient,
        states=recording.states,
        unchecked=recording.unchecked,
    )


def _real(tensor: torch.Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _label_rest(labels: dict[fx.Node, Label]) -> None:
    """Nodes that functionalization adds at the end get the label of what they are made from."""
    graph = torch_adapter.current_trace()
    assert last_node(graph) is not None
    for node in graph.nodes:
        if node.op == "call_function" and node not in labels:
            labels[node] = next((labels[item] for item in node.all_input_nodes if item in labels), UNKNOWN)

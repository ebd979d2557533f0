"""Predicted time and memory of one training step of any layers on any fabric, in closed form: no device, no search.

Chunk c (of p v, in model order) lives on stage ``c mod p``; a stage has ``t x c x d`` ranks (tensor fastest, then
context, data, pipeline slowest). For one microbatch on the slowest GPU kind of its stage,

    D = sum of kernel times + blocking exchanges,  H = launches x host time of one,  O = overlapped exchanges
    after each layer:  end <- both(end + D of the layer, sum of H so far)    (the host runs ahead of the device; a pass
    that ends with its heaviest layer, the head, hides less of the host's time than one that begins with it)
    before a forward pass:  end = sum of H = the launches that fetch the batch
    pass = end, then beside O:  max(pass, O) + (1 - overlap) min(pass, O)

for the forward and the backward pass; the backward pass runs the forward again with full recomputation, the attention
core with selective recomputation. Fully sharded parameters (ZeRO-3) add a gather of the layer to both passes and a
reduce-scatter to the backward one, ZeRO-2 only the latter; both overlap. Sending to the next stage follows each pass.
Then

    step = makespan(schedule)  +  gradients' exchange that the last backward pass does not hide  +  optimizer

Memory of a stage, with q parameters and n = d c ranks that share them (ZeRO: Rajbhandari et al. 2020, section 5):

    q (weights / (n if zero 3) + gradients / (n if zero >= 2) + optimizer / (n if zero >= 1))
    + activations kept of one microbatch x microbatches in flight + the largest temporary + `RESERVE_BYTES`

In flight on stage s: 1F1B and zero-bubble min(m, p - s) (Narayanan et al. 2021, section 2.2); interleaved
min(m v, 2 (p - s - 1) + (v - 1) p + 1) chunks; GPipe m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from partita.cost.calibration import Calibration
from partita.cost.efficiency import Speed, both
from partita.cost.kernels import Exchange, Item, LayerWork
from partita.cost.networks import Channel, Fabric, channel, edge_s
from partita.errors import InputError
from partita.planner.scale.schedules import Schedule, makespan_s

Remat = Literal["none", "selective", "full"]
Chunk = Sequence[tuple[LayerWork, int]]  # layers and how many of each, in model order

# CUDA context, libraries' workspaces, communicators' buffers: about 1.5 GiB on data centre boards (NCCL alone keeps
# tens of MiB for each of the groups of a process), and the allocator's rounding of a few per cent of what it holds.
RESERVE_BYTES = 1.5 * 2**30
ROUNDING = 1.04
HIDDEN_LEAST = 0.05  # share of the gradients' exchange that no backward pass hides
UPDATE_PASSES = 1.0  # of the optimizer's bytes


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways each axis splits. Ranks are ordered tensor (fastest), context, data, pipeline (slowest)."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # chunks of layers that each pipeline stage holds
    context: int = 1
    expert: int = 1  # a part of data x context

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def stage_devices(self) -> int:
        return self.data * self.tensor * self.context


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes that training keeps for one parameter, and what the gradients' exchange and the update move.

    Defaults: mixed precision with Adam (two-byte weights, four-byte gradients, master copy and two moments:
    Megatron-LM, 18 bytes). `update_bytes`: gradients read (and scaled and clipped: three passes), the state read and
    written.
    """

    weight_bytes: float = 2.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 12.0
    exchange_bytes: float = 4.0
    update_bytes: float = 38.0


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """`parts`, seconds: "compute" (one microbatch's passes summed over the busiest stage's microbatches), "exchange"
    (the share of those in blocking or not hidden exchanges), "bubble", "data_exchange", "optimizer"."""

    step_time_s: float
    memory_bytes: tuple[float, ...]  # peak of one device of each pipeline stage
    parts: dict[str, float]

    @property
    def peak_memory_bytes(self) -> float:
        return max(self.memory_bytes)


@dataclass(kw_only=True)
class _Pass:
    """Seconds of one pass of one microbatch."""

    device_s: float = 0.0
    exchange_s: float = 0.0
    host_s: float = 0.0
    hidden_s: float = 0.0
    busy_s: float = 0.0  # when the device has ended what was added so far

    def add(self, other: _Pass, count: float = 1.0) -> None:
        """What follows `count` times."""
        self.device_s += count * other.device_s
        self.exchange_s += count * other.exchange_s
        self.host_s += count * other.host_s
        self.hidden_s += count * other.hidden_s
        self.busy_s = both(self.busy_s + count * (other.device_s + other.exchange_s), self.host_s)

    def total_s(self, overlap: float) -> float:
        return max(self.busy_s, self.hidden_s) + (1 - overlap) * min(self.busy_s, self.hidden_s)

    def times(self, count: float) -> _Pass:
        """A pass that is this, ``count`` times, and nothing else."""
        found = _Pass()
        found.add(self, count)
        return found


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One GPU kind that a stage runs on, with the channels of its ranks."""

    speed: Speed
    channels: dict[str, Channel]


@dataclass(kw_only=True)
class _Priced:
    forward: _Pass = field(default_factory=_Pass)
    backward: _Pass = field(default_factory=_Pass)


def predict_step(
    chunks: Sequence[Chunk],
    degrees: Degrees,
    fabric: Fabric,
    *,
    num_microbatches: int,
    schedule: Schedule = "1f1b",
    remat: Remat = "none",
    zero: int = 0,
    state: State | None = None,
    overlap_data: bool = True,
    compiled: bool = False,
    input_launches: int = 0,
    calibration: Calibration | None = None,
) -> StepPrediction:
    """Predicted step time (s) and peak memory (bytes) of each stage.

    Args:
        chunks: ``pipeline x virtual`` runs of layers in model order, with local shapes.
        num_microbatches: of one data-parallel replica in one step.
        zero: 0-3: what is sharded over the data axis (1 optimizer state, 2 + gradients, 3 + parameters).
        overlap_data: whether the exchange of gradients hides behind the last backward pass.
        compiled: whether the host's launches are no limit (CUDA graphs, whole-graph compilers).
        input_launches: kernels that the host starts before each forward pass, while the device waits for its batch.

    Example:
        >>> from partita.cluster.presets import GPU_KINDS
        >>> from partita.cost.networks import NodeGroup
        >>> from partita.planner.scale.transformer import Split, Transformer, chunks_of
        >>> model = Transformer(layers=24, hidden=2048, heads=16, ffn=8192, vocab=51200, seq=2048)
        >>> fabric = Fabric(groups=(NodeGroup.of(GPU_KINDS["A100-80"], 8),))
        >>> chunks = chunks_of(model, Split(micro_batch=2), num_chunks=1)
        >>> 0.1 < predict_step(chunks, Degrees(data=8), fabric, num_microbatches=4).step_time_s < 10
        True

    Raises:
        InputError: the degrees, chunks and fabric do not fit each other.
        ClusterError: a GPU does not compute in the dtype of a kernel.
    """
    _validate(chunks, degrees, fabric, num_microbatches, zero)
    state = state or State()
    calibration = calibration or Calibration()
    p = degrees.pipeline
    own = range(p) if len(fabric.groups) > 1 else (0,)  # equal machines: all stages see the same
    places = [_places(fabric, degrees, stage, calibration) for stage in own]
    places *= p // len(places)
    overlaps = [min(place.speed.constants.overlap for place in stage) for stage in places]
    priced: list[_Priced] = []
    cache: dict[tuple[int, int], _Priced] = {}
    before = 0 if compiled else input_launches
    for index, chunk in enumerate(chunks):
        own_places, overlap = places[index % p], overlaps[index % p]
        priced.append(_slowest(chunk, own_places, remat, zero, state, compiled, before, overlap, cache))
    sends = _sends(chunks, degrees, fabric, calibration)
    forward_s = [one.forward.total_s(overlaps[i % p]) + sends[i] for i, one in enumerate(priced)]
    backward_s = [one.backward.total_s(overlaps[i % p]) + (sends[i - 1] if i else 0.0) for i, one in enumerate(priced)]
    busy = [sum(forward_s[s::p]) + sum(backward_s[s::p]) for s in range(p)]
    pipeline_s = makespan_s(
        tuple(forward_s), tuple(backward_s), num_stages=p, num_microbatches=num_microbatches, schedule=schedule
    )
    data_s, update_s = _after(chunks, degrees, places, priced, backward_s, state, zero, overlap_data, overlaps)
    slowest = max(range(p), key=busy.__getitem__)
    exchange_s = num_microbatches * sum(
        part.exchange_s for one in priced[slowest::p] for part in (one.forward, one.backward)
    )
    return StepPrediction(
        step_time_s=pipeline_s + data_s + update_s,
        memory_bytes=tuple(
            _memory_bytes(chunks, degrees, stage, num_microbatches, schedule, remat, zero, state) for stage in range(p)
        ),
        parts={
            "compute": num_microbatches * busy[slowest] - exchange_s,
            "exchange": exchange_s,
            "bubble": pipeline_s - num_microbatches * busy[slowest],
            "data_exchange": data_s,
            "optimizer": update_s,
        },
    )


def _validate(chunks: Sequence[Chunk], degrees: Degrees, fabric: Fabric, num_microbatches: int, zero: int) -> None:
    if len(chunks) != degrees.pipeline * degrees.virtual:
        raise InputError(
            f"there must be pipeline x virtual = {degrees.pipeline * degrees.virtual} chunks, but got {len(chunks)}."
        )
    if degrees.num_devices > fabric.num_gpus:
        raise InputError(f"the degrees take {degrees.num_devices} GPUs, but the fabric has {fabric.num_gpus}.")
    if num_microbatches < 1 or zero not in (0, 1, 2, 3):
        raise InputError(f"microbatches must be at least 1 and zero 0 to 3, but got {num_microbatches} and {zero}.")


def _places(fabric: Fabric, degrees: Degrees, stage: int, calibration: Calibration) -> list[_Place]:
    span = degrees.stage_devices
    first = stage * span
    axes = {
        "tensor": (degrees.tensor, 1),
        "context": (degrees.context, degrees.tensor),
        "data": (degrees.data * degrees.context, degrees.tensor),
        "expert": (degrees.expert, degrees.tensor),
    }
    channels = {
        axis: channel(fabric, calibration, num_ranks=ranks, stride=stride, first=first, span=span)
        for axis, (ranks, stride) in axes.items()
    }
    kinds = {group.kind.gpu.name: group.kind for group in fabric.groups_of(first, first + span - 1)}
    return [_Place(speed=Speed.of(kind, calibration.of(kind.generation)), channels=channels) for kind in kinds.values()]


def _slowest(
    chunk: Chunk,
    places: list[_Place],
    remat: Remat,
    zero: int,
    state: State,
    compiled: bool,
    input_launches: int,
    overlap: float,
    cache: dict[tuple[int, int], _Priced],
) -> _Priced:
    """The chunk's passes on the kind of GPU that takes longest for them."""
    best: _Priced | None = None
    best_s = -1.0
    for place in places:
        total = _Priced()
        start_s = input_launches * place.speed.constants.launch_s
        total.forward.host_s = total.forward.busy_s = start_s
        layers = []
        for work, count in chunk:
            key = (id(work), hash((place.speed.name, tuple(place.channels.values()))))
            one = cache.get(key)
            if one is None:
                one = cache[key] = _price_layer(work, place, remat, zero, state, compiled)
            layers.append((one, count))
            total.forward.add(one.forward, count)
        for one, count in reversed(layers):
            total.backward.add(one.backward, count)
        time_s = total.forward.total_s(overlap) + total.backward.total_s(overlap)
        if time_s > best_s:
            best, best_s = total, time_s
    assert best is not None
    return best


def _price_layer(work: LayerWork, place: _Place, remat: Remat, zero: int, state: State, compiled: bool) -> _Priced:
    forward = _price(work.forward, place, compiled)
    backward = _price(work.backward, place, compiled)
    if remat == "full" and work.name != "head":
        backward.add(forward)
    elif remat == "selective":
        backward.add(_price(work.selective, place, compiled))
    if zero >= 2:
        data = place.channels["data"]
        backward.hidden_s += data.collective_s("reduce_scatter", state.exchange_bytes * work.parameter_elements)
        if zero == 3:
            gather_s = data.collective_s("all_gather", state.weight_bytes * work.parameter_elements)
            forward.hidden_s += gather_s
            backward.hidden_s += gather_s
    return _Priced(forward=forward, backward=backward)


def _price(items: tuple[Item, ...], place: _Place, compiled: bool) -> _Pass:
    result = _Pass()
    constants = place.speed.constants
    launch_s = 0.0 if compiled else constants.launch_s
    for item in items:
        if isinstance(item, Exchange):
            time_s = place.channels[item.axis].collective_s(item.kind, item.num_bytes)
            wait_s = constants.exchange_s + constants.skew_s * (place.channels[item.axis].num_ranks - 1)
            time_s = item.count * (time_s + wait_s)
            if item.overlapped:
                result.hidden_s += time_s
            else:
                result.exchange_s += time_s
            result.host_s += item.count * launch_s
        else:
            result.device_s += place.speed.kernel_s(item)
            result.host_s += item.count * item.num_launches * launch_s
    return result


def _sends(chunks: Sequence[Chunk], degrees: Degrees, fabric: Fabric, calibration: Calibration) -> list[float]:
    """Seconds to send the output of each chunk to the next one's stage; 0 after the last."""
    p, span = degrees.pipeline, degrees.stage_devices
    found = [0.0] * len(chunks)
    if p == 1:
        return found
    for index in range(len(chunks) - 1):
        source, target = (index % p) * span, ((index + 1) % p) * span
        found[index] = edge_s(fabric, calibration, source, target, span, chunks[index + 1][0][0].boundary_bytes)
    return found


def _after(
    chunks: Sequence[Chunk],
    degrees: Degrees,
    places: list[list[_Place]],
    priced: list[_Priced],
    backward_s: list[float],
    state: State,
    zero: int,
    overlap_data: bool,
    overlaps: list[float],
) -> tuple[float, float]:
    """Seconds that the exchange of gradients and the update add after the pipeline has run."""
    p = degrees.pipeline
    data_s = update_s = lead_s = 0.0
    shards = degrees.data * degrees.context if zero else 1
    for stage in range(p):
        elements = _elements(chunks, stage, p)
        place = places[stage][0]
        exchange_s = 0.0
        if zero < 2:
            exchange_s = place.channels["data"].collective_s("all_reduce", state.exchange_bytes * elements)
        elif zero == 2:
            exchange_s = place.channels["data"].collective_s("all_gather", state.weight_bytes * elements)
        if overlap_data:
            hidden_s = overlaps[stage] * sum(backward_s[stage::p])
            exchange_s = max(exchange_s - hidden_s, exchange_s * HIDDEN_LEAST)
        # A later stage ends its last backward pass earlier, by the passes of the stages before it.
        data_s = max(data_s, exchange_s - lead_s)
        lead_s += backward_s[stage]
        slowest = min(place.speed.constants.memory * place.speed.bytes_per_s for place in places[stage])
        update_s = max(update_s, UPDATE_PASSES * state.update_bytes * elements / shards / slowest)
    return data_s, update_s


def _elements(chunks: Sequence[Chunk], stage: int, num_stages: int) -> float:
    return sum(work.parameter_elements * count for chunk in chunks[stage::num_stages] for work, count in chunk)


def _memory_bytes(
    chunks: Sequence[Chunk],
    degrees: Degrees,
    stage: int,
    num_microbatches: int,
    schedule: Schedule,
    remat: Remat,
    zero: int,
    state: State,
) -> float:
    p, v, n = degrees.pipeline, degrees.virtual, degrees.data * degrees.context
    own = chunks[stage::p]
    elements = _elements(chunks, stage, p)
    experts = sum(work.expert_elements * count for chunk in own for work, count in chunk)

    def kept(count: float, ranks: float) -> float:
        if zero == 3:  # the master copy is the parameter
            return count * (state.gradient_bytes + state.optimizer_bytes) / ranks
        weights = state.weight_bytes + state.gradient_bytes / (ranks if zero == 2 else 1)
        return count * (weights + state.optimizer_bytes / (ranks if zero >= 1 else 1))

    state_bytes = kept(elements - experts, n) + kept(experts, max(n / degrees.expert, 1))
    works = [(work, count) for chunk in own for work, count in chunk]
    if zero == 3:  # the layer that computes and the one fetched for it
        state_bytes += 2 * state.weight_bytes * max(work.parameter_elements for work, _ in works)
    name = {"none": "saved_bytes", "selective": "selective_bytes", "full": "boundary_bytes"}[remat]
    one = sum(count * _kept_bytes(work, name) for work, count in works) / v
    if schedule == "gpipe":
        in_flight = float(num_microbatches * v)
    elif v > 1:
        in_flight = min(num_microbatches * v, 2 * (p - stage - 1) + (v - 1) * p + 1)
    else:
        in_flight = min(num_microbatches, p - stage)
    # A head's logits exist once: its backward pass follows its forward pass.
    temporary = 0.0
    for work, _ in works:
        if work.name == "head":
            temporary = max(temporary, work.saved_bytes + work.temporary_bytes)
        elif remat == "full":
            temporary = max(temporary, work.temporary_bytes)
    return ROUNDING * (state_bytes + one * in_flight + temporary) + RESERVE_BYTES


def _kept_bytes(work: LayerWork, name: str) -> float:
    """What a layer keeps of a microbatch until its backward pass; a head's own tensors count as temporary."""
    return work.boundary_bytes if work.name == "head" else float(getattr(work, name))

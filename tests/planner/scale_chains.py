"""Random chains of layers and fabrics for the search at scale, without capturing a model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from partita.cluster.model import Link
from partita.cluster.presets import GPU_KINDS
from partita.cost.kernels import Exchange, Item, Kernel, LayerWork
from partita.cost.networks import Fabric, NodeGroup
from partita.errors import InfeasibleError
from partita.planner.scale.search import Searcher
from partita.planner.scale.step import State


@dataclass
class Layers:
    """Makes works of random layers: what `WorkMaker` is to a captured model."""

    sizes: list[dict[str, float]]  # of each piece
    is_gap: list[bool]
    can_cut: bool  # whether boundaries can be cut
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = SimpleNamespace(pieces=tuple(SimpleNamespace(is_gap=gap) for gap in self.is_gap))
        self._made: dict[object, tuple[LayerWork, ...]] = {}

    def works(self, *, tensor: int, context: int, sequence_parallel: bool, micro_batch: int) -> tuple[LayerWork, ...]:
        if sequence_parallel and not self.can_cut:
            raise InfeasibleError("boundaries stay whole")
        key = (tensor, context, sequence_parallel, micro_batch)
        if key not in self._made:
            self._made[key] = tuple(
                _layer(size, gap, tensor, context, sequence_parallel, micro_batch)
                for size, gap in zip(self.sizes, self.is_gap, strict=True)
            )
        return self._made[key]


def _layer(
    size: dict[str, float], is_gap: bool, tensor: int, context: int, sequence: bool, micro_batch: int
) -> LayerWork:
    rows = size["tokens"] * micro_batch / context
    width = size["width"] / tensor
    values = 2 * rows * size["width"]
    products: list[Item] = [
        Kernel(
            kind="matmul", flops=2 * rows * size["width"] * width, num_bytes=values + 2 * size["width"] * width,
            m=max(1, round(rows)), n=max(1, round(width)), k=round(size["width"]), count=round(size["products"]),
        ),
        Kernel(kind="memory", num_bytes=values, num_launches=round(size["launches"])),
    ]  # fmt: skip
    exchanges: list[Item] = []
    if tensor > 1:
        kinds = ("all_gather", "reduce_scatter") if sequence else ("all_reduce",)
        exchanges += [Exchange(kind=kind, num_bytes=values, axis="tensor", count=2) for kind in kinds]  # type: ignore[arg-type]
    if context > 1:
        exchanges.append(
            Exchange(kind="all_gather", num_bytes=values, axis="context", overlapped=size["width"] % 2 == 0)
        )
    kept = values / (tensor if sequence else 1)
    return LayerWork(
        name="gap" if is_gap else "block",
        forward=(*products, *exchanges),
        backward=(*products, *products, *exchanges),
        selective=(products[1],),
        parameter_elements=size["width"] * width * size["products"] * size["weights"],
        saved_bytes=size["kept"] * kept,
        selective_bytes=0.6 * size["kept"] * kept,
        boundary_bytes=kept,
        temporary_bytes=size["temporary"] * kept,
    )


@dataclass
class Case:
    searcher: Searcher
    fabric: Fabric


def random_case(seed: int, *, most_blocks: int = 5, kinds: tuple[str, ...] = ("A100-40", "H100", "B200")) -> Case:
    """Chains that wait for their hosts, their devices, links or memory; one kind of machine or two."""
    draw = random.Random(seed)
    num_kinds = draw.choice((1, 1, 2))
    ahead, after = draw.random() < 0.8, draw.random() < 0.8
    is_gap = [True] * ahead + [False] * num_kinds + [True] * after
    tokens = draw.choice((16, 256, 2048, 16384))
    sizes = [
        {
            "tokens": tokens, "width": draw.choice((65, 256, 1024, 8192)), "products": draw.choice((1, 4)),
            "launches": draw.choice((0, 1, 10, 60)), "weights": draw.choice((0.0, 1.0, 1.0, 30.0)),
            "kept": draw.choice((1.0, 20.0, 200.0)), "temporary": draw.choice((0.0, 5.0)),
        }
        for _ in is_gap
    ]  # fmt: skip
    first = int(ahead)
    blocks = [first + draw.randrange(num_kinds) for _ in range(draw.randint(1, most_blocks))]
    chain = (*([0] if ahead else []), *blocks, *([len(is_gap) - 1] if after else []))
    groups = tuple(_group(draw, kinds) for _ in range(draw.choice((1, 1, 2))))
    state = draw.choice((State(), State(weight_bytes=4, gradient_bytes=4, optimizer_bytes=8, update_bytes=28)))
    layers = Layers(sizes, is_gap, can_cut=draw.random() < 0.7)
    batch = draw.choice((1, 2, 4, 6, 8, 12))
    return Case(Searcher(maker=layers, chain=chain, state=state, batch=batch), Fabric(groups=groups))  # type: ignore[arg-type]


def _group(draw: random.Random, kinds: tuple[str, ...]) -> NodeGroup:
    size = draw.choice((1, 2, 4))
    group = NodeGroup.of(GPU_KINDS[draw.choice(kinds)], size * draw.choice((1, 2)), size)
    if draw.random() < 0.3:  # odd networks: faster outside than inside, or very late
        network = Link(bytes_per_s=draw.choice((1e9, 1e12)), latency_s=draw.choice((1e-7, 1e-3)))
        group = replace(group, network=network)
    return group

"""What each process sends in a collective, by kind and algorithm, as the runtime's transports do it.

With P processes, p one of them, and |x| the bytes of a value:

    AllReduce      (P-1) |x|                          small: to all others
                   2 |x| - |c_p+1| - |c_p+2|          ring (Patarasuk and Yuan 2009, section 3) over chunks c_0 .. c_P-1
                   2 (P-1)/P |x|                      torch's ring; 16-bit types and bool travel on CPUs as the types of
                                                      `WIDER`, a barrier is one int32
    ReduceScatter  sum over q != p of |pieces of q's members|      p's members are summed before
    AllGather      (P-1) |pieces of p's members|
    AllToAll       sum over q != p of |what p's members have for q's members|

Inside a process nothing is sent. CPU tensors go over connections of partita's own (`partita.runtime.sockets`), but for
sums of more than `LARGEST_OWN_BYTES`; tensors on GPUs go through torch's groups, where each piece of an exchange is
padded to a multiple of `ALIGN_BYTES`. (Processes that cannot connect to each other use torch's groups for all.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from partita.program.instructions import AllGather, AllReduce, AllToAll, ReduceScatter, TensorSpec
from partita.units import KIB

DIRECT_BYTES = 64 * KIB  # of all that one process sends in a direct sum: two rounds of a ring would cost more than it
# Sums up to this size take a small part of gloo's time when the worker forms them itself. Of larger ones gloo's own
# threads are as fast, and faster where the worker has to share its core with something else.
LARGEST_OWN_BYTES = 512 * KIB
ALIGN_BYTES = 16  # pieces of one message start at multiples of it, so that they can be viewed as any dtype
WIDER: Mapping[torch.dtype, torch.dtype] = {  # in which sums are formed of dtypes that gloo does not know
    torch.bool: torch.int32,
    torch.int16: torch.int32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_BARRIER = TensorSpec((1,), torch.int32)


def padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def ring_bytes(num_bytes: int, num_processes: int) -> int:
    """What each process sends in torch's ring all-reduce of `num_bytes`: everything twice but for its own share."""
    return 2 * num_bytes * (num_processes - 1) // num_processes


def is_direct(num_elements: int, element_bytes: int, num_processes: int) -> bool:
    """Whether a sum over connections of partita's own is formed from whole values instead of in a ring."""
    return num_elements * element_bytes * (num_processes - 1) <= DIRECT_BYTES or num_elements < num_processes


def chunk_edges(num_elements: int, num_processes: int) -> list[int]:
    """Where the chunks of a ring begin, and where the last one ends."""
    return [num_elements * k // num_processes for k in range(num_processes + 1)]


def sum_bytes(num_elements: int, element_bytes: int, num_processes: int, place: int, *, on_gpu: bool = False) -> int:
    """What the process at `place` among `num_processes` sends in the sum of a value.

    Example:
        >>> sum_bytes(10, 4, 3, 0), sum_bytes(100_000, 4, 3, 0), sum_bytes(10**9, 4, 4, 0)
        (80, 533332, 6000000000)
    """
    num_bytes = num_elements * element_bytes
    if on_gpu or num_bytes > LARGEST_OWN_BYTES:
        return ring_bytes(num_bytes, num_processes)
    if is_direct(num_elements, element_bytes, num_processes):
        return num_bytes * (num_processes - 1)
    edges = chunk_edges(num_elements, num_processes)
    kept = [(place + step) % num_processes for step in (1, 2)]  # one chunk in each of the ring's two turns
    return 2 * num_bytes - element_bytes * sum(edges[chunk + 1] - edges[chunk] for chunk in kept)


def sent_bytes(
    instruction: AllReduce | ReduceScatter | AllGather | AllToAll,
    process_of: Mapping[int, int],
    *,
    on_gpu: bool = False,
) -> dict[int, int]:
    """Bytes that each process of the group sends, by the instruction of any member; GPU tensors need no wider type.

    Example:
        >>> spec = TensorSpec((4, 2), torch.float32)
        >>> sent_bytes(AllGather("x", "y", spec, (0, 1), "k", 0, (4, 12)), {0: 0, 1: 1})
        {0: 32, 1: 96}
    """
    members: dict[int, list[int]] = {}
    for place, member in enumerate(instruction.group):
        members.setdefault(process_of[member], []).append(place)
    if len(members) < 2:
        return dict.fromkeys(members, 0)
    size = _padded_sum if on_gpu else _plain_sum
    if isinstance(instruction, AllReduce):
        places = {process: place for place, process in enumerate(sorted(members))}
        return {p: _all_reduce(instruction, len(members), place, on_gpu) for p, place in places.items()}
    if isinstance(instruction, AllGather):
        pieces = [_with_extent(instruction.spec, instruction.dim, size) for size in instruction.sizes]
        return {p: (len(members) - 1) * size([pieces[i] for i in own]) for p, own in members.items()}
    if isinstance(instruction, AllToAll):
        return {p: _all_to_all(instruction, own, p, members, size) for p, own in members.items()}
    wanted = {q: size(_pieces(instruction, places)) for q, places in members.items()}
    return {p: sum(num_bytes for q, num_bytes in wanted.items() if q != p) for p in members}


def whole_bytes(instruction: AllReduce | ReduceScatter | AllGather | AllToAll) -> int:
    """Bytes of the whole tensors that a collective works on, those only that are summed or moved."""
    if isinstance(instruction, (AllReduce, ReduceScatter)):
        replicated = instruction.replicated if isinstance(instruction, ReduceScatter) else ()
        flags = replicated or (False,) * len(instruction.specs)
        return sum(spec.num_bytes for spec, whole in zip(instruction.specs, flags, strict=True) if not whole)
    return _with_extent(instruction.spec, instruction.dim, sum(instruction.sizes)).num_bytes


def _all_reduce(instruction: AllReduce, num_processes: int, place: int, on_gpu: bool) -> int:
    by_dtype: dict[torch.dtype, int] = {}
    for spec in instruction.specs or (_BARRIER,):
        by_dtype[spec.dtype] = by_dtype.get(spec.dtype, 0) + spec.num_elements
    return sum(
        sum_bytes(count, (dtype if on_gpu else WIDER.get(dtype, dtype)).itemsize, num_processes, place, on_gpu=on_gpu)
        for dtype, count in by_dtype.items()
    )


def _all_to_all(
    instruction: AllToAll,
    own: Sequence[int],
    process: int,
    members: Mapping[int, Sequence[int]],
    size: Callable[[Sequence[TensorSpec]], int],
) -> int:
    total = 0
    for source in own:
        held = _with_extent(instruction.spec, instruction.dim, instruction.sizes[source])
        targets = [target for q, places in members.items() if q != process for target in places]
        total += size([_with_extent(held, instruction.new_dim, instruction.new_sizes[t]) for t in targets])
    return total


def _pieces(instruction: ReduceScatter, places: Sequence[int]) -> list[TensorSpec]:
    """What the members at `places` get, as far as it is a sum."""
    if not instruction.slices:
        return [_with_extent(s, instruction.dim, instruction.sizes[i]) for i in places for s in instruction.specs]
    at = {name: index for index, name in enumerate(instruction.parameters)}
    replicated = instruction.replicated or (False,) * len(instruction.parameters)
    return [
        TensorSpec((part.num_elements,), instruction.specs[at[part.parameter]].dtype)
        for i in places
        for part in instruction.slices[i]
        if not replicated[at[part.parameter]]
    ]


def _padded_sum(specs: Sequence[TensorSpec]) -> int:
    return sum(padded(spec.num_bytes) for spec in specs)


def _plain_sum(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs)


def _with_extent(spec: TensorSpec, dim: int, extent: int) -> TensorSpec:
    shape = list(spec.shape)
    shape[dim] = extent
    return TensorSpec(tuple(shape), spec.dtype)

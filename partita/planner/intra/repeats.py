"""Which ops of a graph correspond to one another because their modules are repeated blocks.

The ops of a block, forward and backward apart, are aligned with those of the block whose sequence of calls is the most
common one of its group; ops between which the sequences differ (the first layer has no gradient of its input, the
last one feeds the head) correspond to none.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Hashable, Sequence

from partita.graph.graph import Phase
from partita.sharding.calls import Op

Position = tuple[int, Phase, int]
"""Group of blocks, phase, and place in the sequence of the group's most common block."""


def block_of(module: str, blocks: Sequence[Sequence[str]]) -> str | None:
    """The repeated block in which the module is, if it is in one."""
    for group in blocks:
        for path in group:
            if module == path or module.startswith(path + "."):
                return path
    return None


def corresponding(ops: Sequence[Op], blocks: Sequence[Sequence[str]]) -> dict[Op, Position]:
    """Position of every op that has one; ops with the same position run equal calls in different blocks."""
    sequences: dict[tuple[str, Phase], list[Op]] = {}
    for op in ops:
        path = block_of(op.info.module, blocks) if op.info is not None else None
        if path is not None and op.info is not None:
            sequences.setdefault((path, op.info.phase), []).append(op)
    found: dict[Op, Position] = {}
    numbers: dict[Hashable, int] = {}
    for group_index, group in enumerate(blocks):
        for phase in Phase:
            members = [sequences[(path, phase)] for path in group if (path, phase) in sequences]
            codes = [[numbers.setdefault(op.call.key, len(numbers)) for op in member] for member in members]
            if not members:
                continue
            usual = list(Counter(map(tuple, codes)).most_common(1)[0][0])
            for member, code in zip(members, codes, strict=True):
                matcher = difflib.SequenceMatcher(None, usual, code, autojunk=False)
                for start, place, count in matcher.get_matching_blocks():
                    for offset in range(count):
                        found[member[place + offset]] = (group_index, phase, start + offset)
    return found

"""What the runtime takes for itself: starting a step, one instruction, meeting other workers, handing a value over.

`partita.runtime.overheads` measures these on a machine that is here; the defaults serve described clusters.
"""

from __future__ import annotations

import itertools

import msgspec


class Overheads(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, for the workers of one process (one per core).

    step_s: by number of workers: waking them, joining them, and what the step does before and after.
    instruction_s: dispatching one instruction.
    meeting_s: a collective of next to no bytes, from the last member's arrival until all go on.
    tensor_s: each further tensor that a collective cuts and sums.
    handover_s: from the start of a `Send` until a waiting `Recv` in the same process has the value.
    sum_bytes_per_s: bytes that the workers together read and write while they sum slices in shared memory; 0: unknown,
        the machine's memory bandwidth counts.
    courier_s, courier_s_per_byte: that a core computes while a sum between two processes is carried out, whatever its
        size and for each byte of it; the rest of its time nobody computes.
    """

    step_s: dict[int, float] = msgspec.field(default_factory=lambda: {1: 60e-6, 2: 120e-6})
    instruction_s: float = 1e-6
    meeting_s: float = 50e-6
    tensor_s: float = 6e-6
    handover_s: float = 60e-6
    sum_bytes_per_s: float = 0.0
    courier_s: float = 150e-6
    courier_s_per_byte: float = 1e-9

    def courier_of(self, num_bytes: float, num_processes: int) -> float:
        """What a sum of `num_bytes` takes of a core of each process; a ring moves 2 (p-1)/p times its bytes."""
        if num_processes < 2:
            return 0.0
        rounds = 2 * (num_processes - 1)
        return rounds / 2 * self.courier_s + rounds / num_processes * num_bytes * self.courier_s_per_byte

    def step_of(self, num_workers: int) -> float:
        """`step_s` for any number of workers, linear between and beyond what was measured."""
        if num_workers in self.step_s:
            return self.step_s[num_workers]
        known = sorted(self.step_s.items())
        if not known:
            return 0.0
        if len(known) == 1 or num_workers < known[0][0]:
            return known[0][1]
        (low, low_s), (high, high_s) = known[-2:]
        for first, second in itertools.pairwise(known):
            if first[0] < num_workers < second[0]:
                (low, low_s), (high, high_s) = first, second
        return max(low_s + (high_s - low_s) * (num_workers - low) / (high - low), 0.0)

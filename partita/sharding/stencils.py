"""The arithmetic of stencils: which rows of its input a row of a convolution's or pooling's output reads.

Along one dim let N be the extent of the image, O that of the result, k the kernel's extent, s the stride, d the
dilation, p the padding in front. Result row o reads the image rows

    o s - p + d t,   0 <= t < k,     so rows a .. b of the result read   a s - p .. (b - 1) s - p + d (k - 1) + 1

of which those outside of [0, N) are padding. A result row belongs to the worker that owns the image row at the middle
of what it reads, ``clamp(o s - p + d (k - 1) // 2, 0, N - 1)``. So the blocks of a rule are: an image row that is the
middle of at least one result row, and these result rows. The image rows between two middles may go to either side; they
are cut as near as can be to ``o s``, so that an image cut in proportion gives a result cut in proportion.

A transposed convolution is the same picture read backwards: N and the image stand for its output.

The scheme is the halo exchange of domain decomposition; for convolutional networks see Dryden et al., "Improving
strong-scaling of CNN training by exploiting finer-grained parallelism", IPDPS 2019, section III.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from partita.sharding.rules import Bounds, Reach


@dataclass(frozen=True)
class Stencil:
    """One dim of a stencil; ``dim`` is its place in image and result."""

    dim: int
    image: int
    result: int
    kernel: int
    stride: int
    dilation: int
    padding: int

    @property
    def spread(self) -> int:
        """Rows between the first and the last that one result row reads."""
        return self.dilation * (self.kernel - 1)

    @functools.cached_property
    def _middles(self) -> list[int]:
        """For every result row the image row at the middle of what it reads."""
        first = self.spread // 2 - self.padding
        return [min(max(first + row * self.stride, 0), self.image - 1) for row in range(self.result)]

    @functools.cached_property
    def result_bounds(self) -> tuple[int, ...]:
        """For every boundary of blocks the boundary of result rows."""
        middles = self._middles
        return (0, *(row for row in range(1, self.result) if middles[row] > middles[row - 1]), self.result)

    @functools.cached_property
    def image_bounds(self) -> tuple[int, ...]:
        """For every boundary of blocks the boundary of image rows."""
        middles = self._middles
        starts = (min(max(row * self.stride, middles[row - 1] + 1), middles[row]) for row in self.result_bounds[1:-1])
        return (0, *starts, self.image)

    @property
    def num_blocks(self) -> int:
        return len(self.result_bounds) - 1

    def first_read(self, row: int) -> int:
        """The first image row that result row ``row`` reads (or -padding and so on)."""
        return row * self.stride - self.padding

    def end_read(self, row: int) -> int:
        """The end of what the result rows before ``row`` read."""
        return (row - 1) * self.stride - self.padding + self.spread + 1

    def owned_result(self) -> Bounds:
        return Bounds(self.dim, self.result_bounds)

    def read_image(self, fill: float = 0.0) -> Reach:
        """The image as the owners of the result read it; as an output of an op: what they add to."""
        bounds = self.result_bounds
        return Reach(
            self.dim,
            self.image_bounds,
            tuple(self.first_read(row) for row in bounds),
            tuple(self.end_read(row) for row in bounds),
            fill,
        )

    def touched_image(self) -> Reach:
        """As `read_image`, but no smaller than what the workers own (rows that no result row reads included)."""
        reach = self.read_image()
        starts = tuple(min(start, own) for start, own in zip(reach.starts, reach.bounds, strict=True))
        ends = tuple(max(end, own) for end, own in zip(reach.ends, reach.bounds, strict=True))
        return Reach(self.dim, reach.bounds, starts, ends)

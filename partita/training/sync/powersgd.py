"""PowerSGD: gradients as products of two thin matrices.

A gradient of shape (a, b, ...) is a matrix of a rows. With M_p = g_p + e_p and Q (columns by r) of the last step,

    P = sum over p of M_p Q                  summed over processes
    P = an orthonormal basis of P's columns
    Q = sum over p of Q_p,  Q_p = M_p^T P    summed over processes
    sum = P Q^T,    e_p = M_p - P Q_p^T

so one step of subspace iteration a training step follows the leading directions of the summed gradient, and what it
misses comes back by error feedback. Vectors, and matrices that low rank does not make smaller (r (rows + columns) >=
rows x columns), are summed as they are, so from full rank on the method is the exact sum.

(torch's hook takes e_p = M_p - sum / P instead. These errors add up to the same, but what the processes' gradients
differ by then stays in them for ever.)

Source: Vogels, Karimireddy and Jaggi, PowerSGD, NeurIPS 2019, algorithms 1 and 2 (there for means; here for sums).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.arguments import check_count, check_number
from partita.runtime.transport import Line
from partita.training.sync.exact import dense_bytes
from partita.training.sync.method import (
    GradientMethod,
    GradientSum,
    Part,
    Peers,
    State,
    flat_of,
    unflat,
)
from partita.units import fingerprint


@dataclass(frozen=True, kw_only=True)
class PowerSGD(GradientMethod):
    """Sums of rank `rank`.

    State: error feedback of the matrices' size, and Q. Bytes a step: two sums, of 4 r rows bytes for every matrix with
    4 bytes for every element of what is summed as it is, and of 4 r columns bytes for every matrix.

    Args:
        rank: of the sums; 1 to 4 in the paper.
        error_feedback: what a step leaves out is added to the next one. Without it accuracy is lost.
        warm_start: begin the iteration with the last step's Q instead of random numbers.
        exact_steps: this many first steps are summed exactly (the paper has none).

    Example:
        >>> PowerSGD(rank=2).sent_bytes([Part("weight", (100, 50)), Part("bias", (100,))], Peers((0, 1), 0))
        1600
    """

    rank: int = 4
    error_feedback: bool = True
    warm_start: bool = True
    exact_steps: int = 0

    def __post_init__(self) -> None:
        check_count(self.rank, "rank")
        check_number(self.exact_steps, "exact_steps", least=0, whole=True)

    @property
    def name(self) -> str:
        return "powersgd"

    @property
    def needs_whole_parameters(self) -> bool:
        return True

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        return PowerSum(parts, peers, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        shapes = [matrix_shape(part.shape, self.rank) for part in parts]
        first = sum(part.num_elements for part, shape in zip(parts, shapes, strict=True) if shape is None)
        first += self.rank * sum(rows for rows, _ in filter(None, shapes))
        return dense_bytes(first, peers) + dense_bytes(self.rank * sum(c for _, c in filter(None, shapes)), peers)


def matrix_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """Rows and columns of a gradient that is compressed, None if it is summed as it is."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if rank * (rows + columns) < rows * columns else None


class PowerSum(GradientSum):
    def __init__(self, parts: Sequence[Part], peers: Peers, method: PowerSGD) -> None:
        super().__init__(parts, peers)
        self._method = method
        shapes = [matrix_shape(part.shape, method.rank) for part in parts]
        self._matrices = {i: shape for i, shape in enumerate(shapes) if shape is not None}
        self._plain = [i for i, shape in enumerate(shapes) if shape is None]
        self._missing = {i: torch.zeros(shape) for i, shape in self._matrices.items() if method.error_feedback}
        self._right = {i: self._random(i, columns) for i, (_, columns) in self._matrices.items()}
        self._num_steps = torch.zeros((), dtype=torch.int64)

    def _random(self, index: int, columns: int) -> Tensor:
        """Equal on all processes, different for every part."""
        seed = int(fingerprint([self.parts[index].name, columns])[:12], 16)
        return torch.randn(columns, self._method.rank, generator=torch.Generator().manual_seed(seed))

    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        if self.peers.num == 1:
            return list(values)
        self._num_steps += 1
        if self._num_steps <= self._method.exact_steps:
            flat = flat_of(values)
            line.all_reduce(flat)
            return unflat(flat, self.parts)
        wanted = {i: self._wanted(i, values[i]) for i in self._matrices}
        sums: dict[int, Tensor] = {}
        left = self._left(wanted, values, sums, line)
        own = {i: matrix.T @ left[i] for i, matrix in wanted.items()}
        right = self._summed(own, line)
        for i in wanted:
            sums[i] = (left[i] @ right[i].T).view(self.parts[i].shape)
            if self._method.warm_start:
                self._right[i].copy_(right[i])
        if self._method.error_feedback:
            self._keep_missing(wanted, left, own)
        return [sums[i] for i in range(len(self.parts))]

    def _keep_missing(self, wanted: dict[int, Tensor], left: dict[int, Tensor], own: dict[int, Tensor]) -> None:
        missing = whole = 0.0
        for i, matrix in wanted.items():
            torch.addmm(matrix, left[i], own[i].T, alpha=-1, out=self._missing[i])
            missing += float(self._missing[i].square().sum())
            whole += float(matrix.square().sum())
        self.error = math.sqrt(missing / whole) if whole else 0.0

    def _wanted(self, index: int, value: Tensor) -> Tensor:
        matrix = value.reshape(self._matrices[index]).float()
        return matrix + self._missing[index] if index in self._missing else matrix

    def _left(
        self, wanted: dict[int, Tensor], values: Sequence[Tensor], sums: dict[int, Tensor], line: Line
    ) -> dict[int, Tensor]:
        """Orthonormal bases; what is summed as it is travels in the same message."""
        parts = {i: matrix @ self._start(i) for i, matrix in wanted.items()}
        found = self._summed({**parts, **{i: values[i] for i in self._plain}}, line)
        sums.update({i: found[i] for i in self._plain})
        return {i: torch.linalg.qr(found[i]).Q for i in wanted}

    def _start(self, index: int) -> Tensor:
        """Q; random where it has become zero, as it would stay so."""
        right = self._right[index]
        if not self._method.warm_start:
            return right
        largest = float(right.abs().max())
        return right if largest > 0 else self._random(index, right.shape[0])

    def _summed(self, values: dict[int, Tensor], line: Line) -> dict[int, Tensor]:
        if not values:
            return {}
        held = list(values.values())
        flat = flat_of(held)
        line.all_reduce(flat)
        return dict(zip(values, unflat(flat, held), strict=True))

    def state(self) -> State:
        missing = {f"missing.{self.parts[i].name}": value for i, value in self._missing.items()}
        right = {f"right.{self.parts[i].name}": value for i, value in self._right.items()}
        return {**missing, **right, "num_steps": self._num_steps}

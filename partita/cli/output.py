"""Printing: JSON for programs, aligned text for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from partita.cluster.job import current_job
from partita.errors import ClusterError


def is_first() -> bool:
    """Whether this process speaks for the job: it runs alone or has rank 0."""
    try:
        job = current_job()
    except ClusterError:
        return True  # a contradictory environment must not silence the message that says so
    return job is None or job.rank == 0


def print_json(value: object) -> None:
    """Indented JSON on standard output; NaN and infinities, which JSON lacks, become null."""
    encoded = msgspec.json.encode(value, enc_hook=str)
    sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")


def table(rows: Sequence[Sequence[object]], *, titles: Sequence[str] = ()) -> str:
    """Columns two spaces apart, the last one ragged.

    >>> print(table([("a", 1), ("bcd", 20)]))
    a    1
    bcd  20
    """
    cells = [[str(cell) for cell in row] for row in ([titles] if titles else []) + list(rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)

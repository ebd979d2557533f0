"""What all benchmark programs share: options, the description of the machine, the table and the JSON envelope."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def option_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: `--json FILE`, `--check`, `--families a,b`.

    `--child` is how a benchmark starts its measured processes and is not meant for people.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, machine, rows and summary here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its limit")
    parser.add_argument("--families", metavar="A,B", help="only these model families")
    parser.add_argument("--child", metavar="ROLE", help=argparse.SUPPRESS)
    return parser


def describe_machine() -> dict[str, Any]:
    """The machine and the software that figures belong to; `load` is the one-minute load average when asked."""
    import psutil  # type: ignore[import-untyped]
    import torch

    return {
        "cpu": _cpu_model(),
        "num_cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "num_hardware_threads": os.cpu_count(),
        "num_cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


@dataclass
class Report:
    """Rows of one run, later its summary and its misses (one sentence for each limit that is not met).

    The file is replaced as a whole after every row, so that an interrupted run leaves what it had.
    """

    benchmark: str
    settings: Mapping[str, Any]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=describe_machine)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def finish(self, summary: Mapping[str, Any], misses: Iterable[str]) -> None:
        self.summary, self.misses = dict(summary), list(misses)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        names = ("benchmark", "machine", "started", "settings", "rows", "summary", "misses")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(self.path.suffix + ".part")
        unfinished.write_text(json.dumps({name: getattr(self, name) for name in names}, indent=1, default=str) + "\n")
        unfinished.replace(self.path)

    def exit_code(self, check: bool) -> int:
        """1 if `check` is asked for and something was missed."""
        return 1 if check and self.misses else 0


def show(report: Report, columns: Sequence[str]) -> None:
    """Print the rows as a table, then the summary and the misses."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 160)
    table = Table(title=f"{report.benchmark} - {report.machine['cpu']}, load {report.machine['load']}")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in report.rows:
        table.add_row(*(escape(format_cell(row.get(column))) for column in columns))
    console.print(table)
    for name, value in report.summary.items():
        console.print(f"{name}: {format_cell(value)}", markup=False)
    for miss in report.misses:
        console.print(f"MISSED: {miss}", markup=False)


def format_cell(value: Any) -> str:
    """Short text of a value: floats with three digits, nothing for None.

    >>> format_cell(0.0123456), format_cell(None), format_cell(True)
    ('0.0123', '', 'yes')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_cell(item)}" for name, item in value.items())
    return str(value)


def median(values: Sequence[float]) -> float:
    """The median, or NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def first_line(text: object, limit: int = 300) -> str:
    """The first line that says something, shortened to `limit` characters."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return (lines[0] if lines else "")[:limit]

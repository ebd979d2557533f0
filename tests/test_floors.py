"""The floors of the design: a lower one never imports a higher one, and no file grows into a drawer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "partita"
FLOORS = {
    "errors": 0, "units": 0, "files": 0, "cache": 0, "arguments": 0,
    "graph": 1, "cluster": 1,
    "sharding": 2, "cost": 2,
    "planner": 3, "plan": 3, "constraints": 3, "plan_layout": 3,
    "program": 4,
    "simulator": 5, "runtime": 5,
    "training": 6, "checkpoint": 6, "data": 6, "sync": 6, "events": 6, "api": 6,
    "search": 7, "connections": 7, "__init__": 7,
    "report": 8, "export": 8, "cli": 8, "__main__": 8,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def floor_of(module: str) -> int:
    """The floor of a dotted name below partita; the package itself is as high as its facade."""
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else FLOORS["__init__"]


def imports_of(path: Path) -> list[str]:
    """Every partita module that a file imports, local imports and those for types included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "partita"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "partita":
            if node.module == "partita":
                found += [f"partita.{alias.name}" for alias in node.names if alias.name in FLOORS]
            else:
                found.append(str(node.module))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_up(path: Path) -> None:
    own = ".".join(["partita", *path.relative_to(ROOT).with_suffix("").parts])
    own_floor = floor_of(own)
    higher = [name for name in imports_of(path) if floor_of(name) > own_floor]
    assert not higher, f"{own} (floor {own_floor}) imports {higher}"


def test_graph_and_cluster_are_apart() -> None:
    for path in FILES:
        part = path.relative_to(ROOT).parts[0]
        other = {"graph": "partita.cluster", "cluster": "partita.graph"}.get(part)
        assert other is None or not any(name.startswith(other) for name in imports_of(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_the_checks_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text("def f():\n    from partita.training import step\n    import partita.cli\n")
    assert imports_of(file) == ["partita.training", "partita.cli"]
    assert floor_of("partita.training") > floor_of("partita.graph.capture")

"""The start-up benchmark looks at functions where they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import benchmarks.startup


def test_all_watched_functions_are_found():
    code = "import partita, benchmarks.startup as s; s.Phases().install()"
    root = Path(benchmarks.startup.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

"""A search as a script of its own: search_job.py FOLDER DEADLINE [name of a build function]."""

from __future__ import annotations

import sys
from pathlib import Path

import partita

sys.path.insert(0, str(Path(__file__).parent))
import search_task

if __name__ == "__main__":
    folder, deadline, *rest = sys.argv[1:]
    result = partita.search(
        getattr(search_task, rest[0] if rest else "build"),
        search_task.data,
        deadline=deadline,
        folder=folder,
        batch_size=search_task.batch_size,
        listener=lambda line: print(line, flush=True),
    )
    print(f"delivered {result.score}", flush=True)

"""Files that are whole whenever they are read."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once the block ends. Readers see the old file or the whole
    new one, and if the block raises, or the process dies, the old one stays.

    Args:
        path: its folder must exist.
        durable: the content is on the disk before the name is.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> target = Path(folder.name) / "note.txt"
        >>> with replacing(target) as new:
        ...     _ = new.write_text("whole")
        >>> target.read_text()
        'whole'
        >>> folder.cleanup()
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        yield new
        if durable:
            with new.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(new, path)

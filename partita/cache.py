"""The folder where measurements are kept between runs, and small JSON files in it.

Everything in the cache can be measured or computed again, so a missing, unreadable or damaged file is simply "not
there"; writing is atomic (a temporary file in the same folder, then a rename), so two processes that write at once
leave one whole file, never a mixture. Nothing is ever read from here that could run code.

Example:
    >>> write_json("bandwidth.json", {"bytes_per_s": 2.5e10})
    >>> read_json("bandwidth.json")
    {'bytes_per_s': 25000000000.0}
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.errors import PartitaError
from partita.files import replacing

ENVIRONMENT_VARIABLE = "PARTITA_CACHE"


def cache_dir() -> Path:
    """The cache folder, made if need be: `$PARTITA_CACHE`, else `$XDG_CACHE_HOME/partita`, else `~/.cache/partita`.

    Where that folder cannot be made (a read-only home, as in some containers), a folder of this user under the
    system's temporary folder takes its place: the cache then lives as long as the container does.

    Raises:
        PartitaError: `PARTITA_CACHE` is set, but no folder can be made there (an explicit wish is never replaced).
    """
    wished = os.environ.get(ENVIRONMENT_VARIABLE)
    if wished:
        folder = Path(wished).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PartitaError(
                f"{ENVIRONMENT_VARIABLE} must name a folder that can be made and written, but it is {wished!r} "
                f"({error}). Set it to a writable folder, or unset it to use ~/.cache/partita."
            ) from error
        return folder
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "partita"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    user = str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"partita-cache-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def read_json(name: str) -> dict[str, Any] | None:
    """The JSON object kept under `name` (a relative path such as `"cost/abc.json"`), or None.

    None stands for everything that makes the file unusable: absent, unreadable, damaged, or not a JSON object.
    """
    try:
        value = json.loads(_path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(name: str, value: Mapping[str, Any]) -> Path:
    """Keep `value` under `name`, atomically, and return the file's path.

    Raises:
        OSError: the folder cannot be written (full disk, no permission).
        TypeError: `value` holds something that JSON cannot express.
    """
    path = _path(name)
    text = json.dumps(dict(value), indent=1, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
    return path


def _path(name: str) -> Path:
    relative = Path(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise PartitaError(
            f"a cache entry must be named by a relative path inside the cache folder, but the name is {name!r}. "
            "Use a plain name such as 'machine/abc.json'."
        )
    return cache_dir() / relative

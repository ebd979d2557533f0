"""HiGHS without its greeting."""

from __future__ import annotations

import highspy


class SilentHighs(highspy.Highs):
    """HiGHS that prints nothing; its constructor would greet on standard output, which belongs to `--json`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def enableCallbacks(self) -> None:
        self.silent()
        super().enableCallbacks()  # type: ignore[no-untyped-call]

"""The command `partita`: one verb a job, one file a verb, each with `--json`. Floor 8: the only part that prints."""

from partita.cli.app import main

__all__ = ["main"]

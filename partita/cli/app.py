"""Verbs and exit codes: 0 done, 1 an error or a finding that fails (with a message), 2 a wrong command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from partita.cli.diff import diff
from partita.cli.doctor import doctor
from partita.cli.export import export
from partita.cli.lighthouse import lighthouse
from partita.cli.plan import plan
from partita.cli.profile import profile
from partita.cli.run import run
from partita.cli.search import search
from partita.cli.show import show
from partita.cli.simulate import simulate
from partita.errors import PartitaError

_VERBS: dict[str, Callable[..., Any]] = {
    "doctor": doctor,
    "profile": profile,
    "plan": plan,
    "show": show,
    "diff": diff,
    "export": export,
    "run": run,
    "simulate": simulate,
    "search": search,
    "lighthouse": lighthouse,
}
_DESCRIPTION = (
    "Train any PyTorch model on whatever machines are there. TARGET is file.py:function (or package.module:function); "
    "the function takes nothing and returns (model, loss_fn, batch) or (model, loss_fn, batch, optimizer). A cluster "
    "is a TOML file or a preset such as 4x8xH100 or 2x1xcpu-16."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb with `arguments` (default: those of the command line) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _call(given)
    except PartitaError as error:
        print(f"partita: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `partita show plan.json | head`: the reader has seen enough
        sys.stderr.close()
        return 1


def _call(given: list[str]) -> int:
    if given[:1] == ["run"]:
        # What `run` does not know belongs to the script; all after `--` does so whatever it is.
        end = given.index("--") if "--" in given else len(given)
        call, rest = tyro.cli(
            run,
            prog="partita run",
            args=given[1:end],
            return_unknown_args=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        return call([*rest, *given[end + 1 :]])
    code: int = tyro.extras.subcommand_cli_from_dict(
        _VERBS, prog="partita", description=_DESCRIPTION, args=given, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return code

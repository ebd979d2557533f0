"""Options of the programs that race peers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks.families import FAMILIES, SIZES
from benchmarks.peers.roster import BY_NAME, PARTITA, PEERS, parse_pairs

# Packages whose interpreters can be named, by an option or by an environment variable.
INTERPRETERS = {"jax": "BENCHMARK_JAX_PYTHON", "deepspeed": "BENCHMARK_DEEPSPEED_PYTHON"}


def add_peer_options(parser: argparse.ArgumentParser, *, pairs: Sequence[tuple[str, str]]) -> None:
    """Which pairs (`pairs` by default), which peers, for how long, in which interpreters."""
    default = ",".join(f"{family}:{scale}" for family, scale in pairs)
    parser.add_argument("--pairs", default=default, metavar="A:SCALE,B", help="families with a scale each")
    parser.add_argument("--round-seconds", type=float, default=1.0, help="of steps of one peer in one round")
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), metavar="A,B")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one preparation or turn")
    for package, variable in INTERPRETERS.items():
        parser.add_argument(
            f"--{package}-python", default=os.environ.get(variable, sys.executable), metavar="FILE",
            help=f"the Python that has {package}; by default ${variable}, or the running one",
        )  # fmt: skip


def interpreters_of(options: argparse.Namespace) -> dict[str, str]:
    """Executables by package."""
    return {package: getattr(options, f"{package}_python") for package in INTERPRETERS}


def names_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[str, ...]:
    """The peers that take part; partita always does."""
    names = tuple(name.strip() for name in options.peers.split(",") if name.strip())
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        parser.error(f"--peers must name some of {', '.join(BY_NAME)}, but got {', '.join(unknown)}")
    return names if PARTITA in names else (*names, PARTITA)


def pairs_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """The pairs of `--pairs`, of these only those of `--families` if it is given."""
    pairs = parse_pairs(options.pairs)
    known = {family.name for family in FAMILIES}
    for family, scale in pairs:
        if family not in known or scale not in SIZES:
            parser.error(
                f"--pairs must name families ({', '.join(sorted(known))}) at scales ({', '.join(SIZES)}), "
                f"but got {family}:{scale}"
            )
    if options.families is None:
        return pairs
    wanted = {name.strip() for name in options.families.split(",")}
    return tuple(pair for pair in pairs if pair[0] in wanted)

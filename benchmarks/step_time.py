"""Promise 2: the step time of partita's automatic plan beside its peers.

    python -m benchmarks.step_time --json benchmarks/results/step_time.json --check

Peers: plain PyTorch eager and compiled, on one thread and on all; DistributedDataParallel, eager and compiled, FSDP2
and DeepSpeed ZeRO-1 with one process a core; JAX with a device a core and on one core, for families with a twin. Each
takes the best of its settings, measured. Every peer has processes of its own, started once; all prepare a pair of
family and scale, then step in turns, round by round, in an order that rotates. Only one peer runs at a time. Judged is
the median over rounds of the median step of a round (`benchmarks.peers.verdict`).
"""

from __future__ import annotations

import sys

from benchmarks.common import Report, option_parser, show
from benchmarks.peers.field import Field
from benchmarks.peers.options import add_peer_options, interpreters_of, names_of, pairs_of
from benchmarks.peers.race import race
from benchmarks.peers.roster import PAIRS, PARTITA
from benchmarks.peers.verdict import summarise

COLUMNS = ("pair", "best_peer", "best_time_s", "partita", "ratio", "ratio_of_fastest", "speed_up", "plan", "errors")


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=7)
    add_peer_options(parser, pairs=PAIRS)
    options = parser.parse_args()
    pairs = pairs_of(parser, options)
    field = Field(names_of(parser, options), interpreters=interpreters_of(options), timeout_s=options.timeout)
    settings = {
        "num_rounds": options.rounds, "turn_s": options.round_seconds, "optimizer": "AdamW", "peers": field.names,
        "absent": field.absent,
    }  # fmt: skip
    report = Report("step_time", settings, path=options.json)
    try:
        for family, scale in pairs:
            row = race(field, family, scale, num_rounds=options.rounds, turn_s=options.round_seconds)
            row["best_time_s"] = row.get(row.get("best_peer", PARTITA))
            report.add(row)
            print(f"{row['pair']}: ratio {row.get('ratio')} {row['errors'] or ''}", file=sys.stderr, flush=True)
    finally:
        field.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    for name, reason in field.absent.items():
        print(f"absent: {name}: {reason}")
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())

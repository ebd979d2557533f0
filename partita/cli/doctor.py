"""`partita doctor`: is this machine ready? A report to read or to paste."""

from __future__ import annotations

from collections import Counter

from partita.cli.output import print_json


def doctor(*, json: bool = False) -> int:
    """Is this machine ready? Every finding is OK, WARN or FAIL, with its cure; exit code 1 if one fails.

    Args:
        json: print the findings as JSON.
    """
    import partita
    from partita.cluster.doctor import diagnose

    findings = diagnose()
    failed = any(finding.status == "FAIL" for finding in findings)
    if json:
        print_json({"version": partita.__version__, "findings": findings})
        return int(failed)
    width = max(len(finding.subject) for finding in findings)
    print(f"partita {partita.__version__}")
    for finding in findings:
        print(f"{finding.status:<4}  {finding.subject:<{width}}  {finding.detail}")
        if finding.cure:
            print(f"{'':<4}  {'':<{width}}  -> {finding.cure}")
    counts = Counter(finding.status for finding in findings)
    print(", ".join(f"{counts[status]} {status}" for status in ("OK", "WARN", "FAIL")))
    return int(failed)

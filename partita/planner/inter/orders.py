"""Candidate device orders on an irregular network.

A pipeline talks between neighbours of the order and, inside a stage, between all devices of a run. So good orders keep
devices with fast links together and devices of a kind together (DAPPLE, Fan et al. 2021, section 4: placement policies;
Piper keeps one order). Candidates:
    kinds       devices of a kind together, fast kinds first and fast kinds last (in flight, a first stage holds the
                most microbatches: kinds of much memory first as well);
    links       single-linkage clustering by bandwidth: the fastest link whose ends are in two clusters joins them,
                turned so that the fastest of the four possible ends meet;
    both        clusters inside each kind, kinds as above;
and the reverse of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from partita.planner.inter.problem import InterDevice, Links

Order = tuple[int, ...]


def candidate_orders(
    devices: Sequence[InterDevice], links: Links, speed: Mapping[str, float] | None = None, *, limit: int = 8
) -> tuple[Order, ...]:
    """At most `limit` orders of all devices, each once; `speed` of kinds, larger is faster.

    Example:
        >>> alike = [InterDevice(name=str(i), kind="gpu") for i in range(2)]
        >>> candidate_orders(alike, Links.uniform(2, 0.0, 1e9))
        ((0, 1), (1, 0))
    """
    everyone = tuple(range(len(devices)))
    kinds = list(dict.fromkeys(device.kind for device in devices))
    of_kind = {kind: [g for g in everyone if devices[g].kind == kind] for kind in kinds}
    speeds = speed or {}
    fast_first = sorted(kinds, key=lambda kind: -speeds.get(kind, 0.0))
    large_first = sorted(kinds, key=lambda kind: -max(devices[g].memory_bytes for g in of_kind[kind]))
    found: list[Order] = [clustered(everyone, links)]
    for ranking in (fast_first, fast_first[::-1], large_first):
        found.append(tuple(g for kind in ranking for g in clustered(of_kind[kind], links)))
        found.append(tuple(g for kind in ranking for g in of_kind[kind]))
    found.append(everyone)
    both = [order for one in found for order in (one, one[::-1])]
    return tuple(dict.fromkeys(both))[:limit]


def clustered(members: Sequence[int], links: Links) -> Order:
    """Single-linkage clustering; see the module's docstring."""
    bandwidth = np.minimum(links.bytes_per_s, links.bytes_per_s.T)
    cluster: dict[int, list[int]] = {g: [g] for g in members}
    one, two = np.triu_indices(len(members), 1)
    first, second = np.asarray(members)[one], np.asarray(members)[two]
    order = np.lexsort((second, first, links.latency_s[first, second], -bandwidth[first, second]))
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        left, right = cluster[a], cluster[b]
        if left is right:
            continue
        turned = product((left, left[::-1]), (right, right[::-1]))
        joined = max((x + y for x, y in turned), key=lambda run: float(bandwidth[run[len(left) - 1], run[len(left)]]))
        for g in joined:
            cluster[g] = joined
    return tuple(cluster[members[0]]) if len(members) else ()

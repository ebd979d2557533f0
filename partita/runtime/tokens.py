"""Who belongs to a job: processes show that they have its secret without telling it.

A launcher gives every process the address of the job's store, and whoever reaches the store can read and write it.
Where others share the network, set `PARTITA_JOB_TOKEN` to the same secret text for all processes of the job: a process
without it is then refused when it joins, and its connections are sent away. Values on their way are not encrypted.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from partita.errors import PeerLostError, StepError

SECRET = "PARTITA_JOB_TOKEN"
TOKEN_BYTES = 16


def token_of(public: str, environment: Mapping[str, str] = os.environ) -> bytes:
    """What a process says to be let in, made of a text that the store has and the secret."""
    return hmac.digest(environment.get(SECRET, "").encode(), public.encode(), "sha256")[:TOKEN_BYTES]


def prove(
    store: Any, rank: int, num_processes: int, timeout_s: float, environment: Mapping[str, str] = os.environ
) -> None:
    """Shows the others that this process has the job's secret, and checks that they have it. All processes call it.

    A proof is of this run alone: it covers a random number of every process.

    Raises:
        StepError: some have another secret, or none.
        PeerLostError: some did not come within the limit.
    """
    store.set(f"nonce/{rank}", secrets.token_hex(16))
    nonces = _all(store, "nonce", num_processes, timeout_s)

    def proof(of: int) -> bytes:
        return token_of(f"{of} {nonces}", environment).hex().encode()

    store.set(f"proof/{rank}", proof(rank))
    found = _all(store, "proof", num_processes, timeout_s)
    strangers = [of for of, text in enumerate(found) if not hmac.compare_digest(text, proof(of))]
    if strangers:
        raise StepError(
            f"all processes of the job must have the same secret in {SECRET}, but rank(s) {strangers} have another one "
            f"than rank {rank}, or none. Set it to the same text for all of them, or for none"
        )


def _all(store: Any, name: str, num_processes: int, timeout_s: float) -> list[bytes]:
    """What every process has written under a name."""
    try:
        store.wait([f"{name}/{rank}" for rank in range(num_processes)], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerLostError(
            f"all {num_processes} processes must show within timeout_s={timeout_s:g} that they belong to the job, but "
            f"some did not: {error}"
        ) from error
    return [bytes(store.get(f"{name}/{rank}")) for rank in range(num_processes)]

"""What a search hands over: the weights of the best network, and what it is made of, as files.

`best/weights.safetensors` is the whole `state_dict`, `best/candidate.json` the suggested values with the score. The
second is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from partita.errors import SearchError
from partita.files import replacing
from partita.search.candidates import Candidate, as_record
from partita.search.weights import BEST, kept_score

WEIGHTS, FACTS = "weights.safetensors", "candidate.json"


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The network that was handed over: its candidate, the score of its weights, where they are, and when (seconds
    since 1970)."""

    number: int
    score: float
    weights: str
    at_s: float


def deliver(folder: Path, candidate: Candidate, now_s: float) -> Delivered:
    """Writes the weights with which a candidate scored best.

    Raises:
        SearchError: they are gone.
    """
    target = folder / "best"
    target.mkdir(parents=True, exist_ok=True)
    own = folder / "candidates" / str(candidate.number)
    score = kept_score(own)
    if score is None:
        raise SearchError(f"the weights of candidate {candidate.number} must be in {str(own)!r}, but are not")
    with replacing(target / WEIGHTS) as new:
        shutil.copyfile(own / BEST, new)
    delivered = Delivered(number=candidate.number, score=score, weights=str(target / WEIGHTS), at_s=now_s)
    facts = {"params": candidate.params, "score": score, "candidate": as_record(candidate)}
    with replacing(target / FACTS) as new:
        new.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return delivered


def with_weights(model: nn.Module, weights: Path) -> nn.Module:
    """A built network with what was delivered, ready to be used.

    Raises:
        SearchError: the file is gone or belongs to another network.
    """
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError) as error:
        raise SearchError(
            f"build(trial) must make the network that was delivered in {str(weights)!r}, but: {error}"
        ) from error
    with torch.no_grad():
        return model.eval()

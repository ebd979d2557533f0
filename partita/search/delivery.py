"""What a search hands over: the weights of the best network, and what it is made of, as files.

`best/weights.safetensors` is the whole `state_dict`, `best/candidate.json` the suggested values with the score. The
second is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from partita.errors import SearchError
from partita.search.candidates import Candidate, as_record
from partita.search.training_run import BEST
from partita.training.checkpoint.loader import weights_of

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
    """Writes the weights of a candidate that scored best: those kept by its final training, else its last
    checkpoint."""
    target = folder / "best"
    target.mkdir(parents=True, exist_ok=True)
    own = folder / "candidates" / str(candidate.number)
    temporary = target / f".{WEIGHTS}.{os.getpid()}"
    score = candidate.best_score
    if score is not None and (own / BEST).exists():
        shutil.copyfile(own / BEST, temporary)
    else:
        score = candidate.points[-1].score
        state = {name: value.contiguous().clone() for name, value in weights_of(own).items()}
        save_file(state, temporary)
    os.replace(temporary, target / WEIGHTS)
    delivered = Delivered(number=candidate.number, score=score, weights=str(target / WEIGHTS), at_s=now_s)
    facts = {"params": candidate.params, "score": score, "candidate": as_record(candidate)}
    _write(target / FACTS, facts)
    return delivered


def _write(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)


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

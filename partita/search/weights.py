"""The weights with which a candidate has scored best, and that score, in one file of the candidate's folder.

Both are in one file because a process may be killed at any moment: what is delivered scores what is said of it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from partita.files import replacing

BEST = "best.safetensors"
_SCORE = "score"


def write_weights(model: nn.Module, folder: Path, score: float) -> None:
    """Writes the whole `state_dict` and the score; readers see the old file or the whole new one."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / BEST) as new:
        save_file(state, new, metadata={_SCORE: repr(score)})


def kept_score(folder: Path) -> float | None:
    """The score of the weights in a candidate's folder; None: there are none."""
    try:
        with safe_open(folder / BEST, "pt") as file:
            return float(file.metadata()[_SCORE])
    except (OSError, SafetensorError):
        return None

"""Checkpoints: written whole or not at all, in the background where wanted, and independent of the plan that trained.

A checkpoint is a folder::

    step-00000042/
        checkpoint.json                             what is in it: names, sizes and checksums of all files
        weights.safetensors                         by the names of `state_dict`
        optimizer/optimizer.safetensors             "parameter/entry", e.g. "layer.weight/exp_avg"
        rest.pt                                     what is no tensor, read with weights_only=True
        sync/sync.safetensors                       of a synchronisation method
        replica-00000/optimizer.safetensors, ...    of replicas, in the place of optimizer/

In a job every process writes what it has, into a file of its own (``weights-00001-of-00002.safetensors``), and nothing
is collected. A tensor that no process has whole is in several files; their headers say where each part begins, as torch
DCP's safetensors files do (`torch.distributed.checkpoint.HuggingFaceStorageReader` reads them). DCP's own format keeps
its plan in a pickle, which must not be loaded from a stranger.
"""

from partita.training.checkpoint.loader import load
from partita.training.checkpoint.memory import InMemory
from partita.training.checkpoint.saver import Saver, Saving, Source
from partita.training.checkpoint.settings import Checkpoints, Stateful

__all__ = ["Checkpoints", "InMemory", "Saver", "Saving", "Source", "Stateful", "load"]

"""What the server that trials are forked from imports, once: a trial then begins in some tenths of a second.

Only that server imports this module. It has one thread, and torch is told to make no others, because threads do not
survive a fork. What it is to import besides partita comes in the environment: the script or module that the user's
functions are in, so that its own imports are made once as well. Whatever goes wrong with that is left to the trial,
which imports again what it needs and can tell.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from multiprocessing import spawn

import torch
import torch._dynamo  # every capture asks it, and it takes a second to import

import partita.search.trial_process  # noqa: F401 - for the trials
from partita.search import processes

torch.set_num_threads(1)
with contextlib.suppress(ImportError):
    # torch.fx makes progress bars, whose lock between processes would be left behind by every trial that is killed.
    # Made here, it is inherited.
    importlib.import_module("tqdm").tqdm.get_lock()
processes.role.is_server = True
_wished = json.loads(os.environ[processes.VARIABLE])
sys.path[:] = _wished["path"]
for _name in _wished["modules"]:
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
if _wished["main"]:
    with contextlib.suppress(Exception):
        spawn.import_main_path(_wished["main"])

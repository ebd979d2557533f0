"""Widths and depth: which numbers of units and blocks a network has, and networks with others."""

from partita.search.structure.depth import blocks_of, deepened, shallower
from partita.search.structure.growing import gradmax, widened
from partita.search.structure.mup import mup_groups, mup_start_
from partita.search.structure.network import Network
from partita.search.structure.pricing import WidthPrices
from partita.search.structure.pruning import importance, pruned, sizes_within
from partita.search.structure.resizing import resized
from partita.search.structure.saving import save_network

__all__ = [
    "Network",
    "WidthPrices",
    "blocks_of",
    "deepened",
    "gradmax",
    "importance",
    "mup_groups",
    "mup_start_",
    "pruned",
    "resized",
    "save_network",
    "shallower",
    "sizes_within",
    "widened",
]

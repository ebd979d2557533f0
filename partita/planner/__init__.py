"""Floor 3: from a graph, a cluster and a cost model to ranked plans."""

from partita.planner.layout import worker_layout as worker_layout
from partita.planner.search import search as search

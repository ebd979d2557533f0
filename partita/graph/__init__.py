"""Floor 1: capture of a model's training step as one joint graph of ATen ops."""

from partita.graph.capture import capture as capture
from partita.graph.execute import run_graph as run_graph
from partita.graph.flops import op_info as op_info
from partita.graph.graph import Graph as Graph
from partita.graph.graph import Input as Input
from partita.graph.graph import InputKind as InputKind
from partita.graph.graph import OpInfo as OpInfo
from partita.graph.graph import Output as Output
from partita.graph.graph import OutputKind as OutputKind
from partita.graph.graph import Phase as Phase
from partita.graph.randomness import is_random as is_random

"""Floor 1: capture of a model's training step as one joint graph of ATen ops."""

from partita.graph.capture import capture
from partita.graph.execute import run_graph
from partita.graph.graph import Graph, Input, InputKind, OpInfo, Output, OutputKind, Phase

__all__ = ["Graph", "Input", "InputKind", "OpInfo", "Output", "OutputKind", "Phase", "capture", "run_graph"]

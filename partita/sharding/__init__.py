"""Floor 2: placements of tensors over workers, rules per op, and lowering of a graph to local graphs."""

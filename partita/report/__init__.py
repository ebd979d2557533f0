"""Floor 8: what people read of plans and timelines."""

"""Floor 2: what ops, segments, collectives and memory cost on a device."""

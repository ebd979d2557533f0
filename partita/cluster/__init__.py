"""Floor 1: machines, their detection, description and measurement."""

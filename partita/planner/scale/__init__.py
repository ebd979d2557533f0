"""Planning at scale without devices: what a training step of a described model takes on a described cluster."""

"""Floor 1: capture of a model's training step as one joint graph of ATen ops."""

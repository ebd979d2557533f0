"""Train any PyTorch model on whatever machines are there."""

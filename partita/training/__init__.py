"""Floor 6: the training step, optimizers over slices, checkpoints, data."""

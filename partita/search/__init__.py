"""Searching the network's configuration: its connections, widths, depth and hyperparameters."""

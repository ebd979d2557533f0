"""Synchronisation methods, for ``partita.parallelize(..., sync=...)``: how gradients are added between processes."""

from partita.training.sync import DGC, DeMo, Exact, GradientMethod, Masked, PowerSGD, Rounded, TopK

__all__ = ["DGC", "DeMo", "Exact", "GradientMethod", "Masked", "PowerSGD", "Rounded", "TopK"]

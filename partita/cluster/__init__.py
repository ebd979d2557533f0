"""The machines of a job as data: detected, described in files, or named by presets. Floor 1."""

from partita.cluster.model import Cluster, Gpu, Link, Machine, Process, machine_fingerprint

__all__ = ["Cluster", "Gpu", "Link", "Machine", "Process", "machine_fingerprint"]

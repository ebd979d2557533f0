"""Floor 5: runs programs for real: worker threads, collectives in shared memory and between processes."""

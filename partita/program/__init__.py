"""Floor 4: one instruction list per worker, and the checks that make it safe to run."""

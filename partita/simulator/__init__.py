"""Floor 5: runs programs in virtual time."""

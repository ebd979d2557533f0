"""Floor 3: the search for the fastest plan, with a proven bound."""

"""Search of the configuration of a network: connections, widths and depth."""

"""Code shared by all benchmarks: timing, machine description, command line."""

"""Load, peers and reports: the benchmark."""

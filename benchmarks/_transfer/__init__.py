"""Parts of the benchmark of transfers."""

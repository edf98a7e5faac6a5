"""Parts of the benchmark of sleep: one process a way of putting weights to sleep."""

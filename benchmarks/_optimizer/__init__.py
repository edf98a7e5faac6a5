"""Parts of the benchmark of optimizer kernels."""

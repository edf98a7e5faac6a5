"""Parts of the activations benchmark: one module a metric."""

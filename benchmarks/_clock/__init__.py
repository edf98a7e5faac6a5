"""Parts of the virtual clock's benchmark, one module a metric."""

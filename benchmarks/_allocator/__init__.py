"""What ``benchmarks/allocator.py`` is made of: traces, latencies, stranding and the OOM ladder."""

"""Parts of the benchmark of disks: the raw loop that ours are measured against."""

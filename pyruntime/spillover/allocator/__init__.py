"""Spillover's device pool in place of PyTorch's CUDA allocator."""

from spillover.allocator._install import install, is_installed
from spillover.allocator._pool import check_invariants, stats
from spillover.allocator._record import TraceRecording, record_trace

__all__ = [
    "TraceRecording",
    "check_invariants",
    "install",
    "is_installed",
    "record_trace",
    "stats",
]

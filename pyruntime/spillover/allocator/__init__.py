"""Spillover's device pool, in place of PyTorch's CUDA allocator or by itself."""

from spillover.allocator._configure import configure
from spillover.allocator._device_pool import Block, Pool
from spillover.allocator._install import install, is_installed
from spillover.allocator._other_libraries import cupy_allocator, numba_memory_manager
from spillover.allocator._pool import check_invariants, stats, trim
from spillover.allocator._reclaim import ReclaimerHandle, add_reclaimer
from spillover.allocator._record import TraceRecording, record_trace
from spillover.allocator._sleep import sleep, wake
from spillover.allocator._tags import tag, tag_stats

__all__ = [
    "Block",
    "Pool",
    "ReclaimerHandle",
    "TraceRecording",
    "add_reclaimer",
    "check_invariants",
    "configure",
    "cupy_allocator",
    "install",
    "is_installed",
    "numba_memory_manager",
    "record_trace",
    "sleep",
    "stats",
    "tag",
    "tag_stats",
    "trim",
    "wake",
]

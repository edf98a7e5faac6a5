"""Spillover's device pool in place of PyTorch's CUDA allocator."""

from spillover.allocator._install import install, is_installed
from spillover.allocator._pool import check_invariants, stats

__all__ = ["check_invariants", "install", "is_installed", "stats"]

"""Dry runs against computed runs on the emulated device: cases, and how they are compared."""

from benchmarks._dry.compare import Comparison, compare_cases

__all__ = ["Comparison", "compare_cases"]

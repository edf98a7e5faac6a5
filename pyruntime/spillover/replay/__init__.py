"""Allocation traces, read and replayed on Spillover's pool and on PyTorch's allocators."""

from spillover.replay._measure import ALLOCATORS, Allocator, Replay, ReplayOptions, replay
from spillover.replay._plot import plot
from spillover.replay._prices import PRICES, Price, priced_ms
from spillover.replay._read import read_trace
from spillover.replay._trace import Trace, TraceError

__all__ = [
    "ALLOCATORS",
    "PRICES",
    "Allocator",
    "Price",
    "Replay",
    "ReplayOptions",
    "Trace",
    "TraceError",
    "plot",
    "priced_ms",
    "read_trace",
    "replay",
]

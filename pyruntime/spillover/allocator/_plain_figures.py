"""Statistics, snapshots and the memory fraction of torch, read from the pool by Python.

For the plain adapter: torch's class of pluggable allocators refuses these, and below
``torch.cuda.memory`` and ``torch.accelerator.memory`` they go through functions of ``torch._C``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spillover import _core
from spillover.allocator._torch_settings import environment

# Entries of torch's statistics that are always 0 with the pool.
_NO_COUNTER = {"current": 0, "peak": 0, "allocated": 0, "freed": 0}

# The pool has none of the native allocator's settings; these are the values that say so.
_SETTINGS = {
    "max_split_size": -1,
    "garbage_collection_threshold": 0.0,
    "expandable_segments": False,
    "pinned_num_register_threads": 0,
    "release_lock_on_cudamalloc": False,
    "pinned_use_cuda_host_register": False,
    "graph_capture_record_stream_reuse": False,
    "max_round_threshold": 0,
    "max_cached_size": 0,
    "roundup_power2_divisions": {},
}

_STATES = {"live": "active_allocated", "waiting": "active_pending_free", "free": "inactive"}


def replacements() -> dict[str, Callable[..., Any]]:
    """Functions for ``torch._C``, by their names there."""
    import torch

    return {
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetAccumulatedMemoryStats": _reset_accumulated,
        "_cuda_resetPeakMemoryStats": _reset_peak,
        "_cuda_memorySnapshot": _memory_snapshot,
        "_cuda_getMemoryFraction": _memory_fraction,
        "_accelerator_getDeviceStats": _memory_stats,
        "_accelerator_resetAccumulatedStats": _reset_accumulated,
        "_accelerator_resetPeakStats": _reset_peak,
        "_accelerator_emptyCache": torch.cuda.empty_cache,
        "_accelerator_isAllocatorInitialized": torch.cuda.is_initialized,
    }


def live_blocks(device: int, arena: int) -> set[int]:
    """Addresses of an arena's live blocks."""
    return {
        block["address"]
        for segment in _core.Pool(device).segments()
        if segment["arena"] == arena
        for block in segment["blocks"]
        if block["state"] == "live"
    }


def _memory_stats(device: int) -> dict[str, Any]:
    stats: dict[str, Any] = {**_core.Pool(device).stats()}
    segments = stats["segment"]["all"]
    # As the full adapter says them (csrc/torch_adapter/device_stats.cpp).
    stats.update(
        num_device_alloc=segments["allocated"],
        num_device_free=segments["freed"],
        num_sync_all_streams=0,
        num_oom_rejections=0,
        max_split_size=-1,
        oversize_allocations=dict(_NO_COUNTER),
        oversize_segments=dict(_NO_COUNTER),
        reserved_bytes_by_private_pools={},
    )
    return stats


def _reset_accumulated(device: int) -> None:
    _core.Pool(device).reset_accumulated_stats()


def _reset_peak(device: int) -> None:
    _core.Pool(device).reset_peak_stats()


def _memory_fraction(device: int) -> float:
    return _core.Pool(device).memory_fraction()


def _memory_snapshot(pool: tuple[int, ...] | None = None) -> dict[str, Any]:
    """As ``torch._C._cuda_memorySnapshot``, without traces: there is no history."""
    import torch

    device_count = torch.cuda.device_count()
    wanted = pool[:2] if pool is not None else (0, 0)
    segments = [
        _segment(device, segment)
        for device in range(device_count)
        for segment in _core.Pool(device).segments()
    ]
    return {
        "segments": [s for s in segments if wanted in ((0, 0), s["segment_pool_id"])],
        "device_traces": [[] for _ in range(device_count)],
        "allocator_settings": {**_SETTINGS, "PYTORCH_CUDA_ALLOC_CONF": environment()[1]},
        "external_annotations": [],
        "host_segments": [],
        "host_traces": [],
    }


def _segment(device: int, segment: _core.SegmentInfo) -> dict[str, Any]:
    blocks = [
        {
            "address": block["address"],
            "size": block["size_bytes"],
            "requested_size": block["requested_bytes"],
            "state": _STATES[block["state"]],
            "frames": [],
        }
        for block in segment["blocks"]
    ]
    allocated = [block for block in blocks if block["state"] == "active_allocated"]
    active = [block for block in blocks if block["state"] != "inactive"]
    return {
        "device": device,
        "address": segment["address"],
        "total_size": segment["size_bytes"],
        "allocated_size": sum(block["size"] for block in allocated),
        "active_size": sum(block["size"] for block in active),
        "requested_size": sum(block["requested_size"] for block in active),
        "stream": segment["stream"],
        "segment_type": "small" if segment["is_small"] else "large",
        "segment_pool_id": _core.plain_pool_of(device, segment["arena"]),
        "is_expandable": not segment["is_fixed"],
        "frames": [],
        "blocks": blocks,
    }

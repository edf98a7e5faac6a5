"""The plain adapter: the pool through torch's pluggable allocator, without a compiler.

torch's class for such allocators calls ten functions of ours (csrc/plain_adapter) and refuses
everything else. What is asked for by way of Python is replaced: see ``_plain_figures`` and
``_plain_pools``. ``LACKS`` has the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spillover import _core
from spillover._settings import logger
from spillover.allocator import _plain_figures, _plain_pools, _pool, _torch_settings

#: What the full adapter has and this one cannot have.
LACKS = (
    "With it memory histories, sharing tensors with other processes, torch.compile's mode "
    "'reduce-overhead', torch.backends.cudnn.benchmark, torch.cuda.MemPool with an allocator of "
    "its own and emptying the cache within a graph's capture raise errors, and threads that "
    "allocate at the same time wait for each other"
)

# What the adapter calls of torch; see Note [torch's functions] in
# csrc/plain_adapter/torch_functions.hpp.
_TORCH_SYMBOLS = {
    "error_constructor": "_ZN3c105ErrorC1ENS_14SourceLocationE"
    "NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    "error_table": "_ZTVN3c1016OutOfMemoryErrorE",
    "error_type": "_ZTIN3c1016OutOfMemoryErrorE",
    "is_profiling": "_ZN3c1022memoryProfilingEnabledEv",
    "report_memory": "_ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE",
    "report_out_of_memory": "_ZN3c1027reportOutOfMemoryToProfilerElmmNS_6DeviceE",
}

#: Every setter of torch's class, and the function for it.
_SETTERS = {
    "set_init_fn": "spillover_pluggable_init",
    "set_reset_fn": "spillover_pluggable_empty_cache",
    "set_memory_fraction_fn": "spillover_pluggable_set_memory_fraction",
    "set_base_alloc_fn": "spillover_pluggable_base",
    "set_record_stream_fn": "spillover_pluggable_record_stream",
    "set_begin_allocate_to_pool": "spillover_pluggable_begin_pool",
    "set_end_allocate_to_pool_fn": "spillover_pluggable_end_pool",
    "set_release_pool": "spillover_pluggable_release_pool",
}


def make_allocator() -> Any:
    """The allocator for ``torch.cuda.memory.change_current_allocator``, with all that it can."""
    import torch

    # torch reads its settings at first use and compares "backend" with the allocator's name then:
    # with its own, which it has been until now.
    if text := _torch_settings.environment()[1]:
        _torch_settings.tell_what_plain_lacks(text)
        torch._C._accelerator_setAllocatorSettings(text)
    library = _pool.library()
    allocator: Any = torch.cuda.memory.CUDAPluggableAllocator(
        library._name, "spillover_pluggable_alloc", "spillover_pluggable_free"
    )
    functions = allocator.allocator()
    for setter, name in _SETTERS.items():
        getattr(functions, setter)(_address(getattr(library, name)))
    _give_torch_functions()
    return allocator


def replace_functions() -> None:
    """Have torch's functions that pluggable allocators do not serve ask the pool.

    Called once the allocator is installed, before CUDA is initialised.
    """
    import torch

    cuda: Any = torch.cuda
    replacements = {
        **_plain_figures.replacements(),
        "_cuda_cudaCachingAllocator_enable": _core.plain_set_caching,
        "_cuda_cudaCachingAllocator_is_enabled": _core.plain_is_caching,
        "_cuda_getAllocatorBackend": lambda: "spillover",  # what the full adapter is called
        "_cuda_attach_out_of_memory_observer": _core.plain_add_observer,
        "_accelerator_setAllocatorSettings": _watched(torch._C._accelerator_setAllocatorSettings),
    }
    for name, function in replacements.items():
        if hasattr(torch._C, name):  # Which there are depends on torch's version.
            setattr(torch._C, name, function)
    _plain_pools.replace()
    _keep_streams()
    cuda._lazy_call(_tell_peers)


def _address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value


def _give_torch_functions() -> None:
    """Tell the library where torch's error and profiler are."""
    import torch

    # Finds what is in the libraries that this one needs, too: where the table and the type of the
    # error are depends on torch's version.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
    addresses = {
        name: _address(getattr(library, symbol)) if hasattr(library, symbol) else 0
        for name, symbol in _TORCH_SYMBOLS.items()
    }
    missing = [_TORCH_SYMBOLS[name] for name, address in addresses.items() if address == 0]
    if missing:
        logger.warning(
            "this version of torch has no %s: out-of-memory errors may be RuntimeErrors that are "
            "not torch.OutOfMemoryErrors, and profilers may not see memory",
            ", ".join(missing),
        )
    _core.plain_set_torch_functions(**addresses)


def _watched(set_settings: Callable[[str], None]) -> Callable[[str], None]:
    """The function of torch that changes its allocators' settings, with the pool's say first."""

    def set_allocator_settings(env: str) -> None:
        _torch_settings.tell_what_plain_lacks(env)
        set_settings(_torch_settings.on_change(env))

    return set_allocator_settings


def _keep_streams() -> None:
    """Promise the pool that torch's own streams live as long as the process.

    A pluggable allocator is told a stream's handle, which does not say whose it is. torch numbers
    its own streams oddly, and those that others made evenly.
    """
    import torch

    stream_class: Any = torch.cuda.Stream
    make_stream = stream_class.__new__
    kept: set[tuple[int, int]] = set()

    def new(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        stream = make_stream(cls, *arguments, **keywords)
        key = (stream.device_index, stream.stream_id)
        if key[1] & 1 and key not in kept:
            _core.Pool(key[0]).keep_stream(stream.cuda_stream)
            kept.add(key)
        return stream

    stream_class.__new__ = staticmethod(new)


def _tell_peers() -> None:
    """Say which devices can access each other's memory, where there are several."""
    import torch

    count = torch.cuda.device_count()
    for device in range(count):
        peers = [
            peer
            for peer in range(count)
            if peer != device and torch.cuda.can_device_access_peer(peer, device)
        ]
        if peers:
            _core.plain_set_peers(device, sum(1 << peer for peer in peers))

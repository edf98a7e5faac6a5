"""The pool as the memory of CuPy and Numba, through the plugs that they document.

Neither library is imported before a function here is called. Numba's plug is tested on the emulated
device; of CuPy's only the objects are, with its kernels it has not run: CuPy brings a CUDA runtime
of its own that needs a real driver.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from spillover import _core
from spillover.allocator._device_pool import Block, Pool


def cupy_allocator(size_bytes: int) -> Any:
    """Memory of the pool for CuPy: ``cupy.cuda.set_allocator(spillover.allocator.cupy_allocator)``.

    It is for CuPy's current device and stream, and goes back with the last array that uses it. An
    array that is used on another stream must live until that use is over, as with CuPy's own pool.
    This function has not run with CuPy on a GPU.

    Parameters
    ----------
    size_bytes
        Bytes.

    Returns
    -------
    cupy.cuda.MemoryPointer
        Its memory is aligned to 512 bytes.

    Raises
    ------
    DeviceOutOfMemory
        As :meth:`Pool.allocate`, in place of CuPy's ``OutOfMemoryError``.
    """
    import cupy

    device = cupy.cuda.Device().id
    block = Pool(device).allocate(size_bytes, cupy.cuda.get_current_stream().ptr)
    memory = cupy.cuda.UnownedMemory(block.address, size_bytes, block, device)
    return cupy.cuda.MemoryPointer(memory, 0)


@functools.lru_cache(maxsize=1)
def numba_memory_manager() -> Any:
    """The class that makes the pool Numba's memory.

    ``numba.cuda.set_memory_manager(spillover.allocator.numba_memory_manager())`` comes before the
    first use of the device, as Numba demands. Memory is for the legacy default stream: Numba's own
    streams wait for that one and it for them. An array that is used on a non-blocking stream of
    another library must live until that use is over. Numba's IPC handles are not supported.

    Returns
    -------
    type
        A ``numba.cuda.HostOnlyCUDAMemoryManager``: host memory stays Numba's.

    Raises
    ------
    ModuleNotFoundError
        Numba is not installed.
    """
    from numba import cuda

    class MemoryManager(cuda.HostOnlyCUDAMemoryManager):  # type: ignore[misc]  # has no types
        """Numba's external memory management, interface version 1."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._blocks: dict[int, Block] = {}

        def initialize(self) -> None:
            """Do nothing: the pool is made with the first block."""

        def memalloc(self, size: int) -> Any:
            block = Pool(self.context.device.id).allocate(size)
            address = block.address
            self._blocks[address] = block
            blocks = self._blocks

            def give_back() -> None:
                # After reset() the block is gone; a forked child's copy is the parent's.
                freed = blocks.pop(address, None)
                if freed is not None and not _core.in_forked_child():
                    freed.free()

            return cuda.MemoryPointer(
                self.context, ctypes.c_void_p(address), size, finalizer=give_back
            )

        def get_memory_info(self) -> Any:
            free_bytes, total_bytes = _core.memory_info(self.context.device.id)
            return cuda.MemoryInfo(free=free_bytes, total=total_bytes)

        def get_ipc_handle(self, memory: Any) -> Any:
            raise NotImplementedError(
                "Spillover's pool gives no IPC handles to Numba; share such arrays through memory "
                "of numba.cuda's own manager"
            )

        def reset(self) -> None:
            super().reset()
            while self._blocks:
                self._blocks.popitem()[1].free()

        @property
        def interface_version(self) -> int:
            return 1

    return MemoryManager

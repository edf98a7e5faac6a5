"""The pool as the memory of CuPy and Numba, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest


@pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
def test_numba(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import gc
        import numpy
        from numba import cuda
        from spillover import allocator

        cuda.set_memory_manager(allocator.numba_memory_manager())

        def live():
            return allocator.stats()["requested_bytes.all.current"]

        host = numpy.arange(1 << 18, dtype=numpy.int64)
        array = cuda.to_device(host)
        assert live() == host.nbytes
        view = array[100:200]
        del array
        gc.collect()
        assert live() == host.nbytes, "the view holds it"
        assert (view.copy_to_host() == host[100:200]).all()
        stream = cuda.stream()
        other = cuda.device_array(host.shape, host.dtype, stream=stream)
        other.copy_to_device(host, stream=stream)
        assert (other.copy_to_host(stream=stream) == host).all()
        with cuda.defer_cleanup():
            del view, other
            gc.collect()
        assert live() == 0
        assert cuda.current_context().get_memory_info().total == 512 << 20

        held = cuda.device_array(1 << 20, numpy.uint8)
        try:
            held.get_ipc_handle()
        except NotImplementedError as error:
            assert "IPC" in str(error)
        else:
            raise AssertionError("no error")
        try:
            cuda.device_array(1 << 40, numpy.uint8)
        except Exception as error:
            assert "out of memory" in str(error), error
        else:
            raise AssertionError("no error")
        cuda.current_context().reset()
        assert live() == 0
        del held
        gc.collect()
        allocator.check_invariants()
        """
    )


@pytest.mark.skipif(not importlib.util.find_spec("cupy"), reason="CuPy is not installed")
def test_cupy(run_emulated: Callable[..., object]) -> None:
    """CuPy's own CUDA runtime does not start on the emulated driver: only its objects are there."""
    run_emulated(
        """
        import types
        import cupy
        from spillover import allocator

        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:
            cupy.cuda.Device = lambda: types.SimpleNamespace(id=0)
            cupy.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=0)
        else:
            cupy.cuda.set_allocator(allocator.cupy_allocator)
            array = cupy.arange(1000)
            assert allocator.stats()["requested_bytes.all.current"] == array.nbytes
            assert int(array.sum()) == 499500
            del array

        def live():
            return allocator.stats()["requested_bytes.all.current"]

        pointer = allocator.cupy_allocator(1000)
        assert isinstance(pointer, cupy.cuda.MemoryPointer)
        assert (pointer.ptr % 512, pointer.device_id, pointer.mem.size) == (0, 0, 1000)
        inner = pointer + 10
        del pointer
        assert live() == 1000, "the inner pointer holds it"
        del inner
        assert live() == 0
        assert allocator.cupy_allocator(0).ptr == 0
        """
    )

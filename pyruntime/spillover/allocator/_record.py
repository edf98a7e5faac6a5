"""Writes what a live run allocates and frees, for ``spillover replay``."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import threading
from pathlib import Path
from typing import Any

from spillover._errors import ConfigError, StateError, StorageError
from spillover.allocator import _pool
from spillover.allocator._handle import Handle

_lock = threading.Lock()
_active: TraceRecording | None = None


class TraceRecording(Handle):
    """A recording under way.

    :meth:`remove` ends it, the end of its ``with`` block, or that of the program.
    """

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path = path
        self._library = library
        self._restore = _watch_record_stream(library)

    def remove(self) -> None:
        """End the recording and close the file. Further calls do nothing.

        Raises
        ------
        StorageError
            The file could not be written to its end, for example because the disk is full.
        """
        global _active
        with _lock:
            if _active is not self:
                return
            _active = None
            self._restore()
            number = self._library.spillover_torch_recorder_stop()
            atexit.unregister(self.remove)
        if number != 0:
            raise StorageError(number, os.strerror(number), str(self.path))


def record_trace(path: Path | str, *, device: int = 0) -> TraceRecording:
    """Write every allocation and free of ``device`` to a csv, until the recording is removed.

    Works with PyTorch's allocator and with Spillover's. Events are written as they happen, so the
    length of a recording is bounded by the disk alone. Blocks that live already come first;
    begin while no other thread allocates. Uses by ``Tensor.record_stream`` in Python are kept,
    those by C++ code such as NCCL's are not. The first use on a machine compiles a part for the
    installed torch.

    Parameters
    ----------
    path
        The csv to write; an existing file is replaced. See ``docs/replay.md`` for the form.
    device
        Index of the CUDA device. CUDA is initialised by this call.

    Returns
    -------
    TraceRecording
        A context manager with ``remove()``.

    Raises
    ------
    StateError
        A recording is under way in this process.
    StorageError
        The file cannot be opened.
    ConfigError
        There is no such device, or no CUDA build of torch.
    BuildError
        The part could not be compiled.
    """
    global _active
    path = Path(path).absolute()
    _pool.device_index(device)  # Before a part is compiled for it.
    library = _library()
    _require_device(device)
    with _lock:
        if _active is not None:
            raise StateError(f"a recording to {_active.path} is under way; remove it first")
        number = library.spillover_torch_recorder_start(os.fsencode(path), device)
        if number != 0:
            raise StorageError(number, os.strerror(number), str(path))
        _active = TraceRecording(path, library)
        # A handle that nobody removes: the file is complete when the program ends.
        atexit.register(_active.remove)
        return _active


def _require_device(device: int) -> None:
    import torch

    cuda: Any = torch.cuda  # torch leaves some of its functions without types
    cuda.init()
    if device >= cuda.device_count():
        raise ConfigError(f"there is no CUDA device {device}; there are {cuda.device_count()}")


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    from spillover import _build

    path = _build.build("replay")
    import torch  # noqa: F401  # its libraries are what the part needs

    library = ctypes.CDLL(str(path))
    library.spillover_torch_recorder_start.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.spillover_torch_recorder_record_stream.argtypes = [ctypes.c_uint64, ctypes.c_void_p]
    library.spillover_torch_recorder_record_stream.restype = None
    return library


def _watch_record_stream(library: ctypes.CDLL) -> Any:
    """Record the uses that ``Tensor.record_stream`` notes; gives a function that ends that."""
    import torch

    tensor: Any = torch.Tensor
    had_own = "record_stream" in tensor.__dict__
    original = tensor.record_stream

    @functools.wraps(original)
    def record_stream(self: Any, stream: Any) -> None:
        original(self, stream)
        # A block's address is its storage's, whatever part of it the tensor shows.
        if isinstance(stream, torch.cuda.Stream):
            library.spillover_torch_recorder_record_stream(
                self.untyped_storage().data_ptr(), stream.cuda_stream
            )

    def restore() -> None:
        if had_own:
            tensor.record_stream = original
        else:
            del tensor.record_stream

    tensor.record_stream = record_stream
    return restore

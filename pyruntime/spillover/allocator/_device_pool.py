"""The pool of one device for programs without torch, and blocks of its memory."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from spillover import _core
from spillover._errors import ConfigError, StateError
from spillover._units import parse_bytes
from spillover.allocator import _configure, _pool

if TYPE_CHECKING:
    from typing_extensions import CapsuleType, Unpack

_DLPACK_CUDA = 2  # kDLCUDA of DLPack's DLDeviceType


class SupportsCudaStream(Protocol):
    """A stream of cuda.core, CuPy or Numba."""

    def __cuda_stream__(self) -> tuple[int, int]: ...


#: The handle of a CUDA stream, a stream of torch or of a library with ``__cuda_stream__``, or None
#: for the legacy default stream.
Stream = int | SupportsCudaStream | Any | None


def stream_handle(stream: Stream) -> int:
    """The CUDA handle of a stream."""
    if stream is None:
        return 0
    handle: object = stream
    if hasattr(stream, "__cuda_stream__"):
        answer = stream.__cuda_stream__()
        handle = answer[1] if isinstance(answer, tuple) and len(answer) == 2 else answer
    elif hasattr(stream, "cuda_stream"):  # torch.cuda.Stream before it has the protocol
        handle = stream.cuda_stream
    if isinstance(handle, int) and not isinstance(handle, bool) and 0 <= handle < 1 << 64:
        return handle
    raise ConfigError(
        f"stream={stream!r} is not a CUDA stream; give its handle as an int, a torch.cuda.Stream, "
        "or an object with __cuda_stream__"
    )


def _consumer_stream(stream: int | None) -> int:
    if stream is None:
        return 1
    if isinstance(stream, bool) or not isinstance(stream, int) or not 0 < stream < 1 << 64:
        raise ConfigError(
            f"stream={stream!r} is not allowed by DLPack for CUDA; give -1, 1 (the legacy default "
            "stream), 2 (the thread's default stream) or a handle"
        )
    return stream


class Block:
    """Device memory of a pool, free again after :meth:`free` or with the last reference.

    Any library that reads ``__cuda_array_interface__`` sees it as an array of bytes, without a
    copy: ``torch.as_tensor(block, device="cuda")``, ``cupy.asarray(block)``. So does
    ``from_dlpack`` of any library.
    """

    def __init__(self, pool: _core.Pool, address: int, size_bytes: int, stream: int) -> None:
        self._pool = pool
        self._address: int | None = address
        self._size_bytes = size_bytes
        self._stream = stream

    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of 512; 0 for a size of 0."""
        if self._address is None:
            raise StateError("the block was freed")
        return self._address

    @property
    def size_bytes(self) -> int:
        """Bytes as they were asked for."""
        return self._size_bytes

    @property
    def device(self) -> int:
        """Index of the CUDA device."""
        return self._pool.device

    @property
    def stream(self) -> int:
        """Handle of the stream that the block was allocated for."""
        return self._stream

    def record_stream(self, stream: Stream) -> None:
        """Note that the block is used on another stream, so that it is not reused too early.

        Does not block. Work submitted there before :meth:`free` is complete before any part of the
        block is handed out again.
        """
        self._pool.record_stream(self.address, stream_handle(stream))

    def free(self) -> None:
        """Give the memory back; further calls do nothing.

        Does not wait for the device: the next block on the same stream may get the memory at once,
        and other streams only after the work submitted so far.
        """
        address, self._address = self._address, None
        if address:
            self._pool.free(address)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # A stream of 0 is not allowed there: 1 is the legacy default one.
        return {
            "shape": (self._size_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": self._stream or 1,
        }

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """The block as a DLPack array of bytes: ``torch.from_dlpack(block)``, ``cupy.from_dlpack``.

        As the Python array API standard 2023.12 has it. The consumer's array is the same memory and
        holds the block; with :meth:`free` the block is gone all the same. The array may be used on
        ``stream``, as after :meth:`record_stream`; its use on any other stream is to be recorded.

        Parameters
        ----------
        stream
            The consumer's: a handle, 1 for the legacy default stream (so is None), 2 for the
            thread's. It waits for what was submitted to the block's stream so far, which must still
            live. -1 leaves all of that to the consumer.
        max_version
            What the consumer understands at most; from (1, 0) on it gets a versioned capsule.
        dl_device
            Where the array is to be: nowhere but where the block is.
        copy
            True is not possible.

        Raises
        ------
        BufferError
            A copy or another device is asked for.
        ConfigError
            The stream is no CUDA stream; DLPack does not allow 0.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(
                "a block is exported where it is and without a copy; copy the array that "
                "from_dlpack(block) gives, for example torch.from_dlpack(block).cpu()"
            )
        address = self.address
        if stream != -1:
            consumer = _consumer_stream(stream)
            if address:
                _core.put_before(self.device, self._stream, consumer)
                self._pool.record_stream(address, consumer)
        versioned = max_version is not None and max_version[0] >= 1
        return _core.dlpack_capsule(self, address, self._size_bytes, self.device, versioned)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's number for CUDA devices, and the index of this one."""
        return _DLPACK_CUDA, self.device

    def __enter__(self) -> Block:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.free()

    def __del__(self) -> None:
        # A block whose making failed has no address, and a forked child's copy is the parent's.
        if getattr(self, "_address", None) and not _core.in_forked_child():
            self.free()

    def __len__(self) -> int:
        return self._size_bytes

    def __repr__(self) -> str:
        state = "freed" if self._address is None else f"address=0x{self._address:x}"
        return f"Block(device={self.device}, size_bytes={self._size_bytes}, {state})"


class Pool:
    """The process's pool of one device's memory, which torch shares once it is installed.

    Any number of these objects stand for the same pool. Every method may be called from any thread.

    Parameters
    ----------
    device
        Index of the CUDA device.
    **settings
        Changes to the settings of this device's pool, as in :func:`configure`.

    Raises
    ------
    ConfigError
        There is no such device, or a setting is wrong.
    DriverError
        There is no CUDA driver, or it failed.

    Examples
    --------
    >>> pool = spillover.allocator.Pool(0, limit="20GiB")
    >>> block = pool.allocate(1 << 20, stream)
    """

    def __init__(self, device: int = 0, **settings: Unpack[_configure.Settings]) -> None:
        if settings:  # before the pool is made, when each of them can still be chosen
            _configure.apply(_pool.device_index(device), settings)
        self._core = _core.Pool(_pool.device_index(device))

    @property
    def device(self) -> int:
        """Index of the CUDA device."""
        return self._core.device

    def allocate(self, size_bytes: int | str, stream: Stream = None) -> Block:
        """Memory for use on a stream at once.

        Parameters
        ----------
        size_bytes
            Bytes, or a text such as ``"1GiB"``. What is in the memory is not defined.
        stream
            Where it will be used first; a legacy default stream by default. A stream must live
            while it is passed.

        Returns
        -------
        Block
            Its memory is aligned to 512 bytes.

        Raises
        ------
        DeviceOutOfMemory
            The device has not enough (``DriverError`` where torch is not loaded). Before that it
            waits for streams, at most ``wait_max``, and asks the reclaimers.
        StateError
            The stream records a CUDA graph, or this is a forked child.
        """
        size = parse_bytes(size_bytes, name="size_bytes")
        handle = stream_handle(stream)
        return Block(self._core, self._core.alloc(size, handle), size, handle)

    def trim(self, keep: int | str = 0) -> None:
        """Give memory without a live block to the driver until at most ``keep`` bytes are held.

        Waits for the device's work.
        """
        self._core.trim(parse_bytes(keep, name="keep"))

    def stats(self) -> dict[str, int]:
        """Counters, as :func:`spillover.allocator.stats`."""
        return _pool.stats(self.device)

    def reset_peaks(self) -> None:
        """Set each high-water mark (the counters' ``peak``) to what is current."""
        self._core.reset_peak_stats()

    def settings(self) -> _core.PoolSettings:
        """The settings in force; sizes in bytes, times in seconds."""
        return self._core.settings()

    def largest_free_bytes(self) -> int:
        """Size of the largest free block that is mapped."""
        return self._core.largest_free_bytes()

    def check_invariants(self) -> None:
        """As :func:`spillover.allocator.check_invariants`."""
        self._core.check_invariants()

    def __repr__(self) -> str:
        return f"Pool(device={self.device})"

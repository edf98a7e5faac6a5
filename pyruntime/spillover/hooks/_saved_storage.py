"""What stands for a saved tensor while its bytes are off the device.

Note [Identity of saved bytes]
------------------------------
Views and aliases of one storage share one copy. A storage is known by the address of its
StorageImpl *while a weak reference to it is held*: the weak reference keeps that address from being
given to another storage, though not the device memory from being freed. Which bytes the storage
held is told by the version counter, of which one storage can have several: each ``.data`` makes an
alias with a counter of its own, at zero. A counter is held without its tensor by an alias whose
data was replaced by an empty tensor: it shares the counter and keeps no device memory. A write
through ``.data`` moves no counter; autograd does not see it either.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from spillover._core import DiskPayload, HostBuffer, Ticket

# Allocators align to this, and kernels choose their vector width by it: a range that is copied
# starts at a multiple, so that a restored tensor is aligned as the original was.
_ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` to ``end`` of a storage."""

    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Length of the range."""
        return self.end - self.start

    def contains(self, other: ByteRange) -> bool:
        """Whether all of ``other`` lies inside."""
        return self.start <= other.start and other.end <= self.end


def covering_range(tensor: torch.Tensor) -> ByteRange:
    """The least range of the storage that holds every element of a strided, non-empty tensor."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    first = int(tensor.storage_offset())
    item = tensor.element_size()
    return ByteRange(first * item, (first + last + 1) * item)


def range_to_copy(wanted: ByteRange, storage_bytes: int) -> ByteRange:
    """What to copy for a tensor that covers ``wanted``.

    The whole storage if the tensor spans half of it or more, as the chunks of a fused projection
    do: they interleave, and their siblings are saved next. Otherwise only what is needed.
    """
    if 2 * wanted.size_bytes >= storage_bytes:
        return ByteRange(0, storage_bytes)
    return ByteRange(wanted.start // _ALIGNMENT * _ALIGNMENT, wanted.end)


def hold_counter(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor that shares the version counter of ``tensor``, but not its memory."""
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


def share_counter(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have one version counter, rather than two at the same number.

    Torch does not tell which counter a tensor has, so the first one is moved for a moment. Callers
    hold the transfers' lock, so that no other thread's answer is disturbed.
    """
    version = second._version
    if first._version != version:
        return False
    with torch.autograd._unsafe_preserve_version_counter(first):  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(first)
        return bool(second._version != version)


@dataclass(eq=False, slots=True)
class HostBlock:
    """Pinned bytes, as the buffer that the disk store takes and the tensor that torch copies."""

    buffer: HostBuffer
    tensor: torch.Tensor


@dataclass(eq=False)
class SavedCopy:
    """One range of one storage, offloaded. It lives as long as a SavedView of it does.

    All fields are guarded by the lock of the module ``_saved_transfers``. Where the bytes are:

    - ``source`` set: still on the device, where they were saved; the copy-out is under way.
    - ``block`` set: in pinned memory once ``left`` has happened. For the disk tier only until
      ``writing`` is done.
    - ``payload`` set and ``writing`` not: on disk.
    - ``flat`` set: on the device again, once ``arrived`` has happened.

    Invariant: at least one of source, block and payload is set.
    """

    storage: StorageWeakRef
    data_pointer: int
    version: int
    counter: torch.Tensor
    extent: ByteRange
    device: torch.device
    home: torch.cuda.Stream
    produced: torch.cuda.Event
    left: torch.cuda.Event
    dead: deque[StorageWeakRef]
    source: torch.Tensor | None = None
    block: HostBlock | None = None
    payload: DiskPayload | None = None
    writing: Ticket | None = None
    reading: tuple[Ticket, HostBlock] | None = None
    flat: torch.Tensor | None = None
    flat_home: torch.cuda.Stream | None = None
    arrived: torch.cuda.Event | None = None
    views: list[weakref.ref[SavedView]] = field(default_factory=list)

    def is_current(self, tensor: torch.Tensor) -> bool:
        """Whether the copy holds what ``tensor``, a tensor over the same storage, holds now."""
        return (
            self.version == tensor._version == self.counter._version
            and self.data_pointer == tensor.untyped_storage().data_ptr()
            and share_counter(self.counter, tensor)
        )

    def drop_flat(self) -> None:
        """Let go of the bytes that came back; its allocating stream first waits for the copy."""
        if self.flat is not None and self.flat_home is not None and self.arrived is not None:
            self.flat_home.wait_event(self.arrived)
        self.flat = None
        self.flat_home = None
        self.arrived = None

    def __del__(self) -> None:
        # May run on any thread, and while that thread holds the lock: so no lock is taken. The weak
        # reference lives on in the queue until the engine has forgotten the storage's address.
        self.drop_flat()
        self.dead.append(self.storage)


@dataclass(eq=False)
class SavedView:
    """What autograd holds for an offloaded tensor: which part of which copy it is."""

    copy: SavedCopy
    position: int
    version: int
    counter: torch.Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: int
    served_in: int = 0


@dataclass(eq=False, slots=True)
class KeptTensor:
    """What autograd holds for a tensor that stays where it is."""

    tensor: torch.Tensor
    version: int | None


def keep(tensor: torch.Tensor) -> KeptTensor:
    """Hold a saved tensor as it is, with the version that backward has to find."""
    version = None if tensor.is_inference() else tensor._version
    # An output's grad_fn holds what is returned here: without detach() that would be a cycle that
    # Python's collector cannot see.
    held = tensor.detach() if tensor.grad_fn is not None else tensor
    return KeptTensor(held, version)


def check_version(counter: torch.Tensor, shape: torch.Size, expected: int) -> None:
    """Raise as autograd does for a saved tensor that was changed in place.

    Parameters
    ----------
    counter
        The tensor, or what ``hold_counter`` made of it.
    shape
        Of the saved tensor.
    expected
        Its version when it was saved.
    """
    if counter._version == expected:
        return
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{counter.type()} {list(shape)}] is at version {counter._version}; expected "
        f"version {expected} instead. Hint: enable anomaly detection to find the operation that "
        "failed to compute its gradient, with torch.autograd.set_detect_anomaly(True)."
    )

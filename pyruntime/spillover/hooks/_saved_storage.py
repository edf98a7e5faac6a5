"""What stands for a saved tensor while its bytes are off the device, or may leave it.

Note [Identity of saved bytes]
------------------------------
Views and aliases of one storage share one copy. A storage is known by the address of its
StorageImpl *while a reference to it is held*, be it weak: that keeps the address from being given
to another storage, though a weak one does not keep the device memory from being freed. Which bytes
the storage held is told by the version counter, of which one storage can have several: each
``.data`` makes an alias with a counter of its own, at zero. A counter is held without its tensor by
an alias whose data was replaced by an empty tensor: it shares the counter and keeps no device
memory. A write through ``.data`` moves no counter; autograd does not see it either.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from spillover import _core
    from spillover.hooks._activation_codec import Encoding
    from spillover.hooks._activation_device import ActivationDevice, Arrival, Counters
    from spillover.hooks._activation_order import Round

#: Allocators align to this, and kernels choose their vector width by it: a range that is copied
#: starts at a multiple, so that a restored tensor is aligned as the original was.
ALIGNMENT = 512

_empties: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def covering_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The least range of bytes of the storage that holds every element of a non-empty tensor."""
    item = tensor.element_size()
    start = int(tensor.storage_offset()) * item
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (int(last) + 1) * item


def range_to_copy(start: int, end: int, storage_bytes: int) -> tuple[int, int]:
    """What to copy for a tensor that covers ``start`` to ``end``.

    The whole storage if the tensor spans half of it or more, as the chunks of a fused projection
    do: they interleave, and their siblings are saved next. Otherwise only what is needed.
    """
    if 2 * (end - start) >= storage_bytes:
        return 0, storage_bytes
    return start // ALIGNMENT * ALIGNMENT, end


def forget_data(tensor: torch.Tensor) -> None:
    """Have ``tensor`` share its version counter still, but no memory."""
    key = tensor.dtype, tensor.device
    empty = _empties.get(key)
    if empty is None:
        empty = _empties[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor.data = empty


def share_counter(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have one version counter, rather than two at the same number.

    Torch does not tell which counter a tensor has, so the first one is moved for a moment. Callers
    hold the activations' lock, so that no other thread's answer is disturbed.
    """
    version = second._version
    if first._version != version:
        return False
    with torch.autograd._unsafe_preserve_version_counter(first):  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(first)
        return bool(second._version != version)


class SavedCopy:
    """One range of one storage. It lives as long as a SavedView of it does.

    All fields are guarded by the activations' lock. Where the bytes are, any of:

    - ``storage`` set: on the device, where they were saved, or encoded. They stay there
      (``device_bytes`` counts as kept), or are about to leave with the device's next batch.
    - ``payload`` set: with the transfer engine, once ``left`` is over. Until then ``leaving`` may
      still give the storage.
    - ``arrival`` set: on the device again, once the arrival is over.

    Invariant: storage or payload is set.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "arrival",
        "arrival_offset",
        "counted_bytes",
        "counter",
        "counters",
        "data_pointer",
        "device",
        "encoding",
        "end",
        "identity",
        "is_kept",
        "leaving",
        "next_use",
        "payload",
        "size_bytes",
        "start",
        "storage",
        "stream",
        "version",
        "views",
    )

    def __init__(
        self,
        device: ActivationDevice,
        counters: Counters,
        tensor: torch.Tensor,
        storage: torch.UntypedStorage,
        start: int,
        end: int,
        stream: int,
    ) -> None:
        self.device = device
        self.counters = counters  # Of the context that saved it.
        self.identity: StorageWeakRef = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.address = storage._cdata
        self.data_pointer = storage.data_ptr()
        self.version = tensor._version
        #: Shares the version counter of what was saved, and its memory as long as that is held.
        self.counter = tensor.detach()
        self.start, self.end = start, end
        self.size_bytes = end - start
        self.stream = stream  # On which they were produced.
        self.storage: torch.UntypedStorage | None = storage
        self.encoding: Encoding | None = None
        self.next_use = 0
        self.leaving: weakref.ref[torch.UntypedStorage] | None = None
        self.payload: _core.Payload | None = None
        self.arrival: Arrival | None = None
        self.arrival_offset = 0
        #: What of it the device's figures count as waiting for backward.
        self.counted_bytes = 0
        self.is_kept = False  # As what never left.
        self.views: list[weakref.ref[SavedView]] = []

    def is_current(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        """Whether the copy holds what ``tensor``, a tensor over the same storage, holds now."""
        return (
            self.version == tensor._version == self.counter._version
            and self.data_pointer == storage.data_ptr()
            and share_counter(self.counter, tensor)
        )

    def __del__(self) -> None:
        # May run on any thread, and while that thread holds the lock: so no lock is taken.
        if self.counted_bytes:
            self.device.ended.append((self.counted_bytes, self.is_kept))
        if self.storage is None and self.arrival is None:
            self.counters.ended_away.append(self.size_bytes)


class SavedView:
    """What autograd holds for an offloaded tensor: which part of which copy it is.

    ``is_whole``: the copy was made for it, so that the counter's memory is what was saved.
    """

    __slots__ = (
        "__weakref__",
        "copy",
        "counter",
        "dtype",
        "index",
        "is_whole",
        "round",
        "served_in",
        "shape",
        "storage_offset",
        "stride",
        "version",
    )

    def __init__(
        self, copy: SavedCopy, tensor: torch.Tensor, round_: Round, *, is_whole: bool
    ) -> None:
        self.copy = copy
        self.version = copy.version
        self.counter = copy.counter
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.storage_offset = tensor.storage_offset()
        self.round = round_
        self.index = 0
        self.is_whole = is_whole
        self.served_in = 0


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
        The tensor, or one that shares its version counter.
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

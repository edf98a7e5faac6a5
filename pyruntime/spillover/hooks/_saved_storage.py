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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from spillover import _core
    from spillover.hooks._activation_account import Counters
    from spillover.hooks._activation_arrivals import Arrival
    from spillover.hooks._activation_codec import Encoding
    from spillover.hooks._activation_device import ActivationDevice
    from spillover.hooks._activation_order import Round

#: Allocators align to this, and kernels choose their vector width by it: a range that is copied
#: starts at a multiple, so that a restored tensor is aligned as the original was.
ALIGNMENT = 512
#: Each time that a copy has so many more views, those that are gone are looked for.
_VIEWS_CHECKED = 64

_empties: dict[tuple[torch.dtype, int], torch.Tensor] = {}


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


def empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """So many elements, with a version counter, which a tensor made in inference mode has not."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(mode=False):
            return torch.empty(count, dtype=dtype, device=device)
    return torch.empty(count, dtype=dtype, device=device)


def forget_data(tensor: torch.Tensor) -> None:
    """Have ``tensor`` share its version counter still, but no memory."""
    key = tensor.dtype, tensor.get_device()
    nothing = _empties.get(key)
    if nothing is None:
        nothing = _empties[key] = empty(0, tensor.dtype, tensor.device)
    tensor.data = nothing


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
        "first_view",
        "is_kept",
        "leaving",
        "more_views",
        "next_use",
        "payload",
        "sent_bytes",
        "sent_end",
        "sent_start",
        "size_bytes",
        "start",
        "storage",
        "stream",
        "version",
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
        # Of what its end asks for; an error below may bring that about.
        self.address = 0
        #: What of it the device's account has as waiting for backward.
        self.counted_bytes = 0
        self.arrival: Arrival | None = None
        self.storage: torch.UntypedStorage | None = storage
        self.device = device
        self.counters = counters  # Of the context that saved it.
        self.data_pointer = storage.data_ptr()
        self.version = tensor._version
        #: Shares the version counter of what was saved, and its memory as long as that is held.
        self.counter = tensor.detach()
        self.start = self.sent_start = start
        #: What is sent lies in ``storage`` from ``sent_start`` to ``sent_end``.
        self.end = self.sent_end = end
        self.size_bytes = self.sent_bytes = end - start
        self.stream = stream  # On which they were produced.
        self.encoding: Encoding | None = None
        self.next_use = 0
        self.leaving: weakref.ref[torch.UntypedStorage] | None = None
        self.payload: _core.Payload | None = None
        self.arrival_offset = 0
        self.is_kept = False  # Is among what never left, there.
        self.first_view: weakref.ref[SavedView] | None = None
        self.more_views: list[weakref.ref[SavedView]] | None = None
        #: Of the StorageImpl; a weak reference to it is held from here on, see the note.
        self.address = storage._weak_ref()  # type: ignore[assignment]

    def views(self) -> Iterator[SavedView]:
        """Those that live."""
        view = self.first_view() if self.first_view is not None else None
        if view is not None:
            yield view
        for reference in self.more_views or ():
            view = reference()
            if view is not None:
                yield view

    def add_view(self, reference: weakref.ref[SavedView]) -> None:
        """Note that there is another one."""
        if self.first_view is None:
            self.first_view = reference
        elif self.more_views is None:
            self.more_views = [reference]
        else:
            if len(self.more_views) % _VIEWS_CHECKED == 0:
                self.more_views = [each for each in self.more_views if each() is not None]
            self.more_views.append(reference)

    def has_view(self) -> bool:
        """Whether a view of it lives; if not, its destructor may be running on another thread."""
        first = self.first_view
        return (first is not None and first() is not None) or next(self.views(), None) is not None

    def replace(self, encoded: torch.UntypedStorage, encoding: Encoding) -> None:
        """Have the whole of ``encoded`` be sent for it."""
        self.storage, self.encoding = encoded, encoding
        self.sent_start = 0
        self.sent_bytes = self.sent_end = encoding.size_bytes
        forget_data(self.counter)

    def is_current(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        """Whether the copy holds what ``tensor``, a tensor over the same storage, holds now."""
        return (
            self.version == tensor._version == self.counter._version
            and self.data_pointer == storage.data_ptr()
            and share_counter(self.counter, tensor)
        )

    def __del__(self, free: Callable[[int], None] = torch.UntypedStorage._free_weak_ref) -> None:
        # May run on any thread, and while that thread holds the lock: so no lock is taken.
        if self.address:
            free(self.address)
        if self.counted_bytes:
            self.device.account.ended.append((self.counted_bytes, self.is_kept))
        if self.storage is None and self.arrival is None:
            self.counters.ended_away.append(self.size_bytes)
        self.arrival = None  # Before the device, whose end waits for what arrives.


def living(references: Iterable[weakref.ref[SavedCopy]]) -> list[SavedCopy]:
    """The copies of which a view lives."""
    copies = (each() for each in references)
    return [copy for copy in copies if copy is not None and copy.has_view()]


class SavedView:
    """What autograd holds for an offloaded tensor: which part of which copy it is."""

    __slots__ = (
        "__weakref__",
        "copy",
        "counter",
        "dtype",
        "index",
        "round",
        "served_in",
        "shape",
        "storage_offset",
        "stride",
        "version",
    )

    def __init__(self, copy: SavedCopy, tensor: torch.Tensor, round_: Round) -> None:
        self.copy = copy
        self.version = copy.version
        self.counter = copy.counter
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.storage_offset = tensor.storage_offset()
        self.round = round_
        self.index = 0
        self.served_in = 0


def flat_over(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of it."""
    flat = empty(0, torch.uint8, storage.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


def typed_over(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Flat bytes as a type, as many as are whole elements; shares the version counter."""
    item = dtype.itemsize
    if flat.numel() % item:
        flat = flat[: flat.numel() // item * item]
    return flat.view(dtype)


def original(view: SavedView, storage: torch.UntypedStorage) -> torch.Tensor:
    """What was saved, which is in ``storage`` still."""
    counter = view.counter
    # Where the counter has the memory, too, what is given out shares the counter, so that a
    # write to it is noticed as torch does.
    if counter.dtype == view.dtype and counter.untyped_storage()._cdata == storage._cdata:
        return counter.as_strided(view.shape, view.stride, view.storage_offset)
    tensor = torch.empty(0, dtype=view.dtype, device=storage.device)
    return tensor.set_(storage, view.storage_offset, view.shape, view.stride)


def part_of(typed: torch.Tensor, view: SavedView, shift_bytes: int) -> torch.Tensor:
    """``view`` over memory whose bytes lie ``shift_bytes`` later than those of what was saved.

    ``typed``: all of that memory, as the type of ``view``. Shares its version counter.
    """
    offset = view.storage_offset + shift_bytes // view.dtype.itemsize
    part = typed.as_strided(view.shape, view.stride, offset)
    # No view, for who changes it where gradients are computed.
    return part.detach() if torch.is_grad_enabled() else part


def decoded(view: SavedView, flat: torch.Tensor, position: int) -> torch.Tensor:
    """``view`` of what was encoded, which is in ``flat`` from ``position`` on."""
    encoding = view.copy.encoding
    assert encoding is not None
    whole = encoding.decode(flat[position : position + encoding.size_bytes])
    return part_of(whole, view, -view.copy.start)


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
    if counter._version != expected:
        raise changed_in_place(counter, expected, shape)


def changed_in_place(
    counter: torch.Tensor, expected: int, shape: torch.Size | None = None
) -> RuntimeError:
    """The error that autograd raises for a saved tensor that was changed in place."""
    shown = list(counter.shape if shape is None else shape)
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{counter.type()} {shown}] is at version {counter._version}; expected "
        f"version {expected} instead. Hint: enable anomaly detection to find the operation that "
        "failed to compute its gradient, with torch.autograd.set_detect_anomaly(True)."
    )

"""The two saved-tensor hooks: which tensors may leave, and what stands for them.

One engine belongs to the ``offload_activations`` objects of equal options, and lives as long as
saved tensors of it. ``pack`` and ``unpack`` may be called from any thread: autograd runs backward
on threads of its own. What happens on a device is in ``_activation_device``.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from spillover._core import DiskStore, HostPool
from spillover.hooks._activation_account import Counters, lock
from spillover.hooks._activation_device import ActivationDevice, EngineOptions
from spillover.hooks._saved_storage import (
    KeptTensor,
    SavedCopy,
    SavedView,
    check_version,
    covering_range,
    keep,
    living,
    range_to_copy,
)

_STAYING_MIN = 1024
_COPIES_MIN = 1024

#: Says of a tensor whether it may leave.
Predicate = Callable[[torch.Tensor], bool]


class PoolSource(Protocol):
    """Gives the pool of pinned memory; called when the first tensor is offloaded."""

    def __call__(self) -> HostPool: ...


class ActivationEngine:
    """The two hooks and their state."""

    def __init__(
        self,
        options: EngineOptions,
        pool: PoolSource,
        disk: DiskStore | None,
        where: Predicate | None = None,
    ) -> None:
        self._options = options
        self._min_bytes = max(options.min_bytes, 1)
        self._pool_source = pool
        self._disk = disk
        self._where = where
        # Guarded by the lock.
        # By StorageImpl address; of most storages there is one.
        self._copies: dict[int, weakref.ref[SavedCopy] | list[weakref.ref[SavedCopy]]] = {}
        self._copies_max = _COPIES_MIN  # Beyond it, dead ones are looked for.
        self._staying: dict[int, StorageWeakRef] = {}  # Storages of parameters and other leaves.
        self._staying_max = _STAYING_MIN
        self._devices: dict[int, ActivationDevice] = {}  # By index.
        self._called: set[int] = set()  # What forward called since the round began, see below.
        self._process = os.getpid()

    # ---- what contexts ask for ----

    def begin_round(self) -> None:
        """What is saved from now on belongs to another forward."""
        with lock:
            self._check_process()
            for device in self._devices.values():
                device.begin_round()

    def begin_round_at(self, token: int) -> bool:
        """Forward calls what ``token`` stands for; if that is for the first time since the round
        began, or it begins another, whether it is the latter or the first of all.

        Another begins where it is called again, and backward has begun since, or the graph is gone.
        """
        with lock:
            self._check_process()
            is_first = not self._called
            if token in self._called:
                ended = [each for each in self._devices.values() if each.begin_round_if_ended()]
                if ended:
                    self._called.clear()
                    is_first = True
            self._called.add(token)
            return is_first

    def collect(self) -> None:
        """Let what is to leave do so, and let go of what has."""
        for device in self.devices():
            device.collect()

    def order_writes(self) -> None:
        """Have what current streams do from now on wait for the copies out under way."""
        for device in self.devices():
            device.departures.order_writes(device.device.index)

    def ran_out(self) -> None:
        """The program had no device memory; block until what is leaving has left."""
        for device in self.devices():
            device.ran_out()

    def devices(self) -> list[ActivationDevice]:
        """The devices whose tensors were saved."""
        with lock:
            self._check_process()
            return list(self._devices.values())

    def _check_process(self) -> None:
        if self._process != os.getpid():
            # A forked child has the parent's bookkeeping, but neither its device nor its threads.
            _left_behind.append(self._devices)
            self._devices, self._copies = {}, {}
            self._process = os.getpid()

    # ---- what stays on the device ----

    def keep_on_device(self, model: nn.Module) -> None:
        """Never offload the model's parameters and buffers."""
        with lock:
            for tensor in (*model.parameters(), *model.buffers()):
                if is_plain(tensor):
                    self._stay(tensor.untyped_storage())

    def _stay(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._staying:
            if len(self._staying) >= self._staying_max:
                live = {key: ref for key, ref in self._staying.items() if not _is_dead(ref)}
                self._staying = live
                self._staying_max = max(_STAYING_MIN, 2 * len(live))
            self._staying[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _stays(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        if storage.nbytes() < self._min_bytes:
            return True
        base = tensor._base
        if base is None:
            base = tensor
        if (base.requires_grad and base.is_leaf) or (
            type(base) is not torch.Tensor and isinstance(base, nn.Parameter)
        ):
            self._stay(storage)
            return True
        held = self._staying.get(storage._cdata)
        if held is not None:
            if not _is_dead(held):
                return True
            del self._staying[storage._cdata]
        return storage.data_ptr() == 0 or torch._C._cuda_isCurrentStreamCapturing()

    # ---- the hooks ----

    def pack(self, counters: Counters, tensor: torch.Tensor) -> SavedView | KeptTensor:
        """Autograd saves ``tensor``, in a context that has ``counters``."""
        if not tensor.is_cuda or not is_plain(tensor) or tensor.numel() == 0:
            return _kept(counters, tensor)
        storage = tensor.untyped_storage()
        if self._where is not None and not self._where(tensor):
            return _kept(counters, tensor)
        with lock:
            if self._stays(tensor, storage):
                return _kept(counters, tensor)
            start, end = covering_range(tensor)
            copy = self._known_copy(tensor, storage, start, end)
            if copy is not None:
                counters.tensors += 1
                counters.deduplicated_bytes += end - start
                return copy.device.add_alias(copy, tensor)
            device = self._devices.get(tensor.get_device()) or self._make_device(tensor.device)
            start, end = range_to_copy(start, end, storage.nbytes())
            view, is_due = device.add(counters, tensor, storage, start, end)
            self._note(view.copy)
            counters.tensors += 1
        if is_due:
            device.departures.flush()
        return view

    def _make_device(self, device: torch.device) -> ActivationDevice:
        made = self._devices[device.index] = ActivationDevice(
            device, self._options, self._pool_source(), self._disk
        )
        return made

    def _known_copy(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, start: int, end: int
    ) -> SavedCopy | None:
        """A copy that has the bytes from ``start`` to ``end`` as they are now."""
        for copy in _living(self._copies.get(storage._cdata)):
            if (
                copy.start <= start
                and end <= copy.end
                # Rounded, it is what was saved for this type alone.
                and (copy.encoding is None or copy.encoding.dtype is tensor.dtype)
                and copy.is_current(tensor, storage)
            ):
                return copy
        return None

    def _note(self, copy: SavedCopy) -> None:
        # What died held the address until then, and says nothing of who has it now.
        others = [weakref.ref(each) for each in _living(self._copies.get(copy.address))]
        reference = weakref.ref(copy)
        self._copies[copy.address] = [*others, reference] if others else reference
        if len(self._copies) > self._copies_max:
            self._copies = {key: each for key, each in self._copies.items() if _living(each)}
            self._copies_max = max(_COPIES_MIN, 2 * len(self._copies))

    def unpack(self, packed: SavedView | KeptTensor) -> torch.Tensor:
        """Backward needs what ``pack`` was given; may be asked for again, or never."""
        if isinstance(packed, KeptTensor):
            if packed.version is not None:
                check_version(packed.tensor, packed.tensor.shape, packed.version)
            return packed.tensor
        if packed.counter._version != packed.version:
            with lock:  # It may have been moved for a moment, by share_counter().
                check_version(packed.counter, packed.shape, packed.version)
        return packed.copy.device.restore(packed)

    def unpack_after_flush(self, packed: SavedView | KeptTensor) -> torch.Tensor:
        """As :meth:`unpack`, where nobody flushes at the end of forward."""
        if isinstance(packed, SavedView):
            packed.copy.device.departures.flush_pending()
        return self.unpack(packed)


#: Engines' devices in forked children: to take them apart would touch the parent's device.
_left_behind: list[object] = []


def _kept(counters: Counters, tensor: torch.Tensor) -> KeptTensor:
    counters.kept_tensors += 1
    return keep(tensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """An ordinary strided tensor, whose bytes are all that there is to it."""
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _living(
    references: weakref.ref[SavedCopy] | list[weakref.ref[SavedCopy]] | None,
) -> Sequence[SavedCopy]:
    if references is None:
        return ()
    return living(references if isinstance(references, list) else (references,))


def _is_dead(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]

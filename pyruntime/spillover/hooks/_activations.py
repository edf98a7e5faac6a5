"""``offload_activations``: saved tensors leave the device during forward and are back for backward.

The hooks are in ``_activation_engine``, the order of backward in ``_activation_order``, what
stands for a saved tensor in ``_saved_storage`` and the copies under way in ``_saved_transfers``,
whose note [Ordering of saved-tensor copies] has the design.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Literal, TypeVar

import torch
from torch import nn

from spillover._core import DiskStore, HostPool
from spillover._errors import ConfigError
from spillover._pinned import host_pool
from spillover._settings import enabled
from spillover._sources import register
from spillover._units import parse_bytes
from spillover.hooks._activation_engine import ActivationEngine, EngineOptions, PoolSource
from spillover.hooks._saved_transfers import finish_departures, lock, transfers

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Longer than any backlog that the byte budgets allow, so that a full queue does not block a hook.
_DISK_QUEUE_LENGTH = 4096

# How many pools, and how many stores, are kept that no context uses.
_IDLE_MAX = 2

_Resource = TypeVar("_Resource", HostPool, DiskStore)


class _Shared(Generic[_Resource]):
    """Pools or stores by what they were asked for: those in use, and the last few.

    A context that is made at each training step finds the pool of the step before, since pinned
    memory is too dear to be made again; contexts with ever different budgets leave nothing behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: weakref.WeakValueDictionary[Hashable, _Resource] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Hashable, _Resource] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Resource]) -> _Resource:
        """The resource for ``key`` in this process."""
        key = (os.getpid(), key)
        dropped: list[_Resource] = []  # They die after the lock was released.
        with self._lock:
            found = self._live.get(key)
            if found is None:
                found = self._live[key] = make()
            self._recent[key] = found
            self._recent.move_to_end(key)
            while len(self._recent) > _IDLE_MAX:
                dropped.append(self._recent.popitem(last=False)[1])
        return found


_pools: _Shared[HostPool] = _Shared()
_stores: _Shared[DiskStore] = _Shared()
# What was written counts against a limit for as long as the process lives.
_limited_stores: list[DiskStore] = []


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """What one ``offload_activations`` object moved since it was made.

    Attributes
    ----------
    host_bytes, disk_bytes
        Copied off the device, by where they were to stay.
    tensors
        Saved tensors that were offloaded, shared ones included.
    deduplicated_bytes
        Bytes of saved tensors that needed no copy, since an alias had been copied.
    kept_tensors
        Saved tensors that stayed where they were: small ones, parameters, CPU tensors.
    reloads, reloaded_bytes
        Copies back to the device.
    reloads_late
        Those that were started only when backward asked, so that compute had to wait.
    waits
        How often the host blocked, for a budget of copies under way or for the disk.
    """

    host_bytes: int
    disk_bytes: int
    tensors: int
    deduplicated_bytes: int
    kept_tensors: int
    reloads: int
    reloaded_bytes: int
    reloads_late: int
    waits: int


class OffloadedActivations(contextlib.ContextDecorator):
    """Made by :func:`offload_activations`; a context manager and a decorator.

    It can be entered any number of times, one inside the other and by several threads at once.
    """

    def __init__(self, engine: ActivationEngine | None, model: nn.Module | None) -> None:
        self._engine = engine
        self._model = model
        self._entered = threading.local()
        if engine is not None:
            register("activations", self, _read_stats)

    @property
    def stats(self) -> ActivationStats:
        """Figures of this moment; cheap, and does not wait for the device."""
        if self._engine is None:
            return ActivationStats(**dict.fromkeys(ActivationStats.__dataclass_fields__, 0))
        with lock:
            return ActivationStats(**vars(self._engine.counters))

    def _hooks(self) -> list[torch.autograd.graph.saved_tensors_hooks]:
        hooks: list[torch.autograd.graph.saved_tensors_hooks]
        hooks = self._entered.__dict__.setdefault("hooks", [])
        return hooks

    def __enter__(self) -> OffloadedActivations:
        engine = self._engine
        if engine is not None:
            with lock:
                transfers.collect()
            if self._model is not None:
                engine.keep_on_device(self._model)
            hooks = torch.autograd.graph.saved_tensors_hooks(engine.pack, engine.unpack)
            hooks.__enter__()
            self._hooks().append(hooks)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        engine = self._engine
        if engine is None:
            return
        self._hooks().pop().__exit__()
        if isinstance(error, torch.OutOfMemoryError):
            finish_departures()  # The program may try again with less.
            return
        with lock:
            transfers.collect()
        if error is None:
            with lock:
                engine.raise_errors()


def _read_stats(context: OffloadedActivations) -> ActivationStats:
    return context.stats


def offload_activations(
    *,
    tier: Literal["host", "disk"] = "host",
    directory: Folders | None = None,
    min_bytes: int | str = "256KiB",
    prefetch: int | str | None = None,
    inflight: int | str | None = None,
    host: int | str | HostPool | None = None,
    disk: DiskStore | None = None,
    write_limit: int | str | None = None,
    model: nn.Module | None = None,
) -> OffloadedActivations:
    """Keep the tensors that autograd saves for backward in pinned host memory or on disk.

    Use it around the forward pass (``with offload_activations(): loss = model(x)``) or as a
    decorator of a function that makes it. Gradients are equal to those without it, bit for bit.
    Backward may run inside or outside of the context, on any thread, more than once or never.

    Parameters
    ----------
    tier
        Where saved tensors live: ``"host"``, or ``"disk"`` with pinned memory as a staging area.
    directory
        For the disk tier: a folder or several, on different disks for their added speed. They are
        made if missing; the files in them have no names and go with the process.
    min_bytes
        Saved tensors over a storage of fewer bytes stay on the device.
    prefetch
        How many bytes backward brings back ahead of their use; also bounds what it holds for later
        uses. 0 brings back each tensor when it is asked for; any other budget brings at least one
        ahead. Where that finds no device memory, half of what there was room for is brought ahead
        from then on. By default 128 MiB, or a sixteenth of the device's memory if that is less.
    inflight
        How many bytes may be on their way out of the device, and how many from there to disk.
        Beyond it, the forward pass blocks until a copy is complete. By default 256 MiB, or a
        sixteenth of the device's memory if that is less.
    host
        Budget of pinned memory, or a pool to use. By default the process's pool
        (``SPILLOVER_HOST_LIMIT``). Contexts with equal budgets share one pool.
    disk
        A disk store to use instead of ``directory``.
    write_limit
        Bytes that may be written to ``directory`` by this process, to spare flash memory.
    model
        Its parameters and buffers are never offloaded. Without it, frozen weights and large buffers
        that autograd saves may be, which is wasteful; and buffers that forward changes in place, as
        the running statistics of a normalization of ``min_bytes`` or more, have to be excluded by
        it, since such a change is not ordered after the copy.

    Returns
    -------
    OffloadedActivations
        ``stats`` has the figures. With ``SPILLOVER=0`` it does nothing.

    Raises
    ------
    ConfigError
        An argument is wrong, or the disk tier has no folder.
    StorageError
        A folder cannot be used.
    HostOutOfMemory, DiskFull, StorageError
        Later, from forward or backward: a budget or a disk is exhausted, or a write failed. The
        tensors are still there, on the device or in pinned memory.
    CorruptData
        Later, from backward: a file's contents changed.
    RuntimeError
        Later, from backward: a saved tensor was changed in place, as without offloading.

    Notes
    -----
    Parameters and other leaves that require gradients, their views, CPU and sparse tensors and
    tensor subclasses stay as they are; so does what is saved while a CUDA graph is captured. Saved
    tensors inside of ``torch.utils.checkpoint`` regions are recomputed and not saved; the regions'
    inputs are offloaded. An inner pair of saved-tensor hooks, of this kind or another, replaces the
    outer one for what is saved inside of it, as always in torch.

    Copies run on two streams of the device. The bytes are a snapshot: an in-place change after they
    were saved makes backward raise, as without offloading, if the version counter shows it; a write
    through ``.data`` does not show there. Such a change is not ordered after the copy, either; what
    is changed after backward is.

    ``torch.compile`` is not supported: a compiled region saves its tensors its own way.
    """
    if tier not in ("host", "disk"):
        raise ConfigError(f"tier={tier!r} is not known; choose 'host' or 'disk'")
    if tier == "host" and (directory is not None or disk is not None or write_limit is not None):
        raise ConfigError("directory, disk and write_limit need tier='disk'")
    if tier == "disk" and (directory is None) == (disk is None):
        raise ConfigError("tier='disk' needs either directory= or disk=")
    if disk is not None and write_limit is not None:
        raise ConfigError("write_limit goes with directory=; give it to the DiskStore instead")
    if disk is not None and not isinstance(disk, DiskStore):
        raise ConfigError(f"disk must be a DiskStore, not {disk!r}; folders go to directory=")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not {model!r}")
    options = EngineOptions(
        min_bytes=parse_bytes(min_bytes, name="min_bytes"),
        prefetch_bytes=None if prefetch is None else parse_bytes(prefetch, name="prefetch"),
        inflight_bytes=None if inflight is None else parse_bytes(inflight, name="inflight"),
    )
    host_limit = None
    if host is not None and not isinstance(host, HostPool):
        host_limit = parse_bytes(host, name="host")
    folders = None if directory is None else _folders(directory)
    limit = None if write_limit is None else parse_bytes(write_limit, name="write_limit")
    if not enabled():
        return OffloadedActivations(None, None)
    if folders is not None:
        disk = _store(folders, limit)
    return OffloadedActivations(
        ActivationEngine(options, _pool_source(host, host_limit), disk), model
    )


def _pool_source(host: int | str | HostPool | None, limit_bytes: int | None) -> PoolSource:
    """Gives the pool when the first tensor is offloaded, and holds it as long as the context."""
    held: list[HostPool] = [host] if isinstance(host, HostPool) else []

    def pool() -> HostPool:
        if held:
            return held[0]
        if limit_bytes is None:
            return host_pool()  # Which knows of forks.
        held.append(_pools.get(limit_bytes, functools.partial(_make_pool, limit_bytes)))
        return held[-1]

    return pool


def _make_pool(limit_bytes: int) -> HostPool:
    return HostPool(limit_bytes=limit_bytes, device=torch.cuda.current_device())


def _folders(directory: Folders) -> tuple[str, ...]:
    given = [directory] if isinstance(directory, str | os.PathLike) else directory
    try:
        folders = [os.fspath(folder) for folder in given]
    except TypeError:
        folders = []
    # An empty path would be the working directory.
    if not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise ConfigError(f"directory must be a folder or a list of folders, not {directory!r}")
    return tuple(str(Path(folder).expanduser().absolute()) for folder in folders)


def _store(folders: tuple[str, ...], limit: int | None) -> DiskStore:
    def make() -> DiskStore:
        made = DiskStore(
            list(folders), write_limit_bytes=limit, queue_length_max=_DISK_QUEUE_LENGTH
        )
        if limit is not None:
            _limited_stores.append(made)
        return made

    return _stores.get((limit, folders), make)

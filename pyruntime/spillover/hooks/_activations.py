"""``offload_activations``: saved tensors leave the device during forward and are back for backward.

The hooks are in ``_activation_engine``. ``_activation_device`` has what one device saved, with
a note on the ordering of copies; ``_activation_departures`` and ``_activation_arrivals`` have these
copies, and ``_activation_account`` what is counted of them; ``_activation_order`` the order of a
step, ``_activation_budget`` how much may stay, ``_saved_storage`` what stands for a saved tensor,
``_activation_codec`` its smaller forms, and ``_activation_timeline`` the picture of it all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, cast, get_args

import torch
from torch import nn

from spillover._core import DiskStore, HostPool
from spillover._errors import ConfigError, StateError
from spillover._pinned import host_pool
from spillover._settings import enabled
from spillover._sources import register
from spillover._units import parse_bytes
from spillover.hooks._activation_account import Counters, lock
from spillover.hooks._activation_codec import Codec
from spillover.hooks._activation_device import EngineOptions
from spillover.hooks._activation_engine import ActivationEngine, Predicate
from spillover.hooks._activation_timeline import draw

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Function = TypeVar("Function", bound=Callable[..., Any])
Tier = Literal["auto", "host", "disk"]
Size = int | str

#: Longer than any backlog that the byte budgets allow, so that a full queue does not block a hook.
_DISK_QUEUE_LENGTH = 4096

#: How many engines, and how many stores, are kept that no context uses.
_IDLE_MAX = 2

_Resource = TypeVar("_Resource", ActivationEngine, DiskStore)


class _Shared(Generic[_Resource]):
    """Engines or stores by what they were asked for: those in use, and the last few.

    A context that is made at each training step finds what the step before has learnt; contexts
    with ever different budgets leave nothing behind.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._live: weakref.WeakValueDictionary[Hashable, _Resource] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Hashable, _Resource] = OrderedDict()

    def get(
        self, key: Hashable, make: Callable[[], _Resource], *, is_kept: bool = True
    ) -> _Resource:
        """The resource for ``key`` in this process; ``is_kept``: for who asks next, too."""
        key = (os.getpid(), key)
        dropped: list[_Resource] = []  # They die after the lock was released.
        with self._lock:
            found = self._live.get(key)
            if found is None:
                found = self._live[key] = make()
            if is_kept:
                self._recent[key] = found
                self._recent.move_to_end(key)
            while len(self._recent) > _IDLE_MAX:
                dropped.append(self._recent.popitem(last=False)[1])
        return found


_engines: _Shared[ActivationEngine] = _Shared()
_stores: _Shared[DiskStore] = _Shared()
#: What was written counts against a limit for as long as the process lives.
_limited_stores: list[DiskStore] = []


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """What was done for one ``offload_activations`` object since it was made.

    Contexts with equal options share an engine, so that figures of the disk and of stalls are of
    all of them that ran meanwhile.

    Attributes
    ----------
    tensors
        Saved tensors that were taken care of, shared ones included.
    kept_tensors
        Saved tensors that were left alone: small ones, parameters, CPU tensors.
    deduplicated_bytes
        Bytes of saved tensors that were aliases of what was saved already.
    stayed_bytes, offloaded_bytes
        Saved bytes that stayed on the device, and that left it.
    bytes_out, bytes_in
        Copied off the device and back; with a codec, fewer than were offloaded.
    disk_bytes_written, disk_bytes_read
        Of those, that went to disk and came from there.
    prefetch_hits, prefetch_misses
        How often backward found what had left on the device, or on its way there; and how often its
        copy started only then.
    saved_bytes_max
        The most bytes that were off the device at one time.
    stall_seconds
        How long threads of the program stood still, by cause: ``"copy"`` for device memory that
        copies out hold, ``"host_budget"`` for host memory, ``"disk"`` for the disk.
    """

    tensors: int
    kept_tensors: int
    deduplicated_bytes: int
    stayed_bytes: int
    offloaded_bytes: int
    bytes_out: int
    bytes_in: int
    disk_bytes_written: int
    disk_bytes_read: int
    prefetch_hits: int
    prefetch_misses: int
    saved_bytes_max: int
    stall_seconds: dict[str, float]


class OffloadedActivations(contextlib.ContextDecorator):
    """Made by :func:`offload_activations`; a context manager and a decorator.

    It can be entered any number of times, one inside the other and by several threads at once.
    """

    def __init__(self, engine: ActivationEngine | None, model: nn.Module | None) -> None:
        self._engine = engine
        self._model = model
        self._entered = threading.local()
        self._counters = Counters()
        self._before = _engine_figures(engine)
        if engine is not None:
            register("activations", self, OffloadedActivations.stats)

    def stats(self) -> ActivationStats:
        """Figures of this moment; cheap, and does not wait for the device."""
        written, read, stalls = _engine_figures(self._engine)
        written_before, read_before, stalls_before = self._before
        with lock:
            counters = self._counters
            return ActivationStats(
                tensors=counters.tensors,
                kept_tensors=counters.kept_tensors,
                deduplicated_bytes=counters.deduplicated_bytes,
                stayed_bytes=counters.stayed_bytes,
                offloaded_bytes=counters.offloaded_bytes,
                bytes_out=counters.sent_bytes,
                bytes_in=counters.reloaded_bytes,
                disk_bytes_written=written - written_before,
                disk_bytes_read=read - read_before,
                prefetch_hits=counters.prefetch_hits,
                prefetch_misses=counters.prefetch_misses,
                saved_bytes_max=counters.away_bytes_max,
                stall_seconds={
                    cause: seconds - stalls_before.get(cause, 0.0)
                    for cause, seconds in stalls.items()
                },
            )

    def plot(self, path: str | os.PathLike[str], *, rounds: int = 2) -> None:
        """Draw over time where saved tensors were: on the device, on their way out, off it.

        Needs ``timeline=True`` and matplotlib (``pip install spillover[plots]``). Times are the
        host's, which runs ahead of the device: of its monotonic clock or, under the emulator's
        virtual clock, of that one. Contexts of equal options share what was recorded.

        Parameters
        ----------
        path
            The picture to write; its suffix chooses the format.
        rounds
            How many of the last forwards, with their backwards, are drawn.

        Raises
        ------
        ConfigError
            matplotlib is missing, or does not know the format, or there is no such folder.
        StateError
            Nothing was recorded: without ``timeline=True``, or as no tensor was saved yet.
        """
        if rounds < 1:
            raise ConfigError(f"rounds must be a number from 1 on, not {rounds!r}")
        devices = self._engine.devices() if self._engine is not None else []
        with lock:
            panels = [
                (str(device.device), device.timeline.last_rounds(rounds))
                for device in devices
                if device.timeline is not None
            ]
        panels = [(name, points) for name, points in panels if points]
        if not panels:
            raise StateError(
                "there is nothing to draw: give timeline=True to offload_activations, and run a "
                "forward pass in the context"
            )
        draw(panels, Path(path))

    def __call__(self, func: Function) -> Function:
        """Decorate a function; a generator is in the context whenever it runs, as one forward.

        Raises ConfigError for a coroutine: what others do while it waits would be in the context.
        """
        if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise ConfigError(
                f"offload_activations cannot decorate {func.__name__}, a coroutine: others run "
                "while it waits; use a with statement around the forward pass in it"
            )
        if not inspect.isgeneratorfunction(func):
            return super().__call__(func)

        @functools.wraps(func)
        def run(*arguments: Any, **named: Any) -> Generator[Any, Any, Any]:
            return _run(self, func(*arguments, **named))

        return cast("Function", run)

    def _hooks(self) -> list[torch.autograd.graph.saved_tensors_hooks]:
        hooks: list[torch.autograd.graph.saved_tensors_hooks]
        hooks = self._entered.__dict__.setdefault("hooks", [])
        return hooks

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __enter__(self) -> OffloadedActivations:
        self._enter(begins_round=True)
        return self

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _entered_for(self, *, begins_round: bool) -> contextlib.ExitStack:
        """Entered by now, to be left."""
        self._enter(begins_round=begins_round)
        stack = contextlib.ExitStack()
        stack.push(self)
        return stack

    def _enter(self, *, begins_round: bool) -> None:
        engine = self._engine
        if engine is not None:
            entered = self._hooks()
            if not entered:
                if begins_round:
                    engine.begin_round()
                engine.collect()
            if self._model is not None:
                engine.keep_on_device(self._model)
            pack = functools.partial(engine.pack, self._counters)
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, engine.unpack)
            hooks.__enter__()
            entered.append(hooks)

    @torch._disable_dynamo  # type: ignore[attr-defined]
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
        try:
            try:
                if isinstance(error, torch.OutOfMemoryError):
                    engine.ran_out()  # The program may try again with less.
                else:
                    engine.collect()
            finally:
                engine.order_writes()
        except Exception:
            if error is None:
                raise


def _run(
    context: OffloadedActivations, generator: Generator[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """The generator, whose own code alone runs in the context."""
    act, value = generator.send, None
    begins_round = True
    while True:
        with context._entered_for(begins_round=begins_round):
            try:
                given = act(value)
            except StopIteration as end:
                return end.value
            finally:
                value = None  # An error that was thrown in holds what its frames do.
        begins_round = False
        try:
            act, value = generator.send, (yield given)
        except GeneratorExit:
            with context._entered_for(begins_round=False):
                generator.close()
            raise
        except BaseException as error:
            act, value = generator.throw, error


def _engine_figures(engine: ActivationEngine | None) -> tuple[int, int, dict[str, float]]:
    """Bytes written to disk and read from there, and seconds of stalls by cause."""
    stalls: dict[str, float] = {}
    written = read = 0
    for device in engine.devices() if engine is not None else ():
        stats = device.engine.stats()
        written += stats.written_bytes
        read += stats.read_bytes
        for cause, nanoseconds in stats.stall_ns.items():
            stalls[cause] = stalls.get(cause, 0.0) + nanoseconds / 1e9
    return written, read, stalls


def offload_activations(
    *,
    tier: Tier = "auto",
    directory: Folders | None = None,
    disk: DiskStore | None = None,
    host_budget: Size | None = None,
    keep_on_device: Size | None = None,
    in_flight_max: Size | None = None,
    prefetch: Size | None = None,
    min_bytes: Size = "256KiB",
    where: Predicate | None = None,
    model: nn.Module | None = None,
    codec: Codec | None = None,
    pool: HostPool | None = None,
    write_limit: Size | None = None,
    timeline: bool = False,
) -> OffloadedActivations:
    """Keep the tensors that autograd saves for backward in pinned host memory or on disk.

    Use it around the forward pass (``with offload_activations(): loss = model(x)``) or as a
    decorator of a function, or of a generator, that makes it. Gradients are equal to those without
    it, bit for bit. Backward may run inside or outside of the context, on any thread, more than
    once or never.

    In the first two steps all leaves, and memory is measured. From then on the tensors that
    backward asks for first stay on the device, as many as fit; where all fit nothing is copied.

    Parameters
    ----------
    tier
        ``"auto"``: pinned host memory, and the disk for what exceeds it, where there is one.
        ``"host"``: host memory alone. ``"disk"``: the disk, host memory being a staging area.
    directory
        For the disk: a folder or several, on different disks for their added speed. They are
        made if missing; the files in them have no names and go with the process.
    disk
        A disk store to use instead of ``directory``.
    host_budget
        The most pinned memory for saved tensors. By default what the pool allows.
    keep_on_device
        The most bytes of saved tensors that stay on the device. By default as much as fits, which
        is measured; 0 sends all away.
    in_flight_max
        How many bytes may be on their way out of the device. Beyond it, the forward pass blocks
        until a copy is complete. By default, what memory allows; while nothing was measured, or
        with ``keep_on_device``, 256 MiB, or a sixteenth of the device's memory if that is less.
    prefetch
        How many bytes backward brings back ahead of their use, in the order that earlier steps
        had. 0 brings back each tensor when it is asked for; any other budget brings at least one
        ahead. Where that finds no device memory, half of what there was room for is brought ahead
        from then on. By default, what memory allows; while nothing was measured, or with
        ``keep_on_device``, 128 MiB, or a sixteenth of the device's memory if that is less.
    min_bytes
        Saved tensors over a storage of fewer bytes are left alone.
    where
        Called with each saved tensor; where it gives false the tensor is left alone. It must not
        change or keep the tensor.
    model
        Its parameters and buffers are never offloaded. Without it, large buffers that autograd
        saves may be, which is wasteful; and buffers that forward changes in place, as the running
        statistics of a normalization of ``min_bytes`` or more, have to be excluded by it or by
        ``where``, since such a change is not ordered after the copy.
    codec
        None: bytes are moved as they are. ``"bfloat16"``: float32 is rounded to bfloat16, an error
        of at most 2^-8 of each value. ``"blockwise8"``: float32, bfloat16 and float16 become
        8-bit integers with a scale for each 256 values, an error of at most 1/254 of the greatest
        magnitude among them; blocks with NaN or infinity become NaN. Tensors that stay are exact.
    pool
        Pinned memory to use, such as one that was reserved ahead. By default the process's
        (``SPILLOVER_HOST_LIMIT``).
    write_limit
        Bytes that may be written to ``directory`` by this process, to spare flash memory.
    timeline
        Record what is where at each tensor, for :meth:`OffloadedActivations.plot`.

    Returns
    -------
    OffloadedActivations
        ``stats()`` has the figures. With ``SPILLOVER=0`` it does nothing.

    Raises
    ------
    ConfigError
        An argument is wrong, or ``tier="disk"`` has no folder.
    StorageError
        A folder cannot be used.
    HostOutOfMemory, DiskFull, StorageError
        Later, from forward or backward: a budget or a disk is exhausted, or the disk failed. The
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
    through ``.data`` does not show there. Within the context such a change is not ordered after the
    copy; what is changed after it is.

    Contexts of equal options share what they have learnt, also those that are made anew at each
    step; with ``disk``, ``pool`` or a new ``where`` function keep one context and enter it again.
    """
    if tier not in get_args(Tier):
        raise ConfigError(f"tier={tier!r} is not known; choose 'auto', 'host' or 'disk'")
    if tier == "host" and (directory is not None or disk is not None or write_limit is not None):
        raise ConfigError("directory, disk and write_limit need tier='auto' or tier='disk'")
    if directory is not None and disk is not None:
        raise ConfigError("give either directory= or disk=, not both")
    if tier == "disk" and directory is None and disk is None:
        raise ConfigError("tier='disk' needs either directory= or disk=")
    if tier == "disk" and host_budget is not None:
        raise ConfigError("tier='disk' keeps nothing in host memory; host_budget needs tier='auto'")
    if write_limit is not None and directory is None:
        raise ConfigError("write_limit goes with directory=; give it to the DiskStore instead")
    if disk is not None and not isinstance(disk, DiskStore):
        raise ConfigError(f"disk must be a DiskStore, not {disk!r}; folders go to directory=")
    if pool is not None and not isinstance(pool, HostPool):
        raise ConfigError(f"pool must be a HostPool, not {pool!r}; budgets go to host_budget=")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not {model!r}")
    if where is not None and not callable(where):
        raise ConfigError(f"where must be a function of a tensor, not {where!r}")
    if codec is not None and codec not in get_args(Codec):
        raise ConfigError(f"codec={codec!r} is not known; choose 'bfloat16' or 'blockwise8'")
    options = EngineOptions(
        min_bytes=parse_bytes(min_bytes, name="min_bytes"),
        host_bytes=0 if tier == "disk" else _bytes(host_budget, "host_budget"),
        keep_bytes=_bytes(keep_on_device, "keep_on_device"),
        in_flight_bytes=_bytes(in_flight_max, "in_flight_max"),
        prefetch_bytes=_bytes(prefetch, "prefetch"),
        codec=codec,
        has_timeline=bool(timeline),
    )
    folders = None if directory is None else _folders(directory)
    limit = _bytes(write_limit, "write_limit")
    if not enabled():
        return OffloadedActivations(None, None)

    def make() -> ActivationEngine:
        store = disk if folders is None else _store(folders, limit)
        return ActivationEngine(options, functools.partial(_pool, pool), store, where)

    # What the user gave is not kept alive for a context that may never come.
    is_ours = disk is None and pool is None and where is None
    engine = _engines.get((options, folders, limit, disk, pool, where), make, is_kept=is_ours)
    return OffloadedActivations(engine, model)


def _bytes(given: Size | None, name: str) -> int | None:
    return None if given is None else parse_bytes(given, name=name)


def _pool(given: HostPool | None) -> HostPool:
    return host_pool() if given is None else given  # Which knows of forks.


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

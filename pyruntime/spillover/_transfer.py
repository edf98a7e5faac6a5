"""Moves tensors' bytes between a device, pinned host memory and disks.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from spillover import _core
from spillover._closeable import Closeable
from spillover._errors import ConfigError, HostOutOfMemory, StateError, StorageError
from spillover._held import HeldTensor, HeldTensors
from spillover._pinned import host_pool
from spillover._sources import register
from spillover._transfer_stats import TransferStats
from spillover._units import parse_bytes

if TYPE_CHECKING:
    import torch

Size = int | str


class TransferTicket:
    """Completion of a transfer.

    It may be dropped at any time: the engine holds what the transfer works on. Methods may be
    called from any thread; in a forked child they raise :class:`StateError`.
    """

    __slots__ = ("_device", "_ticket")

    def __init__(self, ticket: _core.TransferTicket, device: torch.device) -> None:
        self._ticket = ticket
        self._device = device

    def done(self) -> bool:
        """Whether the transfer is over, well or not. Does not block or raise its error."""
        return self._ticket.done()

    def wait(self) -> None:
        """Block the host until the transfer is over.

        Raises
        ------
        StorageError, DriverError, HostOutOfMemory
            What went wrong, at each call. A fetch may be tried again.
        StateError
            The transfer was cancelled, or the engine closed before it began.
        """
        self._ticket.wait()

    def stream_wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Have what is put on ``stream`` from now on wait for the transfer.

        Does not wait for the copy itself. Blocks the host only until the copy has been *issued*: at
        once for bytes that the host has, and once they are read for those on disk.

        Parameters
        ----------
        stream
            By default the current stream of the engine's device.

        Raises
        ------
        StorageError, DriverError, HostOutOfMemory, StateError
            As :meth:`wait`; what is seen before the copy is issued. The stream records a graph.
        """
        self._ticket._stream_wait(_handle(stream, self._device))

    def cancel(self) -> bool:
        """Give the transfer up; False where it was over, or failed, before.

        Of a fetch, what is not yet on a stream is not done, and the target has undefined contents.
        Of a put, the payloads are dropped. Memory of copies under way is held until they are over.
        """
        return self._ticket.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether :meth:`cancel` came in time."""
        return self._ticket.is_cancelled


class TransferEngine(_core.TransferEngine, Closeable):
    """Moves payloads, the bytes of tensors, out of a device and back, asynchronously.

    :meth:`put` copies tensors to pinned memory. Where the host's budget is reached, payloads whose
    next use is farthest go on to the disk store. :meth:`fetch` brings them back from wherever they
    are. All copies of a device run on one stream out of it and one into it, shared by its engines.

    Parameters
    ----------
    device
        The device, by default the current one.
    host
        The most bytes of payloads in pinned memory, such as ``"8GiB"``. None: what ``pool`` allows.
        Less than ``staging``, also 0, means that payloads pass through ``staging`` to the disk.
    disk
        Where payloads go when the host's budget is reached. None: a put then raises
        :class:`HostOutOfMemory`. It must not be closed before the engine.
    pool
        Where pinned memory comes from; by default the process's pool, as ``SPILLOVER_HOST_LIMIT``
        limits it.
    chunk
        With a disk, larger payloads are cut into pieces of this size, so that the disk works on one
        while another is copied. Smaller payloads share batches of this size.
    staging
        Host memory for the passage to and from the disk: at least two chunks, and used even where
        ``host`` is less. Also the most bytes that are written ahead of need at one time.
    inflight
        Back-pressure: the most device memory that is held for copies out. A larger tensor goes
        alone.
    prefetch
        Bytes of the payloads used next that are brought from disk ahead of their :meth:`fetch`.
    resident
        The most device memory of tensors that are held (:meth:`hold`). None: what there is.

    Raises
    ------
    ConfigError
        An argument is wrong, or torch sees no CUDA device.
    DriverError
        There is no such device.
    ModuleNotFoundError
        PyTorch is not installed.

    Notes
    -----
    Methods may be called from any thread, and none holds the interpreter's lock while it waits.
    Memory that a copy out held goes back at the next call after the copy is over, or when
    :meth:`collect` is called: no thread waits for copies. A program without calls keeps it.

    With Spillover's allocator installed, an allocation that would fail first gets the memory of
    copies out that are under way, and of held tensors, those used farthest from now first.

    An engine is a context manager. At exit of the interpreter every engine is closed. In a forked
    child every call raises :class:`StateError`, and the parent's transfers go on.

    Examples
    --------
    >>> engine = TransferEngine(host="4GiB", disk=DiskStore("/nvme0/spill"))
    >>> payload, leaving = engine.put(activation)
    >>> del activation  # its memory is free once the copy is over
    >>> again = torch.empty(shape, device="cuda")
    >>> engine.fetch(payload, again).stream_wait()
    """

    def __init__(
        self,
        *,
        device: torch.device | int | str | None = None,
        host: Size | None = None,
        disk: _core.DiskStore | None = None,
        pool: _core.HostPool | None = None,
        chunk: Size = "16MiB",
        staging: Size = "64MiB",
        inflight: Size = "256MiB",
        prefetch: Size = "256MiB",
        resident: Size | None = None,
    ) -> None:
        self.device = _device(device)
        from spillover import _reclaim, _streams  # They import torch.

        self._held = HeldTensors(
            self, None if resident is None else parse_bytes(resident, name="resident")
        )
        super().__init__(
            host_pool() if pool is None else pool,
            disk,
            device=self.device.index,
            host_bytes_max=None if host is None else parse_bytes(host, name="host"),
            staging_bytes=parse_bytes(staging, name="staging"),
            chunk_bytes=parse_bytes(chunk, name="chunk"),
            leaving_bytes_max=parse_bytes(inflight, name="inflight"),
            prefetch_bytes=parse_bytes(prefetch, name="prefetch"),
        )
        _engines.add(self)
        register("transfers", self, TransferEngine.stats)
        _streams.copy_streams(self.device)  # So that their figures are in the statistics.
        _reclaim.offer(self.device, self)

    def put(
        self,
        tensor: torch.Tensor,
        *,
        next_use: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> tuple[_core.Payload, TransferTicket]:
        """Copy a tensor's bytes out of the device.

        Parameters
        ----------
        tensor
            Of the engine's device, dense: its elements fill one range of memory, in any order of
            the dimensions. It is held until the copy is over, and must not change before: have
            streams that write to it wait for the ticket.
        next_use
            When it will be fetched, as for :meth:`set_next_use`. None: not known, which counts as
            later than all that is.
        stream
            The stream that has written the tensor, by default the current one. The copy comes after
            what is on it now.

        Returns
        -------
        The payload, which may be fetched at once, and the ticket: done when the bytes have left the
        device.

        Raises
        ------
        HostOutOfMemory
            No host memory is free or can be made free.
        DiskFull, StorageError
            The disk that should have taken other payloads refuses. Those are untouched.
        ConfigError, StateError, DriverError
            The tensor cannot be copied; the stream records a graph; the engine is closed.

        Notes
        -----
        Blocks while copies out hold more than ``inflight``, and while host memory must be made
        free. Where it raises, nothing is kept.
        """
        payloads, ticket = self.put_all((tensor,), next_uses=(next_use,), stream=stream)
        return payloads[0], ticket

    def put_all(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        next_uses: Sequence[int | None] | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> tuple[list[_core.Payload], TransferTicket]:
        """Copy many tensors, each to a payload of its own; as :meth:`put`, all or nothing.

        Small ones share a batch, which costs less than a call each.
        """
        if next_uses is None:
            next_uses = [None] * len(tensors)
        sources = [
            (*self._range(tensor), _checked(next_use))
            for tensor, next_use in zip(tensors, next_uses, strict=True)
        ]
        payloads, ticket = self._put(sources, _handle(stream, self.device))
        return payloads, TransferTicket(ticket, self.device)

    def fetch(
        self,
        payload: _core.Payload,
        tensor: torch.Tensor,
        *,
        priority: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> TransferTicket:
        """Copy a payload's bytes to the device.

        Parameters
        ----------
        payload
            From this engine. It stays, and may be fetched again.
        tensor
            Dense, of the engine's device, of at least ``payload.size_bytes`` bytes. It is held
            until the copy is over, and has undefined contents before: streams that use it
            wait for the ticket.
        priority
            Of fetches that wait for the disk, the higher goes first. What is on a stream already
            stays in its order.
        stream
            The stream that used the tensor's memory last, by default the current one: that which it
            was allocated on. The copy comes after what is on it now.

        Raises
        ------
        StateError
            The payload was dropped; the stream records a graph; the engine is closed.
        HostOutOfMemory, StorageError, ConfigError, DriverError
            As :meth:`put`. What goes wrong later is the ticket's.

        Notes
        -----
        A payload that is still on its way out, or that both the host and the disk have, comes from
        the host. Blocks while not even one read from disk can get host memory.
        """
        return self.fetch_all(((payload, tensor),), priority=priority, stream=stream)

    def fetch_all(
        self,
        wanted: Iterable[tuple[_core.Payload, torch.Tensor]],
        *,
        priority: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> TransferTicket:
        """Copy many payloads, each to a tensor; as :meth:`fetch`, with one ticket."""
        targets = [(payload, self._range(tensor)) for payload, tensor in wanted]
        ticket = self._fetch(targets, _handle(stream, self.device), priority)
        return TransferTicket(ticket, self.device)

    def copy(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> TransferTicket:
        """Copy between a tensor of the device and a pinned one of the program's, of as many bytes.

        For state that lives in the program's own pinned memory of any origin. Both are held
        until the copy is over. Ordering is that of :meth:`put` and :meth:`fetch`; the host may
        read or write the pinned tensor after ``wait()``.
        """
        return self.copy_all(((target, source),), stream=stream)

    def copy_all(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> TransferTicket:
        """Copy many pairs of (target, source), all in one direction; one ticket."""
        is_out = bool(pairs) and not pairs[0][0].is_cuda
        rows = []
        for target, source in pairs:
            device, host = (source, target) if is_out else (target, source)
            address, size_bytes, owner = self._range(device)
            if not host.is_pinned():
                raise ConfigError("the host's tensor must be pinned, and all pairs go one way")
            if host.nbytes != size_bytes or not _is_dense(host):
                raise ConfigError(
                    f"the device's tensor has {size_bytes} bytes, and the host's {host.nbytes}; "
                    "they must be the same, and both dense"
                )
            rows.append((address, size_bytes, owner, host.data_ptr(), host.untyped_storage()))
        ticket = self._copy(rows, is_out, _handle(stream, self.device))
        return TransferTicket(ticket, self.device)

    def hold(
        self,
        tensor: torch.Tensor,
        *,
        next_use: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> HeldTensor:
        """Take care of a tensor that may leave the device when its memory is wanted.

        Unlike with :meth:`put`, nothing is copied before that: when ``resident`` is exceeded and,
        with Spillover's allocator, when an allocation would fail. What is used farthest from now
        gives way first.

        Parameters
        ----------
        tensor
            As for :meth:`put`; not to be changed while it is held. Its memory becomes free when it
            gives way and nobody else has a reference to its storage.
        next_use
            When it will be asked for, as for :meth:`set_next_use`. None: not known.
        stream
            The stream that has written the tensor, by default the current one.

        Returns
        -------
        What stands for it; ``get()`` and ``take()`` give the tensor.

        Raises
        ------
        HostOutOfMemory, DiskFull, StorageError
            Others must give way for ``resident``, and there is no place for them. They stay, and
            the tensor is the caller's still.
        ConfigError, StateError, DriverError
            As :meth:`put`.
        """
        import torch

        self._range(tensor)
        if stream is None:
            stream = torch.cuda.current_stream(self.device)
        return self._held.hold(tensor, _checked(next_use), stream)

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """Free device memory, about as much as is missing; bytes freed, 0 for none.

        Waits for just enough of the copies out that are under way, and then has held tensors give
        way. What Spillover's allocator calls before an allocation fails.
        """
        freed_bytes = 0
        try:
            freed_bytes = self._collect_bytes(missing_bytes)
            if freed_bytes < missing_bytes:
                demoted_bytes = self._held.demote(missing_bytes - freed_bytes)
                self._collect_bytes(demoted_bytes)
                freed_bytes += demoted_bytes
        except StateError:
            pass  # The engine is closed, or what holds memory records a graph.
        except (HostOutOfMemory, StorageError):
            if freed_bytes == 0:
                raise
        return freed_bytes

    def expect(self, payloads: Iterable[_core.Payload | HeldTensor]) -> None:
        """Say that ``payloads`` will be fetched next, in this order, from now on.

        Those that come first stay on the host or are brought there; those that come last, and first
        of all those that nobody expects, make room. A later call adds to what was said before; a
        fetch takes a payload out. Held tensors stay on the device likewise; ``get()`` takes them
        out.
        """
        first = max(self.position, self._expected) + 1
        for position, payload in enumerate(payloads, first):
            self.set_next_use(payload, position)
            self._expected = position
        self.advance(self.position)

    _expected = 0

    def set_next_use(self, payload: _core.Payload | HeldTensor, position: int | None) -> None:
        """Say when a payload is used next, by a growing number of the program's choosing.

        None: not known. For programs whose order is not that of :meth:`expect`'s calls;
        :meth:`advance` tells where they are.
        """
        if isinstance(payload, HeldTensor):
            self._held.set_next_use(payload, _checked(position))
        else:
            self._set_next_use(payload, _checked(position))

    def advance(self, position: int) -> None:
        """Say that the program is at ``position``, and start to read what is used after it."""
        super().advance(position)

    def collect(self, *, wait: bool = False) -> int:
        """Let go of what copies that are over have held; bytes of device memory let go of.

        With ``wait``, first waits for copies out that are under way: for who runs out of memory.
        """
        return super().collect(wait=wait)

    def synchronize(self) -> None:
        """Block the host until nothing is under way.

        Raises
        ------
        StorageError
            A write to disk failed, and nobody heard of it yet. The bytes are on the host.
        """
        super().synchronize()

    def stats(self) -> TransferStats:
        """Figures at this moment, also in :func:`spillover.stats`. Cheap; does not block."""
        held_bytes, demoted_bytes = self._held.stats()
        return TransferStats(
            device=self.device.index,
            held_bytes=held_bytes,
            demoted_bytes=demoted_bytes,
            **self._stats(),
        )

    def close(self) -> None:
        """Refuse new calls, fail what waits for the disk, and wait for copies under way.

        May be called again. Payloads give their memory back when they go.
        """
        super().close()
        _engines.discard(self)

    def _range(self, tensor: torch.Tensor) -> tuple[int, int, object]:
        """Address, bytes and what keeps them, of a tensor that can be copied as it is."""
        if not tensor.is_cuda or tensor.device != self.device:
            raise ConfigError(f"the tensor is on {tensor.device}; this engine is of {self.device}")
        if not _is_dense(tensor):
            raise ConfigError(
                f"the elements of this tensor of shape {tuple(tensor.shape)} do not fill one range "
                "of memory; pass tensor.contiguous()"
            )
        # The storage alone: a tensor would keep the graph that it came from, too.
        return tensor.data_ptr(), tensor.nbytes, tensor.untyped_storage()


def _checked(position: int | None) -> int | None:
    if position is not None and not 0 <= position < 1 << 63:
        raise ConfigError(f"a position must not be negative, or too large to count: {position}")
    return position


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one range of memory, each byte once."""
    import torch

    if tensor.layout is not torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _device(device: torch.device | int | str | None) -> torch.device:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            "spillover.TransferEngine needs PyTorch, which is not installed: 'pip install torch'",
            name="torch",
        ) from None

    if device is None:
        found = torch.device("cuda")
    else:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise ConfigError(f"device={device!r} is no CUDA device; write 0 or 'cuda:0'")
    if not torch.cuda.is_available():
        raise ConfigError(
            "a TransferEngine needs a CUDA device, and torch sees none; spillover.emulator gives "
            "one to try it on"
        )
    if found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _handle(stream: torch.cuda.Stream | None, device: torch.device) -> int:
    import torch

    if stream is None:
        # A tenth of what torch.cuda.current_stream() takes, which is half of a small transfer.
        return int(torch._C._cuda_getCurrentRawStream(device.index))
    if stream.device != device:
        raise ConfigError(f"the stream is of {stream.device}; this engine is of {device}")
    return int(stream.cuda_stream)


_engines: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


# Before the interpreter takes torch apart: memory must not go while a copy works on it.
atexit.register(_close_all)

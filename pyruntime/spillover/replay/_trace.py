"""A trace: allocations, frees and uses on other streams, in the order in which they happened."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spillover._errors import ConfigError

ALLOC, FREE, RECORD_STREAM = range(3)

#: ``spillover_replay_event`` of csrc/replay/c_api.h.
EVENT = np.dtype(
    [
        ("block", "<u8"),
        ("size_bytes", "<u8"),
        ("stream", "<u4"),
        ("thread", "<u2"),
        ("kind", "<u2"),
    ]
)

#: More threads than this share numbers: each is a real thread of the replay.
THREADS_MAX = 32
_SIZE_BYTES_MAX = 1 << 48


class TraceError(ConfigError):
    """A trace file is malformed; the message names the file and the place in it."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace in the form that the player takes.

    Parameters
    ----------
    name
        What results are called.
    events
        One an event, of dtype ``EVENT``. Blocks, streams and threads are numbered from 0; stream 0
        is the default stream.
    block_count, stream_count, thread_count
        How many of each there are.
    """

    name: str
    events: npt.NDArray[Any]
    block_count: int
    stream_count: int
    thread_count: int

    def live_bytes(self) -> npt.NDArray[np.int64]:
        """Requested bytes that are live after each event."""
        kinds, blocks = self.events["kind"], self.events["block"]
        sizes = np.zeros(self.block_count, np.int64)
        allocs, frees = kinds == ALLOC, kinds == FREE
        sizes[blocks[allocs]] = self.events["size_bytes"][allocs]
        change = np.zeros(len(self.events), np.int64)
        change[allocs] = self.events["size_bytes"][allocs]
        change[frees] = -sizes[blocks[frees]]
        return np.cumsum(change)

    @property
    def peak_bytes(self) -> int:
        """The most requested bytes that are live at one time."""
        live = self.live_bytes()
        return int(live.max()) if len(live) else 0


class TraceBuilder:
    """Makes a trace of events whose blocks, streams and threads have any names.

    ``place`` of each event is where it stands in its file, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._live: dict[Hashable, int] = {}
        self._streams: dict[Hashable, int] = {}
        self._threads: dict[Hashable, int] = {}
        self._block_count = 0

    def alloc(
        self,
        block: Hashable,
        size_bytes: int,
        *,
        stream: Hashable = None,
        thread: Hashable = None,
        place: str,
    ) -> None:
        """Add an allocation; a stream of None is the default stream."""
        if block in self._live:
            raise TraceError(f"{place}: block {block} is allocated already")
        if not 0 <= size_bytes <= _SIZE_BYTES_MAX:
            raise TraceError(f"{place}: {size_bytes} is not a size of a block")
        self._live[block] = self._block_count
        self._block_count += 1
        self._add(self._live[block], size_bytes, stream, thread, ALLOC)

    def free(self, block: Hashable, *, thread: Hashable = None, place: str) -> None:
        """Add a free."""
        self._add(self._number_of(block, place), 0, None, thread, FREE)
        del self._live[block]

    def record_stream(
        self, block: Hashable, stream: Hashable, *, thread: Hashable = None, place: str
    ) -> None:
        """Add a use of a block on another stream."""
        self._add(self._number_of(block, place), 0, stream, thread, RECORD_STREAM)

    def is_live(self, block: Hashable) -> bool:
        """Whether the block is allocated at this point."""
        return block in self._live

    def finish(self) -> Trace:
        """The trace of all events so far."""
        return Trace(
            name=self._name,
            events=np.array(self._rows, dtype=EVENT),
            block_count=self._block_count,
            stream_count=len(self._streams) + 1,
            thread_count=max(1, min(len(self._threads), THREADS_MAX)),
        )

    def _number_of(self, block: Hashable, place: str) -> int:
        number = self._live.get(block)
        if number is None:
            raise TraceError(f"{place}: block {block} is not allocated at this point")
        return number

    def _add(
        self, block: int, size_bytes: int, stream: Hashable, thread: Hashable, kind: int
    ) -> None:
        number = 0
        if stream is not None:
            number = self._streams.setdefault(stream, len(self._streams) + 1)
        worker = self._threads.setdefault(thread, len(self._threads)) % THREADS_MAX
        self._rows.append((block, size_bytes, number, worker, kind))

"""The two copy streams of a device, shared by everything that moves bytes to and from the host.

They are made once a device and live as long as the process, so that no training step creates a
stream. Any thread may ask for them. The compute stream is never kept here: callers ask torch for it
at each call, since a training loop may switch streams at any time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CopyStreams:
    """Streams of one device: ``copy_in`` host to device, ``copy_out`` device to host."""

    copy_in: torch.cuda.Stream
    copy_out: torch.cuda.Stream


_lock = threading.Lock()
_streams: dict[int, CopyStreams] = {}


def copy_streams(device: torch.device) -> CopyStreams:
    """The copy streams of ``device``, a CUDA device with an index."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        streams = _streams.get(index)
        if streams is None:
            streams = CopyStreams(copy_in=_new_stream(index), copy_out=_new_stream(index))
            _streams[index] = streams
        return streams


def new_event() -> torch.cuda.Event:
    """An event that orders work and takes no times."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _new_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]

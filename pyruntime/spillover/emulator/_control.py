"""Asks the emulated device what it saw, and tells it of accesses that it cannot see."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spillover._errors import ConfigError, SpilloverError
from spillover.emulator import _libraries

if TYPE_CHECKING:
    import torch

HostAccess = Literal["read", "write"]


@dataclass(frozen=True, kw_only=True)
class LiveResources:
    """What a program still holds on the emulated devices, from the driver's point of view."""

    device_bytes: int
    device_allocations: int
    pinned_bytes: int
    pinned_regions: int
    streams: int
    events: int


def hazards() -> list[str]:
    """Texts of the hazards found since the start or the last ``clear_hazards()``, oldest first.

    The first line of a text names both accesses with their operators and streams, and what would
    order them; further lines say which memory and operand, and where the program made both calls.
    """
    return _texts(_libraries.driver().spillover_emulator_hazard_text)


def _texts(function: Callable[[int, ctypes.Array[ctypes.c_char] | None, int], int]) -> list[str]:
    texts: list[str] = []
    for index in itertools.count():
        length = function(index, None, 0)
        if length == 0:
            return texts
        buffer = ctypes.create_string_buffer(length + 1)
        function(index, buffer, length + 1)
        texts.append(buffer.value.decode(errors="replace"))
    raise AssertionError


def leaks() -> list[str]:
    """What the process holds of the driver now, one text each, with the stack that made it.

    Device allocations and mappings, pinned memory, streams and events, from the driver's point of
    view: a caching allocator's segments count until ``torch.cuda.empty_cache()``. Empty where the
    checker is off.
    """
    return _texts(_libraries.driver().spillover_emulator_leak_text)


def release(token: int | str) -> None:
    """Hand what this thread knows of the device's work to whoever calls ``acquire(token)`` later.

    For synchronisation that the checker cannot see (a flag that is polled, a pipe, a C extension's
    queue): call it before the signal, and ``acquire`` with the same token after it was received.
    Python's own locks, queues, futures and threads need no annotation.

    Parameters
    ----------
    token
        Names the signal; any number or text.
    """
    _libraries.driver().spillover_emulator_release(_token(token))


def acquire(token: int | str) -> None:
    """Take over what other threads knew when they called ``release(token)``."""
    _libraries.driver().spillover_emulator_acquire(_token(token))


def _token(token: int | str) -> int:
    return hash(token) & (2**63 - 1) | 1 << 63


def clear_hazards() -> None:
    """Forget the hazards found so far."""
    _libraries.driver().spillover_emulator_hazards_clear()


def live() -> LiveResources:
    """What the process holds now; use it to find leaks."""
    values = [ctypes.c_size_t() for _ in range(6)]
    _libraries.driver().spillover_emulator_live(*[ctypes.byref(value) for value in values])
    device_bytes, device_allocations, pinned_bytes, pinned_regions, streams, events = (
        value.value for value in values
    )
    return LiveResources(
        device_bytes=device_bytes,
        device_allocations=device_allocations,
        pinned_bytes=pinned_bytes,
        pinned_regions=pinned_regions,
        streams=streams,
        events=events,
    )


def peak_bytes(device: int = 0) -> int:
    """Highest number of bytes that the driver ever handed out on ``device`` at one time."""
    return int(_libraries.driver().spillover_emulator_peak_bytes(device))


def host_access(tensor: torch.Tensor, *, kind: HostAccess, name: str = "host code") -> None:
    """Tell the checker that the CPU reads or writes a pinned tensor by other means than torch.

    Operators of torch on CPU tensors and ``tolist()`` are seen without this; ``torch.save``, NumPy
    views, ctypes and other libraries are not.

    Parameters
    ----------
    tensor
        A contiguous CPU tensor; memory that is not pinned is ignored.
    kind
        ``"read"`` or ``"write"``.
    name
        Appears in the text of a hazard.

    Raises
    ------
    ConfigError
        The tensor is not a contiguous CPU tensor.
    SpilloverError
        The policy is ``raise`` and the access is not ordered after work of a stream.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ConfigError("host_access() takes a contiguous CPU tensor")
    if kind not in ("read", "write"):
        raise ConfigError(f"kind={kind!r} is not known; choose read or write")
    library = _libraries.driver()
    access = _libraries.Range(
        tensor.data_ptr(), tensor.numel() * tensor.element_size(), int(kind == "write")
    )
    if library.spillover_emulator_host_access(name.encode(), ctypes.byref(access), 1) != 0:
        raise SpilloverError(library.spillover_emulator_last_hazard().decode())

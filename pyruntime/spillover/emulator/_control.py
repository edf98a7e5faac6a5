"""Asks the emulated device what it saw, and tells it of accesses that it cannot see."""

from __future__ import annotations

import ctypes
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

    Each text names both accesses with their operators and streams, and what would order them.
    """
    library = _libraries.driver()
    texts = []
    for index in range(library.spillover_emulator_hazard_count()):
        length = library.spillover_emulator_hazard_text(index, None, 0)
        if length == 0:
            break
        buffer = ctypes.create_string_buffer(length + 1)
        library.spillover_emulator_hazard_text(index, buffer, length + 1)
        texts.append(buffer.value.decode())
    return texts


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

"""Settings of the pools, by keyword; the environment variable has the same keys."""

from __future__ import annotations

import os
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from spillover import _core
from spillover._errors import ConfigError
from spillover.allocator import _pool

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Settings(TypedDict, total=False):
    """What can be set about a pool; see :func:`configure`."""

    limit: int | str | None
    fraction: float
    wait_max: float | str
    virtual_memory: Literal["auto", "on", "off"]
    unmapped_max: int | str | None
    thread_cache: bool
    check_every: int


# The keys that were set for every device by a call.
_named: set[str] = set()


def configure(*, device: int | None = None, **settings: Unpack[Settings]) -> None:
    """Change settings of the pools; those that are not named keep their values.

    ``SPILLOVER_ALLOCATOR="limit=20GiB,wait_max=30s"`` in the environment does the same before the
    first pool is made. Either everything is changed or, with an error, nothing; but idle memory
    that went to the driver before the error is gone.

    Parameters
    ----------
    device
        Index of a CUDA device; by default every device, those too whose pool is made later.
    limit
        Bytes that a pool may hold, or a text such as ``"20GiB"``; None is no limit. When it falls
        below what is held, idle memory goes back at once and live blocks stay.
    fraction
        The same as a share of the device's memory, 0 to 1; the smaller one counts.
    wait_max
        Seconds, or a text such as ``"500ms"``, that an allocation waits for memory which streams
        still use before it fails; default 60.
    virtual_memory
        ``"auto"`` maps memory where the device can, ``"on"`` demands it, ``"off"`` takes memory at
        fixed addresses, with more fragmentation. Fixed once the device's pool is made.
    unmapped_max
        Bytes of idle memory that a pool keeps without an address, where it is quickest to use
        again; None (the default) is all of it.
    thread_cache
        Whether threads keep freed blocks for themselves, so that most allocations take no lock;
        default True. Fixed once the device's pool is made.
    check_every
        Number of calls between two walks of :func:`check_invariants`, for debugging; 0 (the
        default) is never. A broken invariant stops the process.

    Raises
    ------
    ConfigError
        A key is unknown (the message names the nearest one), or a value is not understood.
    StateError
        A setting cannot change any more.
    DriverError
        The driver failed to take back memory above a new limit.
    """
    apply(device, settings)


def apply(device: int | None, settings: Settings) -> None:
    """As :func:`configure`."""
    text = ",".join(f"{key}={_text(key, value)}" for key, value in settings.items())
    if device is None:
        _core.configure(text, "spillover.allocator")
        _named.update(settings)
    else:
        _core.configure(text, "spillover.allocator", _pool.device_index(device))


def is_named(key: str) -> bool:
    """Whether a setting of every device was given by a call or in the environment."""
    text = os.environ.get("SPILLOVER_ALLOCATOR", "")
    return key in _named or key in (entry.split("=")[0].strip() for entry in text.split(","))


def _text(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{Decimal(repr(value)):f}"  # all of it, and never with an exponent
    if not isinstance(value, int | str):
        raise ConfigError(f"{key}={value!r} is not understood; a setting is a number or a text")
    if "," in (text := str(value)):
        raise ConfigError(
            f"{key}={value!r} is more than one setting; give each one by its own keyword"
        )
    return text

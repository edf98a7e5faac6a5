"""Byte counts as people write them: ``"20GiB"``, ``"512 MB"``, ``1 << 30``."""

from __future__ import annotations

import re

from spillover._errors import ConfigError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
# What C counts bytes in, with a sign; a larger one would arrive there as another number.
_BYTES_MAX = (1 << 63) - 1
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: int | str, *, name: str = "size") -> int:
    """Number of bytes in ``value``; ``GB`` is 10**9 and ``GiB`` is 2**30.

    Parameters
    ----------
    value
        An int of bytes, or a text with an optional unit: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.
    name
        What the number is, for the message of an error.

    Raises
    ------
    ConfigError
        ``value`` is negative, above 2**63 - 1, or is not such a text.
    """
    size_bytes = _read(value, name)
    if size_bytes > _BYTES_MAX:
        raise ConfigError(f"{name} must be less than 8 EiB")
    return int(size_bytes)


def _read(value: int | str, name: str) -> float:
    """The number as it is written; infinite where it has more digits than a float."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{name} must be bytes or a text such as '20GiB', not {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
        return value
    match = _PATTERN.fullmatch(value)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS:
        raise ConfigError(
            f"{name}={value!r} is not a size; "
            "write a number with a unit, such as '20GiB' or '512MB'"
        )
    return float(match.group(1)) * _UNITS[unit]


def format_bytes(size_bytes: float) -> str:
    """``size_bytes`` in binary units with two decimals, such as ``'1.50 GiB'``."""
    if size_bytes < 1024:
        return f"{int(size_bytes)} B"
    value = size_bytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"

"""Reads and writes files of traces, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from spillover._errors import ConfigError


def require_place(name: str, path: str | os.PathLike[str]) -> Path:
    """``path`` in full, if a file can be put there.

    Raises
    ------
    ConfigError
        It cannot; said now, not at the end of a run.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(f"{name} must be the path of a file, not {path!r}")
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        raise ConfigError(f"{name}={str(path)!r} is a folder; name a file in it")
    if not place.parent.is_dir():
        raise ConfigError(f"{name}={str(path)!r}: there is no folder {str(place.parent)!r}")
    if not os.access(place.parent, os.W_OK):
        raise ConfigError(f"{name}={str(path)!r}: {str(place.parent)!r} cannot be written to")
    return place


def write_file(path: Path, data: bytes) -> None:
    """Put ``data`` into place at once, compressed where the name ends in ``.gz``."""
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=3)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_trace(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A Chrome trace as an object with ``traceEvents``.

    Raises
    ------
    ConfigError
        The file holds something else.
    """
    data = Path(path).read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        trace = json.loads(data.decode(errors="replace"))
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(
            f"{os.fspath(path)!r} is not a trace in Chrome's format: {error}"
        ) from None
    if isinstance(trace, list):  # The format's other form.
        trace = {"traceEvents": trace}
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise ConfigError(f"{os.fspath(path)!r} is not a trace in Chrome's format: no traceEvents")
    return trace

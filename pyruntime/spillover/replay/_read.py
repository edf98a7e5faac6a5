"""Reads trace files: our csv, torch's memory snapshots and RMM's logs, gzip-compressed or not."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from spillover.replay._snapshot import read_snapshot
from spillover.replay._trace import Trace, TraceBuilder, TraceError

_GZIP_MAGIC = b"\x1f\x8b"
#: The first byte of every pickle of protocol 2 or later.
_PICKLE_MAGIC = b"\x80"
_RMM_HEADER = ["Thread", "Time", "Action", "Pointer", "Size", "Stream"]
#: Our csv may begin with as many of these as its lines have fields.
_OWN_HEADER = ["op", "id", "bytes", "stream", "thread"]
_DEFAULT_STREAMS = ("", "0", "0x0", "(nil)")


def read_trace(path: Path | str, *, device: int = 0) -> Trace:
    """Read a trace file of any supported form, told apart by what is in it.

    Parameters
    ----------
    path
        Our csv (``alloc,<id>,<bytes>``, ``free,<id>,``), a pickle that
        ``torch.cuda.memory._dump_snapshot`` wrote (no code in it is ever executed), or a log of
        RMM's ``logging_resource_adaptor``.
    device
        Which device's events of a snapshot; the other forms have one device.

    Raises
    ------
    TraceError
        The file is missing or malformed; the message names the file and the place in it.
    """
    path = Path(path)
    content = _content_of(path)
    if not content.strip():
        raise TraceError(f"{path}: the file is empty")
    name = path.name.removesuffix(".gz")
    builder = TraceBuilder(name.rsplit(".", 1)[0] if "." in name else name)
    if content.startswith(_PICKLE_MAGIC):
        return read_snapshot(content, builder, path=path, device=device)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: neither text nor a pickle ({error.reason})") from None
    rows = _rows_of(text, path)
    first = next(rows, None)
    if first is None:
        raise TraceError(f"{path}: the file has no events")
    if first[1] == _RMM_HEADER:
        _add_rmm_rows(builder, rows, path)
    else:
        if first[1] != _OWN_HEADER[: len(first[1])]:
            _add_own_row(builder, first[1], f"{path}:{first[0]}")
        for line, row in rows:
            _add_own_row(builder, row, f"{path}:{line}")
    return builder.finish()


def _content_of(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(f"{path}: cannot be read: {reason}") from None


def _rows_of(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not empty or a comment."""
    reader = csv.reader(text.splitlines())
    try:
        for row in reader:
            if row and not row[0].startswith("#"):
                yield reader.line_num, [field.strip() for field in row]
    except csv.Error as error:
        raise TraceError(f"{path}:{reader.line_num}: {error}") from None


def _stream_of(text: str) -> str | None:
    return None if text in _DEFAULT_STREAMS else text


def _add_own_row(builder: TraceBuilder, row: list[str], place: str) -> None:
    if len(row) > len(_OWN_HEADER):
        raise TraceError(f"{place}: a line has {len(_OWN_HEADER)} fields at most, not {len(row)}")
    kind, block, size, stream, thread = (*row, *[""] * (len(_OWN_HEADER) - len(row)))
    if not block:
        raise TraceError(f"{place}: the block has no id")
    if kind == "alloc":
        size_bytes = _number(size, "bytes", place)
        builder.alloc(block, size_bytes, stream=_stream_of(stream), thread=thread, place=place)
    elif kind == "free":
        builder.free(block, thread=thread, place=place)
    elif kind == "record_stream":
        builder.record_stream(block, _stream_of(stream), thread=thread, place=place)
    else:
        raise TraceError(f"{place}: {kind!r} is not one of alloc, free and record_stream")


def _number(text: str, what: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise TraceError(f"{place}: {text!r} is not a number of {what}") from None


def _add_rmm_rows(builder: TraceBuilder, rows: Iterator[tuple[int, list[str]]], path: Path) -> None:
    for line, row in rows:
        place = f"{path}:{line}"
        if len(row) != len(_RMM_HEADER):
            raise TraceError(
                f"{place}: a line of an RMM log has {len(_RMM_HEADER)} fields, not {len(row)}"
            )
        thread, _, action, pointer, size, stream = row
        if action == "allocate":
            size_bytes = _number(size, "bytes", place)
            if size_bytes == 0 and builder.is_live(pointer):
                continue  # every empty block is the same null pointer
            builder.alloc(
                pointer, size_bytes, stream=_stream_of(stream), thread=thread, place=place
            )
        elif action in ("free", "deallocate"):
            # What was allocated before the log began is not in the trace.
            if builder.is_live(pointer):
                builder.free(pointer, thread=thread, place=place)
        elif action != "allocate failure":
            raise TraceError(f"{place}: {action!r} is not an action of an RMM log")

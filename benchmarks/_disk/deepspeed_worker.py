"""DeepSpeed's async_io in a process of its own; commands on stdin, a JSON line for each.

``move DIRECTION BLOCK_BYTES DEPTH THREADS BYTES FILE`` answers seconds, ``full FOLDER`` and
``unaligned FOLDER`` what a write there returned and what then lay in the file.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

_PAYLOAD_BYTES = 64 << 20


def main() -> None:
    """Serve until the input ends."""
    # What is printed while the operator is compiled and loaded is not an answer.
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        library = AsyncIOBuilder().load(verbose=False)
        handle = library.aio_handle()
        example = torch.empty(0, dtype=torch.uint8)
        tensors = [handle.new_cpu_locked_tensor(_PAYLOAD_BYTES, example) for _ in range(4)]
        for tensor in tensors:
            tensor.random_()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "move":
            answer = _move(library, tensors, *arguments)
        else:
            answer = _write(library, handle, tensors[0], command, Path(arguments[0]))
        print(json.dumps(answer), flush=True)


def _move(library: Any, tensors: list[Any], direction: str, *rest: str) -> float:
    block_bytes, depth, threads, size_bytes = map(int, rest[:4])
    handle = library.aio_handle(block_bytes, depth, False, True, threads)
    move = handle.async_pwrite if direction == "write" else handle.async_pread
    start = time.perf_counter()
    for first in range(0, size_bytes, len(tensors) * _PAYLOAD_BYTES):
        offsets = range(first, size_bytes, _PAYLOAD_BYTES)
        for tensor, offset in zip(tensors, offsets, strict=False):
            if move(tensor, rest[4], offset) != 0:
                raise RuntimeError(f"async_io refused a {direction} at {offset}")
        handle.wait()
    return time.perf_counter() - start


def _write(
    library: Any, handle: Any, tensor: Any, what: str, folder: Path
) -> dict[str, str | int | bool]:
    """One write of 4 MiB into a folder with less room, or of 1000 bytes."""
    size_bytes = 4 << 20 if what == "full" else 1000
    data = handle.new_cpu_locked_tensor(size_bytes, tensor)
    data.random_(1, 255)
    file = folder / "written_by_deepspeed"
    result: dict[str, str | int | bool] = {"bytes": size_bytes}
    try:
        result["returned"] = handle.sync_pwrite(data, str(file))
    except Exception as error:
        result["raised"] = f"{type(error).__name__}: {error}"
    stored = file.read_bytes() if file.exists() else b""
    file.unlink(missing_ok=True)
    result["stored_bytes"] = len(stored)
    result["is_right"] = stored == bytes(data.numpy())
    return result


if __name__ == "__main__":
    main()

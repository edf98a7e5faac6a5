"""DeepSpeed's async_io, where it is installed and builds: its rates, and what it does not say."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
# By its name: started by its path, it would find this file in place of the library.
_WORKER = "benchmarks._disk.deepspeed_worker"


class DeepSpeedError(Exception):
    """It is not there, or does not build or work; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Options of its ``aio_handle`` that matter for rates."""

    block_bytes: int
    depth: int
    threads: int


class DeepSpeed:
    """A process with async_io and a file of its own in the folder; a context manager."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise DeepSpeedError("deepspeed is not installed ('pip install deepspeed', libaio-dev)")
        self._file = folder.resolve() / f".spillover-deepspeed-{uuid.uuid4().hex}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Its build calls ninja by name.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        try:
            self._answer()
        except DeepSpeedError:
            self.close()
            raise

    def seconds(self, direction: str, setting: Setting, size_bytes: int) -> float:
        """Time to move the file's first ``size_bytes``, in payloads of 64 MiB, four at once."""
        found = self._ask(
            *("move", direction, setting.block_bytes, setting.depth, setting.threads),
            *(size_bytes, self._file),
        )
        return float(found)

    def defects(self) -> dict[str, dict[str, Any] | str]:
        """What a write that cannot fit, and one of 1000 bytes, returned and stored."""
        found: dict[str, dict[str, Any] | str] = {}
        with tempfile.TemporaryDirectory(dir=self._file.parent) as place:
            found["unaligned"] = self._ask("unaligned", place)
            with _small_disk(Path(place)) as problem:
                found["full"] = problem or self._ask("full", place)
        return found

    def close(self) -> None:
        """End the process and remove its file."""
        self._process.communicate()
        self._log.close()
        self._file.unlink(missing_ok=True)

    def _ask(self, *command: object) -> Any:
        assert self._process.stdin is not None
        print(*command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        raise DeepSpeedError(f"async_io does not work here: {last}")

    def __enter__(self) -> DeepSpeed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[str]:
    """A file system of 1 MiB there, or the reason why not."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        yield f"cannot mount a small file system: {error}"
        return
    if done.returncode != 0:
        yield f"cannot mount a small file system: {done.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)

"""The disk at its best: a compiled loop over one file, and fio where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (
    "benchmarks/_disk/raw.cpp",
    "csrc/tiers/io_uring.cpp",
    "csrc/base/crc32c.cpp",
    "csrc/base/file_descriptor.cpp",
    "csrc/base/check.cpp",
)


@dataclass(frozen=True)
class Way:
    """How a loop goes: ``threads`` or ``io_uring``, how many blocks at once, of which size.

    ``io_uring_sums`` computes a checksum of each.
    """

    engine: str
    depth: int
    block_bytes: int


class RawDisk:
    """A process that moves bytes of files that are open here; a context manager.

    Disks give different rates in different places, so it works on the very files of the store.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._build = tempfile.TemporaryDirectory()
        program = Path(self._build.name) / "raw"
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-pthread"]
        command += ["-I", str(_ROOT / "csrc"), *(str(_ROOT / name) for name in _SOURCES)]
        subprocess.run([*command, "-o", str(program)], check=True)
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            text=True,
        )

    def seconds(self, direction: str, way: Way, size_bytes: int, descriptor: int) -> float:
        """Time to move the first ``size_bytes`` of the file, whole blocks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(
            *(direction, way.engine, way.depth, way.block_bytes, size_bytes, descriptor),
            file=self._process.stdin,
            flush=True,
        )
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the raw loop ended: {direction} {way}")
        return float(line)

    def __enter__(self) -> RawDisk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()
        self._build.cleanup()


def fio_gb_s(direction: str, folder: Path, way: Way, size_bytes: int) -> float | str:
    """What fio gets the same way, or why it cannot be asked."""
    if shutil.which("fio") is None:
        return "fio is not installed"
    name = f".spillover-fio-{uuid.uuid4().hex}"
    command = ["fio", f"--name={name}", f"--directory={folder}", f"--rw={direction}", "--direct=1"]
    command += [f"--bs={way.block_bytes}", f"--size={size_bytes}", "--output-format=json"]
    command += [f"--ioengine={'io_uring' if way.engine == 'io_uring' else 'psync'}"]
    depth = f"--iodepth={way.depth}" if way.engine == "io_uring" else f"--numjobs={way.depth}"
    result = subprocess.run([*command, depth], capture_output=True, text=True, check=False)
    for file in folder.glob(f"{name}*"):
        file.unlink()
    if result.returncode != 0:
        return f"fio ended with {result.returncode}: {result.stderr.strip()[:200]}"
    jobs = json.loads(result.stdout)["jobs"]
    return float(sum(job[direction]["bw_bytes"] for job in jobs)) / 1e9

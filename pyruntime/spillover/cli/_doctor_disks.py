"""What ``spillover doctor`` says of disks, io_uring and GPUDirect Storage."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from spillover._disk import DiskStore
from spillover._errors import StorageError
from spillover._units import format_bytes
from spillover.cli import _gpu_direct
from spillover.cli._doctor_part import Fact, Part


def parts(folders: list[Path]) -> list[Part]:
    """Each folder, io_uring, and GPUDirect Storage in the first folder that works."""
    disks = [_disk(folder) for folder in folders]
    usable = [folder for folder, part in zip(folders, disks, strict=True) if part.state != "fails"]
    direct = [_direct(usable[0])] if usable else []
    return [*disks, _io_uring(), *direct]


def _disk(folder: Path) -> Part:
    name = f"disk {folder}"
    if not folder.is_dir():
        return Part(name, "fails", "there is no such folder; a disk store would make it")
    try:
        with DiskStore(folder) as store:
            stats = store.stats()
    except StorageError as error:
        return Part(name, "fails", str(error), {"errno": error.errno})
    free_bytes = shutil.disk_usage(folder).free
    unnamed = _has_unnamed_files(folder)
    access = "O_DIRECT" if stats.is_direct else "buffered: the file system refuses O_DIRECT"
    notes = f" ({stats.engine_notes})" if stats.engine_notes else ""
    detail = f"engine {stats.engine}{notes}; {access}; {format_bytes(free_bytes)} free"
    if not unnamed:
        detail += "; files have a name until they are open (docs/disk.md)"
    facts: dict[str, Fact] = {
        "engine": stats.engine,
        "engine_notes": stats.engine_notes,
        "is_direct": stats.is_direct,
        "free_bytes": free_bytes,
        "unnamed_files": unnamed,
    }
    return Part(name, "works" if stats.is_direct else "limited", detail, facts)


def _has_unnamed_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600))
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)
    return True


def _io_uring() -> Part:
    try:
        with DiskStore(tempfile.gettempdir(), engine="io_uring") as store:
            notes = store.stats().engine_notes
    except StorageError as error:
        return Part("io_uring", "limited", f"threads stand in: {error}")
    return Part("io_uring", "limited" if notes else "works", notes or "with registered buffers")


def _direct(folder: Path) -> Part:
    """Asks a process of its own: the library writes logs where it is, and may not come back."""
    name = "GPUDirect Storage"
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", _gpu_direct.__name__, str(folder.absolute())]
        try:
            result = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            return Part(name, "missing", "off: the probe did not end within a minute")
    answer = _gpu_direct.parse(result.stdout)
    if answer is None:
        lines = result.stderr.strip().splitlines() or ["it said nothing"]
        detail = f"off: the probe ended with {result.returncode}: {lines[-1]}"
        return Part(name, "missing", detail, {"works": False, "version": 0})
    works, version, reason = answer
    facts: dict[str, Fact] = {"works": works, "version": version}
    if not works:
        return Part(name, "missing", f"off: {reason}", facts)
    return Part(name, "works", "off: it would work; the disk tier does not use it yet", facts)

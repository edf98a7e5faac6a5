"""Machines that a test describes by files of its own, in place of /proc and /sys."""

from __future__ import annotations

from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def write(root: Path, name: str, text: str) -> None:
    """A file of the machine, such as ``proc/meminfo``."""
    file = root / name.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def set_memory(root: Path, available: int, total: int = 64 * GIB) -> None:
    """What /proc/meminfo says, in bytes."""
    text = f"MemTotal: {total // KIB} kB\nMemFree: 1 kB\nMemAvailable: {available // KIB} kB\n"
    write(root, "proc/meminfo", text)


def set_group(root: Path, limit: int, used: int, group: str = "/job") -> None:
    """A memory control group (version 2) with the process in it."""
    write(root, "proc/self/cgroup", f"0::{group}\n")
    folder = f"sys/fs/cgroup{group.rstrip('/')}"
    write(root, f"{folder}/memory.max", f"{limit}\n")
    write(root, f"{folder}/memory.current", f"{used}\n")

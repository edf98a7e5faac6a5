"""What ``spillover doctor`` says of host memory. Reads files under /proc and /sys."""

from __future__ import annotations

import re
import resource
from pathlib import Path

from spillover import _core
from spillover._units import format_bytes
from spillover.cli._doctor_part import Part

_CAP_IPC_LOCK = 14

#: What io_uring's own buffers take of a disk store with one folder.
_LOCKED_BYTES_MIN = 4 << 20


def parts() -> list[Part]:
    """Memory and its limits, the limit on locked memory, huge pages and NUMA nodes."""
    return [_memory(), _locked_memory(), _huge_pages(), _numa_nodes()]


def _memory() -> Part:
    total_bytes = _meminfo().get("MemTotal", 0)
    available_bytes, source = _core.available_host_memory()
    limit_bytes = control_group_limit()
    limit = "none" if limit_bytes is None else format_bytes(limit_bytes)
    return Part(
        "host memory",
        "works",
        f"{format_bytes(total_bytes)}, {format_bytes(available_bytes)} of it available to this "
        f"process by {source}; control group's limit: {limit}",
        {
            "total_bytes": total_bytes,
            "available_bytes": available_bytes,
            "control_group_limit_bytes": limit_bytes,
        },
    )


def _meminfo() -> dict[str, int]:
    rows = re.findall(r"^(\w+): +(\d+)( kB)?$", _read(Path("/proc/meminfo")), re.MULTILINE)
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in rows}


def control_group_limit() -> int | None:
    """The least limit on memory of the process's control groups (version 1 or 2), in bytes."""
    limits = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", "memory" if controllers else "")
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        # A container may see its own group at the root in place of the path.
        for folder in (Path(group), *Path(group).parents):
            text = _read(root / folder.relative_to("/") / file).strip()
            # Version 1 says "no limit" by a number that no machine has.
            if text.isdigit() and int(text) < 1 << 60:
                limits.append(int(text))
    return min(limits, default=None)


def _locked_memory() -> Part:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(Path("/proc/self/status")), re.M)
    may_exceed = capabilities is not None and bool(
        int(capabilities.group(1), 16) >> _CAP_IPC_LOCK & 1
    )
    facts = {
        "limit_bytes": None if limit == resource.RLIM_INFINITY else limit,
        "may_exceed": may_exceed,
    }
    name = "locked memory"
    if limit == resource.RLIM_INFINITY:
        return Part(name, "works", "no limit (ulimit -l)", dict(facts))
    text = f"limit of {format_bytes(limit)} (ulimit -l)"
    if may_exceed:
        return Part(name, "works", f"{text}, which CAP_IPC_LOCK lifts", dict(facts))
    if limit >= _LOCKED_BYTES_MIN:
        return Part(name, "works", text, dict(facts))
    return Part(name, "limited", f"{text}: io_uring cannot register its buffers", dict(facts))


def _huge_pages() -> Part:
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    private, shared = (_chosen(folder / name) for name in ("enabled", "shmem_enabled"))
    info = _meminfo()
    reserved = info.get("HugePages_Total", 0)
    works = any(mode not in (None, "never", "deny") for mode in (private, shared))
    return Part(
        "huge pages",
        "works" if works else "limited",
        f"transparent: {private or 'unknown'}, in shared memory: {shared or 'unknown'}; "
        f"{reserved} reserved of {format_bytes(info.get('Hugepagesize', 0))}",
        {"transparent": private, "transparent_shared": shared, "reserved": reserved},
    )


def _chosen(file: Path) -> str | None:
    found = re.search(r"\[(\w+)\]", _read(file))
    return found.group(1) if found else None


def _numa_nodes() -> Part:
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    detail = "memory is as near to every core" if nodes < 2 else "memory is nearer to some cores"
    return Part("NUMA nodes", "works", f"{max(nodes, 1)}: {detail}", {"nodes": max(nodes, 1)})


def _read(file: Path) -> str:
    """Nothing where it cannot be read: not every kernel has every file."""
    try:
        return file.read_text()
    except OSError:
        return ""

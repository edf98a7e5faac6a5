"""Memory for transfers, the same kind for everybody: private, page-aligned, huge pages."""

from __future__ import annotations

import mmap


def huge_memory(size_bytes: int) -> memoryview:
    """Zeros. Huge pages where the system gives them on demand (transparent_hugepage/enabled)."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)

"""A plain allocator of somebody else's for torch's CUDAPluggableAllocator, compiled by the tests.

It has the two functions that torch's documentation asks for, and calls the driver in each.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = """
#include <cstddef>
extern "C" {
int cuMemAlloc_v2(unsigned long long*, size_t);
int cuMemFree_v2(unsigned long long);
long allocations = 0, frees = 0;
void* test_malloc(size_t size, int, void*) {
  unsigned long long pointer = 0;
  if (size != 0 && cuMemAlloc_v2(&pointer, size) != 0) return nullptr;
  ++allocations;
  return reinterpret_cast<void*>(pointer);
}
void test_free(void* pointer, size_t, int, void*) {
  if (pointer != nullptr) cuMemFree_v2(reinterpret_cast<unsigned long long>(pointer));
  ++frees;
}
}
"""


def build(folder: Path) -> Path:
    """Compile it in a folder; the library has ``test_malloc``, ``test_free`` and two counters."""
    (folder / "alloc.cpp").write_text(SOURCE)
    command = ["g++", "-shared", "-fPIC", "-o", "liballoc.so", "alloc.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "liballoc.so"

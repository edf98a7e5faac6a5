"""What a model's state in pinned memory costs over what is stored, ours and torch's allocator's.

The sizes are those of Llama 3.2 1B (Meta's model card: 16 layers of 2048, feed-forward 8192, 32
heads and 8 of keys and values, a vocabulary of 128,256, tied): for each weight a master and two
moments in fp32, and a gradient in bf16. Memory is asked for, not written to, kind by kind.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys

_WIDTH, _INNER, _KEYS, _LAYERS, _VOCABULARY = 2048, 8192, 512, 16, 128_256
#: Bytes of an element of each kind of state.
_KINDS = {"master": 4, "first_moment": 4, "second_moment": 4, "gradient": 2}


def weight_counts() -> list[int]:
    """Elements of each weight of the model, 1.24 billion together."""
    layer = [
        *(_WIDTH * _WIDTH, _WIDTH * _KEYS, _WIDTH * _KEYS, _WIDTH * _WIDTH),
        *(_WIDTH * _INNER,) * 3,
        *(_WIDTH,) * 2,
    ]
    return [_VOCABULARY * _WIDTH, *layer * _LAYERS, _WIDTH]


def measure(*, quick: bool) -> dict[str, float]:
    """``host_bytes_over_stored.{ours,ours_reserved,torch}``: held from the system / stored.

    ``ours_reserved`` is cut from memory that was pinned ahead, of just the size. ``quick`` takes an
    eighth of the model's layers and of its vocabulary.
    """
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._transfer.host_memory", "1" if quick else ""],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _main(*, quick: bool) -> dict[str, float]:
    from spillover import HostPool, _core, emulator

    if not _core.driver_available():
        emulator.enable(vram="1GiB", schedule="eager", poison=False, hazards="off")
    import torch

    torch.cuda.init()
    counts = weight_counts()
    if quick:
        counts = [counts[0] // 8, *counts[1:19], counts[-1]]
    stored = held = reserved = torch_held = 0
    for element_bytes in _KINDS.values():
        sizes = [count * element_bytes for count in counts]
        stored += sum(sizes)
        pool = HostPool()
        buffers = [pool.allocate(size) for size in sizes]
        held += pool.stats().reserved_bytes
        del buffers
        pool.trim()
        # One slab of 128 KiB serves the few small ones of a kind.
        pool = HostPool(reserve=sum(-(-size // 4096) * 4096 for size in sizes) + (128 << 10))
        buffers = [pool.allocate(size) for size in sizes]
        reserved += pool.stats().reserved_bytes
        del buffers, pool
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        tensors = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        torch_held += torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
        del tensors
        gc.collect()
        torch._C._host_emptyCache()
    return {
        "host_bytes_over_stored.ours": held / stored,
        "host_bytes_over_stored.ours_reserved": reserved / stored,
        "host_bytes_over_stored.torch": torch_held / stored,
        "host_stored_gib": stored / (1 << 30),
    }


if __name__ == "__main__":
    print(json.dumps(_main(quick=bool(sys.argv[1]))))

"""Put weights to sleep and wake them beside plain copies of as many bytes, in turns.

``python -m benchmarks._sleep.worker WAY BYTES REPEATS PROFILE`` prints a line of JSON: for each
repeat the simulated and the wall-clock nanoseconds of a sleep, a waking, and the copies out and in.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from benchmarks import _harness

WAYS = ("ours", "torch_memory_saver")
#: Tensors of a block of Llama's shape, as shares of the bytes.
_SHARES = (8, 8, 4, 4, 2, 2, 2, 1, 1)


class _Ours:
    def __init__(self) -> None:
        from spillover import allocator

        self._allocator = allocator
        allocator.install(adapter="full")

    def region(self) -> AbstractContextManager[None]:
        return self._allocator.tag("weights")

    def sleep(self) -> None:
        self._allocator.sleep("weights")

    def wake(self) -> None:
        self._allocator.wake("weights")


class _Saver:
    def __init__(self) -> None:
        from torch_memory_saver import torch_memory_saver

        self._saver: Any = torch_memory_saver

    def region(self) -> AbstractContextManager[None]:
        region: AbstractContextManager[None] = self._saver.region(
            tag="weights", enable_cpu_backup=True
        )
        return region

    def sleep(self) -> None:
        self._saver.pause("weights")

    def wake(self) -> None:
        self._saver.resume("weights")


class _RawCopy:
    """cuMemcpyAsync between the weights and pinned memory, one call a tensor each way."""

    def __init__(self, weights: list[Any]) -> None:
        from spillover import _core

        self._driver = ctypes.CDLL("libcuda.so.1")
        self._weights = [(w.data_ptr(), w.numel() * w.element_size()) for w in weights]
        self._pool = _core.HostPool()
        self._buffers = [self._pool.allocate(size_bytes) for _, size_bytes in self._weights]

    def _copy(self, function: str) -> None:
        import torch

        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        for (address, size_bytes), buffer in zip(self._weights, self._buffers, strict=True):
            device, host = ctypes.c_uint64(address), ctypes.c_uint64(buffer.address)
            ends = (host, device) if "DtoH" in function else (device, host)
            result = getattr(self._driver, function)(*ends, ctypes.c_size_t(size_bytes), stream)
            assert result == 0, result
        torch.cuda.current_stream().synchronize()

    def out(self) -> None:
        self._copy("cuMemcpyDtoHAsync_v2")

    def back(self) -> None:
        self._copy("cuMemcpyHtoDAsync_v2")


def _main(way: str, size_bytes: int, repeats: int, profile: str) -> None:
    from spillover import emulator

    emulator.enable(vram=4 * size_bytes + (1 << 30), profile=profile, poison=False, hazards="off")
    saver: _Ours | _Saver = _Ours() if way == "ours" else _Saver()
    import torch

    generator = torch.Generator().manual_seed(7)
    unit_bytes = size_bytes // sum(_SHARES)
    expected = [
        torch.randint(0, 256, (share * unit_bytes,), dtype=torch.uint8, generator=generator)
        for share in _SHARES
    ]
    with saver.region():
        weights = [tensor.cuda() for tensor in expected]
    raw = _RawCopy(weights)
    addresses = [weight.data_ptr() for weight in weights]

    def timed(step: Callable[[], None]) -> dict[str, int]:
        torch.cuda.synchronize()
        simulated, wall = emulator.now_ns(), time.perf_counter_ns()
        step()
        return {
            "simulated_ns": emulator.now_ns() - simulated,
            "wall_ns": time.perf_counter_ns() - wall,
        }

    steps = {"sleep": saver.sleep, "wake": saver.wake, "out": raw.out, "back": raw.back}
    rows = []
    freed_bytes = 0
    for _ in range(1 + repeats):  # the first is cold: it pins host memory
        free_bytes = torch.cuda.mem_get_info()[0]
        row = {"sleep": timed(steps["sleep"])}
        freed_bytes = torch.cuda.mem_get_info()[0] - free_bytes
        row["wake"] = timed(steps["wake"])
        for name in ("out", "back"):
            row[name] = timed(steps[name])
        rows.append(row)
        assert [weight.data_ptr() for weight in weights] == addresses
        for weight, content in zip(weights, expected, strict=True):
            assert torch.equal(weight.cpu(), content), "the contents did not come back"
    _harness.end_measurement(
        {"bytes": unit_bytes * sum(_SHARES), "freed_bytes": freed_bytes, "rows": rows}
    )


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

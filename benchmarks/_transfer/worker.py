"""Times the transfer engine beside raw driver copies and torch's; run by ``benchmarks.transfer``.

In a process of its own: on the machine's device where there is one, else on an emulated one.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import _harness

_PAYLOAD_BYTES = 64 << 20
_SMALL_BYTES = 4 << 10
_SMALL_COUNT = 256


class _Raw:
    """Plain cuMemcpyAsync calls between the same memory kinds, one stream a direction.

    What comes in is read from other host memory than what goes out is written to, as with ours and
    with anybody who does both at once: the same memory for both would be a smaller working set.
    """

    def __init__(self, sources: list[Any], targets: list[Any]) -> None:
        import torch

        from spillover._core import HostPool

        self._driver = ctypes.CDLL("libcuda.so.1")
        self._pool = HostPool()
        self._leaving = [
            (source.data_ptr(), self._pool.allocate(source.nbytes)) for source in sources
        ]
        self._coming = [
            (target.data_ptr(), self._pool.allocate(target.nbytes)) for target in targets
        ]
        self._out, self._in = torch.cuda.Stream(), torch.cuda.Stream()
        self.out()
        self.wait()
        self.reset()
        self.out()
        self.wait()

    def _copy(self, function: str, to: int, origin: int, size_bytes: int, stream: Any) -> None:
        result = getattr(self._driver, function)(
            ctypes.c_uint64(to),
            ctypes.c_uint64(origin),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream.cuda_stream),
        )
        assert result == 0, result

    def out(self) -> None:
        for source, host in self._leaving:
            self._copy("cuMemcpyDtoHAsync_v2", host.address, source, host.size_bytes, self._out)

    def back(self) -> None:
        for target, host in self._coming:
            self._copy("cuMemcpyHtoDAsync_v2", target, host.address, host.size_bytes, self._in)

    def reset(self) -> None:
        """Outside of the time: what went out is what comes in next."""
        self._leaving, self._coming = (
            [(address, host) for (address, _), (_, host) in zip(one, other, strict=True)]
            for one, other in ((self._leaving, self._coming), (self._coming, self._leaving))
        )

    def wait(self) -> None:
        self._out.synchronize()
        self._in.synchronize()


class _Ours:
    """The engine: payloads that are put, and those of an earlier put that are fetched."""

    def __init__(self, sources: list[Any], targets: list[Any]) -> None:
        from spillover import TransferEngine
        from spillover._core import HostPool

        self._sources, self._targets = sources, targets
        self._engine = TransferEngine(pool=HostPool(), inflight=4 * len(sources) * _PAYLOAD_BYTES)
        self._tickets: list[Any] = []
        self._kept = [self._engine.put(source)[0] for source in sources]
        self._put: list[Any] = []
        self._engine.synchronize()

    def out(self) -> None:
        for source in self._sources:
            payload, ticket = self._engine.put(source)
            self._put.append(payload)
            self._tickets.append(ticket)

    def back(self) -> None:
        for payload, target in zip(self._kept, self._targets, strict=True):
            self._tickets.append(self._engine.fetch(payload, target))

    def wait(self) -> None:
        for ticket in self._tickets:
            ticket.wait()
        self._tickets.clear()

    def reset(self) -> None:
        """Outside of the time: what was put is what is fetched next."""
        if self._put:
            self._kept, self._put = self._put, []
        self._engine.synchronize()


def _measure_large(pairs: int, count: int, clock: Callable[[], int]) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(7)
    sources = [
        torch.randint(0, 256, (_PAYLOAD_BYTES,), dtype=torch.uint8, generator=generator).cuda()
        for _ in range(count)
    ]
    targets = [torch.zeros_like(source) for source in sources]
    raw, ours = _Raw(sources, targets), _Ours(sources, targets)
    steps: dict[str, Callable[[Any], None]] = {
        "d2h": lambda way: way.out(),
        "h2d": lambda way: way.back(),
        "both": lambda way: (way.out(), way.back()),  # type: ignore[func-returns-value]
    }

    def timed(step: Callable[[Any], None], way: Any) -> int:
        torch.cuda.synchronize()
        start = clock()
        step(way)
        way.wait()
        return clock() - start

    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    for index in range(1 + pairs):  # The first is cold: it pins host memory.
        for name, step in steps.items():
            # The first copy after other work can be a quarter slower, so it is not timed, and each
            # goes first once: ratios of single pairs lay on two heaps.
            timed(step, raw)
            raw.reset()
            found = {raw: 0, ours: 0}
            for way in (raw, ours, ours, raw) if index % 2 else (ours, raw, raw, ours):
                found[way] += timed(step, way)
                way.reset()
            if index:
                rows[name].append((found[raw] // 2, found[ours] // 2))
            if name != "d2h":
                for source, target in zip(sources, targets, strict=True):
                    assert torch.equal(source, target), "the contents did not come back"
                    target.zero_()
    return {"bytes": count * _PAYLOAD_BYTES, "rows": rows}


def _measure_small(repeats: int, clock: Callable[[], int]) -> dict[str, list[float]]:
    """Microseconds of a 4 KiB transfer, by way; the wait for all of them is included."""
    import torch

    from spillover import TransferEngine
    from spillover._core import HostPool
    from spillover._pinned import empty_pinned

    engine = TransferEngine(pool=HostPool())
    sources = [
        torch.full((_SMALL_BYTES,), index % 251, dtype=torch.uint8, device="cuda")
        for index in range(_SMALL_COUNT)
    ]
    targets = [torch.zeros_like(source) for source in sources]
    pinned = [empty_pinned((_SMALL_BYTES,), torch.uint8) for _ in sources]
    side = torch.cuda.Stream()
    kept: dict[str, list[Any]] = {"payloads": engine.put_all(sources)[0]}

    def single_out() -> None:
        found = [engine.put(source) for source in sources]
        found[-1][1].wait()
        kept["payloads"] = [payload for payload, _ in found]

    def batched_out() -> None:
        kept["payloads"], ticket = engine.put_all(sources)
        ticket.wait()

    def single_in() -> None:
        tickets = [
            engine.fetch(payload, target)
            for payload, target in zip(kept["payloads"], targets, strict=True)
        ]
        tickets[-1].wait()

    def batched_in() -> None:
        engine.fetch_all(zip(kept["payloads"], targets, strict=True)).wait()

    def torch_copies(to: list[Any], origin: list[Any], *, has_events: bool) -> None:
        # With events each copy can be waited for by itself, as each of ours that is single can.
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for each, other in zip(to, origin, strict=True):
                if has_events:
                    side.wait_event(torch.cuda.default_stream().record_event())
                each.copy_(other, non_blocking=True)
                if has_events:
                    side.record_event()
        side.synchronize()

    ways: dict[str, Callable[[], None]] = {
        "out.single": single_out,
        "out.batched": batched_out,
        "out.torch": lambda: torch_copies(pinned, sources, has_events=False),
        "out.torch_with_events": lambda: torch_copies(pinned, sources, has_events=True),
        "in.single": single_in,
        "in.batched": batched_in,
        "in.torch": lambda: torch_copies(targets, pinned, has_events=False),
        "in.torch_with_events": lambda: torch_copies(targets, pinned, has_events=True),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(2 + repeats):
        for name, way in ways.items():
            if name.startswith("in."):
                for target in targets:
                    target.zero_()
            torch.cuda.synchronize()
            start = clock()
            way()
            elapsed = clock() - start
            if index >= 2:
                found[name].append(elapsed / _SMALL_COUNT / 1000)
            if name.startswith("in."):
                torch.cuda.synchronize()
                assert all(map(torch.equal, targets, sources)), "the contents did not come back"
    return found


def _main(profile: str, pairs: int, count: int, repeats: int) -> None:
    from spillover import _core, emulator

    is_emulated = bool(profile) or not _core.driver_available()
    if is_emulated:
        options: dict[str, Any] = {"profile": profile} if profile else {}
        emulator.enable(vram="4GiB", schedule="eager", poison=False, hazards="off", **options)
    import torch

    clock = emulator.now_ns if profile else time.perf_counter_ns
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "is_emulated": is_emulated,
        "large": _measure_large(pairs, count, clock),
    }
    if not profile:
        found["small"] = _measure_small(repeats, clock)
    _harness.end_measurement(found)


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))

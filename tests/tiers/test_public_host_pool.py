"""spillover.HostPool: its arguments, memory pinned ahead, tensors, and what it all costs."""

from __future__ import annotations

import os
import random
import re

import numpy as np
import pytest
import torch
from fake_machine import GIB, KIB, MIB

from spillover import ConfigError, HostOutOfMemory, HostPool
from spillover.emulator import Fault, faults

PAGE = os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least a byte"),
        ({"limit": "many"}, "limit='many' is not a size"),
        ({"numa": "far"}, "numa='far' is no node"),
        ({"numa": -1}, "numa=-1 is no node"),
        ({"numa": True}, "numa=True is no node"),
        ({"numa": 1 << 40}, "numa=1099511627776 is no node"),
        ({"huge_pages": "always"}, "choose auto, reserved or never"),
        ({"huge_pages": None}, "choose auto, reserved or never"),
        ({"limit": -1}, "limit must not be negative"),
        ({"limit": float("nan")}, "limit must be bytes or a text such as '20GiB', not nan"),
        ({"limit": 1 << 70}, "limit must be less than 8 EiB"),
        ({"limit": "-1GiB"}, "limit='-1GiB' is not a size"),
        ({"limit": True}, "limit must be bytes"),
        ({"reserve": "8 gibibytes"}, "reserve='8 gibibytes' is not a size"),
        ({"reserve": 0}, "at least one byte"),
        ({"device": "cuda"}, "device='cuda' must be the number of a device"),
        ({"device": -1}, "device=-1 must be the number of a device"),
        ({"pinned": "no"}, "pinned='no' must be True or False"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        HostPool(**{"pinned": False, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "at least one byte"),
        (-5, "size_bytes must not be negative, got -5"),
        (1.5, "size_bytes must be bytes or a text such as '20GiB', not 1.5"),
        (float("nan"), "not nan"),
        (None, "not None"),
        (True, "not True"),
        ("8 gigs", "size_bytes='8 gigs' is not a size"),
        (1 << 64, "size_bytes must be less than 8 EiB"),
    ],
)
def test_wrong_sizes_are_named(size: object, message: str) -> None:
    pool = HostPool(limit=MIB, pinned=False)
    with pytest.raises(ConfigError, match=re.escape(message)):
        pool.allocate(size)  # type: ignore[arg-type]
    assert pool.stats().buffer_count == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, -1), torch.float32, "shape=(2, -1) must be whole numbers from 0"),
        ((-2, -2), torch.float32, "shape=(-2, -2) must be whole numbers"),
        ((2, 1.5), torch.float32, "shape=(2, 1.5) must be whole numbers"),
        ("abc", torch.float32, "shape='abc' must be whole numbers"),
        (None, torch.float32, "shape=None must be whole numbers"),
        (4, "float32", "dtype='float32' is no torch.dtype"),
        (1 << 62, torch.float32, "the tensor must be less than 8 EiB"),
    ],
)
def test_wrong_shapes_are_named(shape: object, dtype: object, message: str) -> None:
    pool = HostPool(limit=MIB, pinned=False)
    with pytest.raises(ConfigError, match=re.escape(message)):
        pool.empty(shape, dtype)  # type: ignore[arg-type]
    assert pool.stats().buffer_count == 0


def test_sizes_may_be_texts_or_numbers_of_numpy() -> None:
    pool = HostPool(limit=np.int64(MIB), pinned=False)
    assert pool.allocate("64KiB").size_bytes == pool.allocate(np.uint32(65536)).size_bytes
    shape = np.array([2, 3])
    assert pool.empty(shape, torch.int8).shape == (2, 3)  # type: ignore[arg-type]
    assert pool.empty(np.int64(5), torch.int8).shape == (5,)


def test_a_device_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="device 77"):
        HostPool(limit=MIB, device=77).allocate(100)


def test_a_wrong_progress_is_named() -> None:
    pool = HostPool(limit=MIB, pinned=False)
    with pytest.raises(ConfigError, match="progress='bar' must be"):
        pool.reserve(MIB, progress="bar")  # type: ignore[arg-type]


def test_progress_may_use_the_pool() -> None:
    """Whatever it does: nothing is locked while it runs."""
    pool = HostPool(limit=64 * MIB, pinned=False)
    held: list[object] = []

    def use(done_bytes: int) -> None:
        held.append(pool.allocate(100 + done_bytes // 64))
        if done_bytes == 8 * MIB:
            pool.reserve(MIB)
        pool.trim()
        assert pool.stats().buffer_count == len(held)

    pool.reserve(8 * MIB, progress=use)
    assert pool.stats().ahead_bytes >= 8 * MIB
    assert pool._is_valid()


@pytest.mark.parametrize("pinned", [True, False])
def test_reserved_memory_serves_any_sizes_exactly(pinned: bool) -> None:
    pool = HostPool(limit=64 * MIB, reserve=32 * MIB, pinned=pinned)
    assert pool.stats().ahead_bytes == pool.stats().reserved_bytes == 32 * MIB
    generator = random.Random(3)
    held: list[tuple[object, int]] = []
    for _ in range(400):
        if held and generator.random() < 0.5:
            buffer, byte = held.pop(generator.randrange(len(held)))
            view = memoryview(buffer)  # type: ignore[arg-type]
            assert view[0] == view[-1] == byte
            del view, buffer
            continue
        size = generator.choice([100, 5000, 33 * KIB, 777777, 2 * MIB, 3 * MIB + 1])
        if sum(len(buffer) for buffer, _ in held) + size > 20 * MIB:  # type: ignore[arg-type]
            continue
        buffer = pool.allocate(size)
        byte = generator.randrange(256)
        view = memoryview(buffer)
        view[0] = view[-1] = byte
        held.append((buffer, byte))
        stats = pool.stats()
        assert stats.used_bytes <= stats.reserved_bytes <= 64 * MIB
    del view, buffer
    held.clear()
    # Holes have joined again: all of it is one.
    assert pool.trim() == 32 * MIB or pool.stats().reserved_bytes == 0
    assert pool.stats().reserved_bytes == 0


def test_a_block_as_large_as_the_reservation_fits() -> None:
    pool = HostPool(limit=8 * MIB, reserve=8 * MIB)
    parts = [pool.allocate(MIB) for _ in range(8)]
    assert pool.stats().ahead_bytes == 0
    with pytest.raises(HostOutOfMemory, match=r"budget of 8.00 MiB"):
        pool.allocate(PAGE * 10)
    for index in (1, 3, 5, 7, 0, 2, 4, 6):
        parts[index] = None  # type: ignore[call-overload]
    whole = pool.allocate(8 * MIB)
    assert pool.stats().used_bytes == whole.size_bytes


def test_reserved_memory_makes_room_for_what_does_not_fit_it() -> None:
    pool = HostPool(limit=8 * MIB)
    pool.reserve(4 * MIB)
    buffer = pool.allocate(6 * MIB)
    assert pool.stats().reserved_bytes == buffer.size_bytes


def test_reserving_is_all_or_nothing() -> None:
    pool = HostPool(limit=64 * MIB)
    kept = pool.allocate(MIB)
    with pytest.raises(HostOutOfMemory, match=r"budget of 64.00 MiB"):
        pool.reserve(64 * MIB)
    with pytest.raises(ConfigError, match="at least one byte"):
        pool.reserve(0)

    def interrupt(done_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.reserve(16 * MIB, progress=interrupt)
    with (
        faults(Fault("cuMemHostRegister", error="CUDA_ERROR_OUT_OF_MEMORY")),
        pytest.raises(HostOutOfMemory, match="refused to pin"),
    ):
        pool.reserve(16 * MIB)
    assert pool.stats().reserved_bytes == kept.size_bytes
    assert pool.stats().ahead_bytes == 0
    pool.reserve(63 * MIB)
    assert pool.stats().ahead_bytes == 63 * MIB


def test_progress_ends_with_all_of_it() -> None:
    seen: list[int] = []
    HostPool(limit=128 * MIB).reserve("100MiB", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 100 * MIB


def test_progress_bar_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    HostPool(pinned=False).reserve(MIB, progress=True)
    out, err = capfd.readouterr()
    assert "pinning host memory" in err
    assert out == ""


def test_tensors_are_pinned_and_copy() -> None:
    torch.cuda.init()
    pool = HostPool(limit=32 * MIB, reserve=16 * MIB)
    host = pool.empty((1000, 100), torch.float32)
    assert host.is_pinned()
    device = torch.arange(100_000, dtype=torch.float32, device="cuda").view(1000, 100)
    host.copy_(device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(host, device.cpu())
    assert pool.empty(5, torch.int64).shape == (5,)
    assert pool.empty((0, 3), torch.int64).shape == (0, 3)
    assert pool.stats().buffer_count == 1


def test_every_size_of_a_model_costs_at_most_two_percent() -> None:
    sizes = [shape * 4 for shape in (2048, 8192, 2048 * 512, 2048 * 2048)] * 20
    pool = HostPool(limit=GIB)
    held = [pool.allocate(size) for size in sizes]
    assert pool.stats().reserved_bytes <= 1.02 * sum(sizes)
    assert len(held) == len(sizes)

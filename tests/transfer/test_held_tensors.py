"""``TransferEngine.hold``: what gives way, when, and that nothing is lost or copied in vain."""

from __future__ import annotations

import gc
import random
import subprocess
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spillover import ConfigError, HostOutOfMemory, StateError, StorageError, TransferEngine
from spillover.emulator import StorageFault, faults

KIB = 1 << 10
MakeEngine = Callable[..., TransferEngine]
Run = Callable[..., subprocess.CompletedProcess[str]]


def numbered(seed: int, size: int = 64 * KIB) -> torch.Tensor:
    """Bytes on the device that no other seed has."""
    return ((torch.arange(size, device="cuda") + seed) * (2 * seed + 7)).to(torch.uint8)


def test_nothing_moves_while_there_is_room(make_engine: MakeEngine) -> None:
    engine = make_engine(resident="1MiB")
    tensors = [numbered(seed) for seed in range(4)]
    held = [engine.hold(tensor) for tensor in tensors]
    assert [one.state for one in held] == ["device"] * 4
    assert engine.stats().held_bytes == 256 * KIB
    assert all(
        one.get().data_ptr() == each.data_ptr() for one, each in zip(held, tensors, strict=True)
    )
    assert engine.stats().out_bytes == engine.stats().in_bytes == 0
    del held
    assert engine.stats().held_bytes == 0


def test_budget_makes_the_farthest_give_way(make_engine: MakeEngine) -> None:
    engine = make_engine(resident="128KiB")
    held = [engine.hold(numbered(seed), next_use=use) for seed, use in enumerate((30, 10, 40, 20))]
    assert [one.state == "device" for one in held] == [False, True, False, True]
    assert engine.stats().held_bytes == engine.stats().demoted_bytes == 128 * KIB
    unknown = engine.hold(numbered(9))  # It is what would go first, but for being new.
    assert unknown.state == "device"
    assert held[3].state != "device"
    for seed, one in enumerate(held):
        assert torch.equal(one.get(), numbered(seed))
        assert engine.stats().held_bytes <= 128 * KIB


def test_memory_is_free_once_it_has_left(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tensor = numbered(1)
    died = weakref.ref(tensor.untyped_storage())
    held = engine.hold(tensor)
    del tensor
    assert engine.give_back(1, torch.device("cuda", 0)) == 64 * KIB
    assert died() is None
    assert held.state == "host"
    assert torch.equal(held.take(), numbered(1))
    assert held.state == "dropped"


def test_what_is_still_there_is_not_copied_back(make_engine: MakeEngine) -> None:
    engine = make_engine()
    held = engine.hold(numbered(3))
    address = held.get().data_ptr()
    assert engine._held.demote(1) == 64 * KIB
    assert held.state == "leaving"
    again = held.get()
    assert (again.data_ptr(), engine.stats().in_bytes) == (address, 0)
    assert torch.equal(again, numbered(3))
    engine.synchronize()
    # The host has it by now, so it goes without a copy.
    copied = engine.stats().out_bytes
    del again
    assert engine.give_back(1, torch.device("cuda", 0)) == 64 * KIB
    assert engine.stats().out_bytes == copied
    assert torch.equal(held.get(), numbered(3))


def test_who_takes_it_may_change_it_while_it_leaves(make_engine: MakeEngine) -> None:
    engine = make_engine()
    other = engine.hold(numbered(4), next_use=1)
    held = engine.hold(numbered(3))
    engine._held.demote(128 * KIB)
    tensor = held.take()
    tensor.zero_()  # A copy out that has not ended would be a hazard.
    torch.cuda.synchronize()
    assert torch.equal(other.get(), numbered(4))
    assert not tensor.any()


def test_prefetch_comes_ahead(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0)
    held = [engine.hold(numbered(seed, 200 * KIB)) for seed in range(3)]
    engine.give_back(600 * KIB, torch.device("cuda", 0))
    engine.synchronize()
    assert all(one.state != "device" for one in held)
    assert all(one.prefetch() for one in held)
    assert [one.state for one in held] == ["device"] * 3
    came = engine.stats().in_bytes
    for seed, one in enumerate(held):
        assert torch.equal(one.get(), numbered(seed, 200 * KIB))
    assert engine.stats().in_bytes == came == 600 * KIB


def test_shapes_and_strides_come_back(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tensor = torch.randn(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last)
    expected = tensor.clone()
    held = engine.hold(tensor.requires_grad_())
    del tensor
    engine.give_back(1, torch.device("cuda", 0))
    back = held.take()
    assert (back.shape, back.stride(), back.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    assert torch.equal(back, expected)
    assert not back.requires_grad


def test_expected_order(make_engine: MakeEngine) -> None:
    engine = make_engine()
    held = [engine.hold(numbered(seed)) for seed in range(4)]
    engine.expect([held[2], held[0], held[3], held[1]])
    assert held[2].get() is not None
    assert engine.position == 1
    engine._held.demote(128 * KIB)
    # The one that was used, of which nothing is known now, and the last.
    assert [one.state == "device" for one in held] == [True, False, False, True]


def test_errors_lose_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(host="64KiB", resident="128KiB")
    held = [engine.hold(numbered(seed)) for seed in range(3)]
    with pytest.raises(HostOutOfMemory):
        engine.hold(numbered(3))
    assert sum(one.state == "device" for one in held) == 2
    with pytest.raises(HostOutOfMemory):
        engine.give_back(1, torch.device("cuda", 0))
    for seed, one in enumerate(held):
        assert torch.equal(one.get(), numbered(seed))
    with pytest.raises(ConfigError, match="this engine is of cuda:0"):
        engine.hold(torch.zeros(3))
    held[0].drop()
    held[0].drop()
    assert held[0].state == "dropped"
    with pytest.raises(StateError, match="dropped or taken"):
        held[0].get()
    engine.close()
    assert engine.give_back(1, torch.device("cuda", 0)) == 0


def test_read_that_fails_may_be_tried_again(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0, prefetch=0)
    held = [engine.hold(numbered(seed, 300 * KIB)) for seed in range(3)]
    engine.give_back(900 * KIB, torch.device("cuda", 0))
    engine.synchronize()
    with (
        faults(storage=[StorageFault("read", error="EIO", call=1, times=None)]),
        pytest.raises(StorageError),
    ):
        held[0].get()
    assert held[0].state != "device"
    for seed, one in enumerate(held):
        assert torch.equal(one.get(), numbered(seed, 300 * KIB))


def test_random_programs(make_engine: MakeEngine) -> None:
    """Whatever is done in whatever order, each has its bytes."""
    for seed in range(8):
        rng = random.Random(seed)
        engine = make_engine(
            on_disk=seed % 2 == 1,
            host=0 if seed % 2 else None,
            resident=f"{rng.choice((2, 4))}00KiB",
        )
        held: dict[int, Any] = {}
        for number in range(120):
            key = rng.choice(list(held)) if held else 0
            match rng.randrange(8) if held else 0:
                case 0 | 1:
                    use = rng.choice((None, number + rng.randrange(20)))
                    held[number] = engine.hold(numbered(number, 40 * KIB), next_use=use)
                case 2 | 3:
                    assert torch.equal(held[key].get(), numbered(key, 40 * KIB))
                case 4:
                    assert torch.equal(held.pop(key).take(), numbered(key, 40 * KIB))
                case 5:
                    held[key].prefetch()
                case 6:
                    engine.give_back(rng.randrange(100 * KIB), torch.device("cuda", 0))
                case 7:
                    held.pop(key).drop() if rng.random() < 0.5 else engine.expect([held[key]])
        for key, one in held.items():
            assert torch.equal(one.get(), numbered(key, 40 * KIB))
        held.clear()
        del one
        gc.collect()
        engine.synchronize()
        stats = engine.stats()
        assert stats.held_bytes == stats.host_bytes == 0


def test_threads(make_engine: MakeEngine) -> None:
    engine = make_engine(resident="200KiB")
    shared = [engine.hold(numbered(seed)) for seed in range(6)]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    seed = rng.randrange(len(shared))
                    tensor = shared[seed].get()
                    tensor.record_stream(torch.cuda.current_stream())
                    assert torch.equal(tensor, numbered(seed))
                    del tensor
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


RECLAIM = """
import gc, sys, threading
import torch
from spillover import TransferEngine, allocator
assert allocator.install(adapter="full")
MIB = 1 << 20

def numbered(seed, mib):
    return torch.full((mib * MIB,), seed, dtype=torch.uint8, device="cuda")
"""


def test_an_allocation_that_would_fail_gets_what_is_used_last(run_emulated: Run) -> None:
    run_emulated(
        RECLAIM
        + """
engine = TransferEngine()
held = [engine.hold(numbered(seed, 40), next_use=10 - seed) for seed in range(5)]
wanted = numbered(9, 70)  # 56 MiB are left; the pool asks for the whole of a request
assert [one.state == "device" for one in held] == [False, False, True, True, True]
# So does its own way back.
assert held[0].get().eq(0).all()
assert sum(one.state == "device" for one in held) <= 4
del wanted
for seed, one in enumerate(held):
    assert one.get().eq(seed).all()
assert engine.stats().demoted_bytes >= 80 * MIB
""",
        vram="256MiB",
    )


def test_an_allocation_that_would_fail_waits_for_copies_out(run_emulated: Run) -> None:
    run_emulated(
        RECLAIM
        + """
engine = TransferEngine()
payloads = [engine.put(numbered(seed, 40))[0] for seed in range(5)]
assert engine.stats().leaving_bytes == 200 * MIB
wanted = numbered(9, 80)
# Not more than was missing.
assert 0 < engine.stats().leaving_bytes < 200 * MIB, engine.stats()
del wanted
for seed, payload in enumerate(payloads):
    target = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
    engine.fetch(payload, target).stream_wait()
    assert target.eq(seed).all()
""",
        vram="256MiB",
    )


def test_what_cannot_give_way_leaves_the_error_to_the_allocation(run_emulated: Run) -> None:
    run_emulated(
        RECLAIM
        + """
engine = TransferEngine(host="1MiB")
held = engine.hold(numbered(1, 150))
sys.unraisablehook = lambda told: reported.append(str(told.exc_value))
reported = []
try:
    numbered(2, 150)
except torch.OutOfMemoryError as error:
    assert "reclaimer" in str(error), error
else:
    raise AssertionError("no error")
assert "host budget" in reported[0], reported
engine.close()
assert held.get()[::4096].eq(1).all()
""",
        vram="256MiB",
    )


@pytest.mark.parametrize(
    "schedule", ["threaded", *(pytest.param(s, marks=pytest.mark.soak) for s in ("late", "random"))]
)
def test_threads_that_run_out_of_memory(run_emulated: Run, schedule: str, tmp_path: Path) -> None:
    run_emulated(
        RECLAIM
        + """
from spillover import DiskStore
engine = TransferEngine(host="64MiB", disk=DiskStore(sys.argv[1]), chunk="4MiB", staging="16MiB")
errors = []

def work(number):
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            held = []
            for turn in range(6):
                held.append(engine.hold(numbered(16 * number + turn, 24)))
            for turn, one in enumerate(held):
                assert one.take().eq(16 * number + turn).all()
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if errors:
    raise errors[0]
assert engine.stats().demoted_bytes > 0
""",
        str(tmp_path),
        vram="256MiB",
        schedule=schedule,
        seed=3,
    )

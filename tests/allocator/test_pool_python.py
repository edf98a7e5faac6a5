"""The pool from Python without torch: spillover.allocator.Pool and its blocks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from cuda_calls import Cuda, live_blocks
from torch_process import TorchProcess

import spillover
from spillover import _core, allocator

MIB = 1 << 20


def test_a_block_is_memory_of_the_device(pool: _core.Pool, cuda: Cuda) -> None:
    block = allocator.Pool(0).allocate(3 * MIB)
    assert live_blocks(pool) == {block.address: 3 * MIB}
    assert (block.size_bytes, len(block), block.device, block.stream) == (3 * MIB, 3 * MIB, 0, 0)
    cuda.fill(block.address, 3 * MIB, 0)
    block.free()
    block.free()
    assert live_blocks(pool) == {}
    with pytest.raises(spillover.StateError, match="freed"):
        _ = block.address


def test_a_block_lives_as_long_as_its_object(pool: _core.Pool) -> None:
    owner = allocator.Pool(0)
    block = owner.allocate("2MiB")
    with owner.allocate(MIB):
        assert len(live_blocks(pool)) == 2
    assert len(live_blocks(pool)) == 1
    del block
    gc.collect()
    assert live_blocks(pool) == {}


def test_a_size_of_zero_takes_nothing(pool: _core.Pool) -> None:
    block = allocator.Pool(0).allocate(0)
    assert block.address == 0
    assert live_blocks(pool) == {}


class OtherLibrarysStream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def test_streams_of_other_libraries(pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> None:
    stream, other = kept_streams[:2]
    block = allocator.Pool(0).allocate(MIB, OtherLibrarysStream(stream))
    assert block.stream == stream
    block.record_stream(OtherLibrarysStream(other))
    cuda.fill(block.address, MIB, other)
    block.free()
    assert pool.stats()["active"]["all"]["current"] == 1, "the other stream still writes to it"


class BrokenStream:
    def __cuda_stream__(self) -> Any:
        return None


@pytest.mark.parametrize(
    "stream",
    [
        *("default", -1, True, 1.5, object(), BrokenStream()),
        *(OtherLibrarysStream(-1), OtherLibrarysStream(1 << 64)),
    ],
)
def test_what_is_no_stream_is_refused(pool: _core.Pool, stream: object) -> None:
    with pytest.raises(spillover.ConfigError, match="is not a CUDA stream; give its handle"):
        allocator.Pool(0).allocate(512, stream)


@pytest.mark.parametrize("size", [-1, "much", 1.5, None])
def test_what_is_no_size_is_refused(pool: _core.Pool, size: Any) -> None:
    with pytest.raises(spillover.ConfigError, match="size_bytes"):
        allocator.Pool(0).allocate(size)


def test_high_water_marks(pool: _core.Pool) -> None:
    owner = allocator.Pool(0)
    held = owner.allocate("12MiB")
    owner.allocate("40MiB").free()
    stats = owner.stats()
    assert stats["allocated_bytes.all.peak"] == 52 * MIB
    assert stats["reserved_bytes.all.peak"] == 52 * MIB
    owner.trim()
    owner.reset_peaks()
    stats = owner.stats()
    assert stats["allocated_bytes.all.peak"] == stats["reserved_bytes.all.peak"] == 12 * MIB
    held.free()


def test_settings_by_keyword(pool: _core.Pool) -> None:
    owner = allocator.Pool(0, limit="64MiB", wait_max=1.5)
    assert owner.settings()["limit"] == 64 * MIB
    assert owner.settings()["wait_max"] == 1.5
    with pytest.raises(spillover.ConfigError, match="nearest is 'limit'"):
        allocator.Pool(0, limits="64MiB")  # type: ignore[call-arg]
    allocator.configure(limit=None, wait_max=60)


def test_no_torch_is_needed(run_emulated: Callable[..., Any]) -> None:
    run_emulated(
        """
        import sys
        from spillover import SpilloverError, allocator
        pool = allocator.Pool(limit="64MiB")
        with pool.allocate("40MiB") as block:
            assert block.address % 512 == 0
            try:
                pool.allocate("40MiB")
            except SpilloverError as error:
                assert "out of memory" in str(error), error
            else:
                raise AssertionError("no error")
        pool.check_invariants()
        assert "torch" not in sys.modules
        """
    )


def test_other_libraries_see_an_array_of_bytes(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        block = allocator.Pool(0).allocate(4096, torch.cuda.current_stream())
        view = torch.as_tensor(block, device="cuda")
        assert view.data_ptr() == block.address and view.shape == (4096,)
        view.fill_(7)
        assert view.sum().item() == 7 * 4096
        del view
        block.free()
        """
    )


@pytest.mark.parametrize("device", [-1, 1 << 32, 1 << 40, "0", 0.0, None, True])
@pytest.mark.parametrize(
    "call",
    [
        allocator.Pool,
        allocator.stats,
        allocator.check_invariants,
        lambda device: allocator.trim(device=device),
        lambda device: allocator.tag_stats("weights", device),
        lambda device: allocator.add_reclaimer(lambda missing_bytes, stream: 0, device=device),
    ],
)
def test_what_is_no_device_is_an_error_and_not_another_device(
    pool: _core.Pool, call: Callable[[Any], object], device: Any
) -> None:
    with pytest.raises(spillover.ConfigError, match="device"):
        call(device)


@pytest.mark.parametrize("size", [1 << 63, 1 << 64, "9" * 400, "99999999TiB"])
def test_a_size_beyond_all_numbers_is_an_error(pool: _core.Pool, size: Any) -> None:
    owner = allocator.Pool(0)
    owner.allocate(MIB).free()
    held_bytes = owner.stats()["reserved_bytes.all.current"]
    for call in (owner.allocate, owner.trim, allocator.trim):
        with pytest.raises(spillover.ConfigError, match="8 EiB"):
            call(size)
    assert owner.stats()["reserved_bytes.all.current"] == held_bytes


def test_a_handle_beyond_all_addresses_is_no_stream(pool: _core.Pool) -> None:
    with pytest.raises(spillover.ConfigError, match="is not a CUDA stream"):
        allocator.Pool(0).allocate(MIB, 1 << 64)


def test_a_stream_that_captures_gets_no_block(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
) -> None:
    """Not from the thread's magazine either: the graph may run while its last use still does."""
    stream = kept_streams[0]
    pool.free(pool.alloc(MIB, stream))
    with cuda.capture(stream), pytest.raises(spillover.StateError, match="recording a CUDA graph"):
        pool.alloc(MIB, stream)

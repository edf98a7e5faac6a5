"""Tags: blocks that belong together share no page with others, and are counted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cuda_calls import Cuda, live_blocks
from torch_process import TorchProcess

import spillover
from spillover import _core, allocator

MIB = 1 << 20


def pages(pool: _core.Pool, addresses: list[int]) -> set[int]:
    sizes = live_blocks(pool)
    return {
        page
        for address in addresses
        for page in range(address // (2 * MIB), (address + sizes[address] - 1) // (2 * MIB) + 1)
    }


def test_blocks_of_two_tags_share_no_page(pool: _core.Pool) -> None:
    by_tag: dict[str, list[int]] = {"": [], "weights": [], "cache": []}
    for size_bytes in (512, 4096, MIB, 3 * MIB, 5 * MIB):
        for name, addresses in by_tag.items():
            with allocator.tag(name):
                addresses.append(pool.alloc(size_bytes))
    owned = {name: pages(pool, addresses) for name, addresses in by_tag.items()}
    assert not owned[""] & owned["weights"]
    assert not owned["weights"] & owned["cache"]
    assert not owned[""] & owned["cache"]
    pool.check_invariants()


def test_a_thread_reuses_blocks_of_its_tag_only(pool: _core.Pool) -> None:
    with allocator.tag("weights"):
        pool.alloc(512)  # keeps the page
        weights = pool.alloc(4096)
        pool.free(weights)
    # The freed block is in the thread's cache, and of the right size.
    assert pool.alloc(4096) != weights
    with allocator.tag("weights"):
        assert pool.alloc(4096) == weights


def test_a_block_goes_back_to_its_tag_whoever_frees_it(pool: _core.Pool) -> None:
    with allocator.tag("weights"):
        address = pool.alloc(3 * MIB)
        pool.alloc(3 * MIB)  # keeps the page in the middle
    with allocator.tag("cache"):
        pool.free(address)
    with allocator.tag("weights"):
        assert pool.alloc(3 * MIB) == address


def test_idle_memory_of_one_tag_serves_another(pool: _core.Pool, cuda: Cuda) -> None:
    with allocator.tag("weights"):
        address = pool.alloc(32 * MIB)
    cuda.fill(address, 32 * MIB, 0)
    pool.free(address)
    # Work on one stream is ordered, whatever the tags: nothing has to be waited for.
    with allocator.tag("cache"):
        assert pool.alloc(32 * MIB) == address
    cuda.fill(address, 32 * MIB, 0)
    assert allocator.tag_stats("weights")["reserved_bytes"] == 0
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 32 * MIB
    pool.check_invariants()


def test_statistics_of_a_tag(pool: _core.Pool) -> None:
    with allocator.tag("figures"):
        first = pool.alloc(11 * MIB)
        pool.alloc(1000)
    pool.free(pool.alloc(7 * MIB))
    stats = allocator.tag_stats("figures")
    assert stats["allocation"] == 2
    assert stats["allocated_bytes"] == 11 * MIB + 1024
    assert stats["reserved_bytes"] == 12 * MIB + 2 * MIB
    pool.free(first)
    allocator.trim()
    stats = allocator.tag_stats("figures")
    assert (stats["allocation"], stats["reserved_bytes"]) == (1, 2 * MIB)
    assert stats["reserved_bytes_peak"] == 14 * MIB
    pool.reset_peak_stats()
    assert allocator.tag_stats("figures")["reserved_bytes_peak"] == 2 * MIB
    assert set(allocator.tag_stats("never used").values()) == {0}


def test_segments_say_their_tag(pool: _core.Pool) -> None:
    pool.alloc(MIB)
    with allocator.tag("weights"):
        pool.alloc(MIB)
    assert sorted(segment["tag"] for segment in pool.segments()) == ["", "weights"]


def test_tags_nest_and_end_with_exceptions(pool: _core.Pool) -> None:
    def tag_now() -> str:
        address = pool.alloc(2 * MIB)
        (name,) = [
            segment["tag"]
            for segment in pool.segments()
            for block in segment["blocks"]
            if block["address"] == address
        ]
        pool.free(address)
        return name

    with allocator.tag("outer"):
        with allocator.tag("inner"):
            assert tag_now() == "inner"
            with allocator.tag(""):
                assert tag_now() == ""
        with pytest.raises(KeyError), allocator.tag("inner"):
            raise KeyError
        assert tag_now() == "outer"
    assert tag_now() == ""


def test_each_thread_has_its_own_tag(pool: _core.Pool) -> None:
    found = []

    def work() -> None:
        pool.alloc(3 * MIB)
        found.append([segment["tag"] for segment in pool.segments()])

    with allocator.tag("mine"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [[""]]


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(spillover.ConfigError, match="at most 256 bytes"), allocator.tag("x" * 257):
        pass


def test_tags_of_tensors(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        with allocator.tag("weights"):
            weights = torch.ones(40 * MiB, dtype=torch.uint8, device="cuda")
        other = torch.ones(8 * MiB, dtype=torch.uint8, device="cuda")
        assert allocator.tag_stats("weights")["allocated_bytes"] == 40 * MiB
        assert weights.sum().item() == 40 * MiB
        """
    )


@pytest.mark.parametrize("name", [None, 5, b"weights", "\ud800"])
def test_what_is_no_name_is_refused(pool: _core.Pool, name: Any) -> None:
    with pytest.raises(spillover.ConfigError, match="a tag is a text"), allocator.tag(name):
        pass
    with pytest.raises(spillover.ConfigError, match="a tag is a text"):
        allocator.tag_stats(name)

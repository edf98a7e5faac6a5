"""Settings of the pools: by keyword, by text, and from the environment."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from cuda_calls import Cuda

import spillover
from spillover import _core, allocator
from spillover.emulator import Fault, faults

MIB = 1 << 20
MEMORY_ERRORS = (spillover.SpilloverError, RuntimeError)


@pytest.fixture(autouse=True)
def default_settings(pool: _core.Pool) -> Any:
    yield
    allocator.configure(limit=None, fraction=1.0, wait_max=60, unmapped_max=None, check_every=0)


def held_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


@pytest.mark.parametrize(("limit", "limit_bytes"), [("64MiB", 64 * MIB), (64_000_000, 64_000_000)])
def test_limit_bounds_what_the_pool_holds(
    pool: _core.Pool, limit: int | str, limit_bytes: int
) -> None:
    allocator.configure(limit=limit)
    assert pool.settings()["limit"] == limit_bytes
    pool.alloc(40 * MIB)
    with pytest.raises(MEMORY_ERRORS, match=re.escape("configure(limit=...)")):
        pool.alloc(30 * MIB)
    allocator.configure(limit=None)
    assert pool.alloc(30 * MIB)


def test_the_smaller_of_limit_and_fraction_counts(pool: _core.Pool) -> None:
    _, total_bytes = _core.memory_info(0)
    allocator.configure(limit="1GiB", fraction=0.25)
    assert pool.limit_bytes() == total_bytes // 4
    allocator.configure(limit="32MiB")
    assert pool.limit_bytes() == 32 * MIB
    assert pool.settings()["fraction"] == 0.25


def test_idle_memory_above_a_new_limit_goes_back_at_once(pool: _core.Pool) -> None:
    live = pool.alloc(16 * MIB)
    pool.free(pool.alloc(100 * MIB))
    allocator.configure(limit="32MiB")
    assert held_bytes(pool) <= 32 * MIB
    # What lives stays, even above the limit.
    allocator.configure(limit="8MiB")
    assert held_bytes(pool) == 16 * MIB
    pool.check_invariants()
    pool.free(live)


def test_memory_that_a_stream_uses_stays_when_the_limit_falls(pool: _core.Pool, cuda: Cuda) -> None:
    address = pool.alloc(64 * MIB)
    cuda.fill(address, 64 * MIB, 0)
    pool.free(address)
    allocator.configure(limit="32MiB")
    assert held_bytes(pool) == 64 * MIB
    cuda.synchronize()
    assert pool.alloc(32 * MIB)
    assert held_bytes(pool) <= 64 * MIB


def test_a_device_may_have_settings_of_its_own(pool: _core.Pool) -> None:
    allocator.configure(device=0, limit="48MiB")
    assert pool.limit_bytes() == 48 * MIB
    allocator.configure(wait_max="250ms")
    assert pool.settings()["limit"] == 48 * MIB
    assert pool.settings()["wait_max"] == 0.25


def test_unmapped_max_gives_idle_memory_back(pool: _core.Pool) -> None:
    allocator.configure(unmapped_max=0)
    # Two holes of 4 MiB serve a block of 5: of what is unmapped for it a part is left over.
    pieces = [pool.alloc(4 * MIB) for _ in range(5)]
    pool.free(pieces[1])
    pool.free(pieces[3])
    pool.alloc(5 * MIB)
    mapped = sum(segment["size_bytes"] for segment in pool.segments())
    assert held_bytes(pool) == mapped


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limt": "1GiB"}, "no setting 'limt'; the nearest is 'limit'"),
        ({"fractoin": 0.5}, "the nearest is 'fraction'"),
        ({"wait": 3}, "the nearest is 'wait_max'"),
        ({"thread_cahce": False}, "the nearest is 'thread_cache'"),
        ({"limit": "20 parsecs"}, "limit=20 parsecs is not understood; write a size"),
        ({"limit": -1}, "limit=-1 is not understood"),
        ({"limit": "1e3GiB"}, "limit=1e3GiB is not understood"),
        ({"limit": ["1GiB"]}, "is not understood; a setting is a number or a text"),
        ({"limit": "1GiB,fraction=0.5"}, "is more than one setting; give each one by its own"),
        ({"limit": 0.5}, "is less than a byte; for a share of the device write fraction"),
        ({"limit": "0.9"}, "limit=0.9 is not understood; it is less than a byte"),
        ({"fraction": 1.5}, "from 0 to 1"),
        ({"fraction": float("nan")}, "from 0 to 1"),
        ({"fraction": -1e-30}, "from 0 to 1"),
        ({"fraction": None}, "from 0 to 1"),
        ({"wait_max": "1h"}, "such as 30s or 500ms"),
        ({"wait_max": -1}, "such as 30s or 500ms"),
        ({"virtual_memory": "maybe"}, "auto, on or off"),
        ({"thread_cache": "perhaps"}, "write on or off"),
        ({"check_every": 2.5}, "whole number"),
        ({"check_every": -1}, "whole number"),
    ],
)
def test_what_is_wrong_changes_nothing(
    pool: _core.Pool, settings: dict[str, Any], message: str
) -> None:
    before = pool.settings()
    with pytest.raises(spillover.ConfigError, match=re.escape(message)):
        allocator.configure(unmapped_max="1GiB", **settings)
    assert pool.settings() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit", "'limit' is not a setting; write key=value"),
        ("limit:1GiB", "'limit:1GiB' is not a setting"),
        (",limit=1GiB", "'' is not a setting"),
        ("limit=1GiB,limit=2GiB", "limit is set twice"),
        ("limit=", "limit= is not understood"),
        ("=1GiB", "there is no setting ''"),
    ],
)
def test_a_text_must_have_the_form(pool: _core.Pool, text: str, message: str) -> None:
    with pytest.raises(spillover.ConfigError, match=re.escape(f"here: {message}")):
        pool.configure(text, "here")


def test_blanks_and_a_last_comma_do_not_count(pool: _core.Pool) -> None:
    pool.configure(" limit = 48 mib , wait_max=2 s,", "here")
    assert (pool.settings()["limit"], pool.settings()["wait_max"]) == (48 * MIB, 2.0)


@pytest.mark.parametrize("key", ["virtual_memory", "thread_cache"])
def test_some_settings_cannot_change_later(pool: _core.Pool, key: str) -> None:
    with pytest.raises(spillover.StateError, match=f"{key} cannot change once device 0's pool"):
        pool.configure(f"{key}=off", "here")


def test_what_cannot_change_later_is_set_with_the_first_pool(
    run_emulated: Callable[..., Any],
) -> None:
    run_emulated(
        """
        import spillover
        from spillover import allocator
        try:
            allocator.Pool(0, virtual_memory="of")
        except spillover.ConfigError as error:
            assert "auto, on or off" in str(error), error
        else:
            raise AssertionError("no error")
        settings = allocator.Pool(0, virtual_memory="off", limit="64MiB").settings()
        assert (settings["virtual_memory"], settings["limit"]) == ("off", 64 << 20), settings
        assert settings["wait_max"] == 5.0, settings
        allocator.configure(device=1, thread_cache=False)
        assert allocator.Pool(1).settings()["thread_cache"] is False
        assert allocator.Pool(2).settings() != allocator.Pool(1).settings()
        """,
        devices=3,
        env={"SPILLOVER_ALLOCATOR": "wait_max=5s"},
    )


def test_what_one_device_refuses_no_device_takes(run_emulated: Callable[..., Any]) -> None:
    run_emulated(
        """
        import spillover
        from spillover import allocator
        pools = [allocator.Pool(0, thread_cache=False), allocator.Pool(1)]
        before = [pool.settings() for pool in pools]
        try:
            allocator.configure(limit="64MiB", thread_cache=False)
        except spillover.StateError as error:
            assert "thread_cache cannot change once device 1's pool" in str(error), error
        else:
            raise AssertionError("no error")
        assert [pool.settings() for pool in [*pools, allocator.Pool(2)]] == [*before, before[1]]
        """,
        devices=3,
    )


def test_settings_stay_where_memory_above_the_limit_cannot_be_given_back(
    pool: _core.Pool, cuda: Cuda
) -> None:
    before = pool.settings()
    live = pool.alloc(16 * MIB)
    pool.free(pool.alloc(40 * MIB))
    call = "cuMemUnmap" if cuda.has_virtual_memory else "cuMemFree"
    for configure in (
        lambda: allocator.configure(limit="8MiB", wait_max=3),
        lambda: allocator.configure(device=0, limit="8MiB", wait_max=3),
        lambda: pool.set_memory_fraction(8 * MIB / _core.memory_info(0)[1]),
    ):
        with faults(Fault(call)), pytest.raises(spillover.DriverError, match=call):
            configure()
        assert pool.settings() == before
        pool.check_invariants()
        pool.free(pool.alloc(40 * MIB))
    allocator.configure(limit="8MiB")
    assert held_bytes(pool) == 16 * MIB
    pool.free(live)


def test_one_device_that_fails_keeps_the_settings_of_all(
    run_emulated: Callable[..., Any], cuda: Cuda
) -> None:
    run_emulated(
        """
        import sys
        import spillover
        from spillover import allocator
        from spillover.emulator import Fault, calls, faults
        pools = [allocator.Pool(device) for device in range(3)]
        before = [pool.settings() for pool in pools]
        for pool in pools[:2]:
            pool.allocate("16MiB").free()
        name = sys.argv[1]
        with faults(Fault(name, call=2)):
            try:
                allocator.configure(limit=0)
            except spillover.DriverError as error:
                assert name in str(error), error
            else:
                raise AssertionError("no error")
            assert calls()[name] == 2
        pools.append(allocator.Pool(3))
        assert [pool.settings() for pool in pools] == [*before, before[0]]
        assert pools[0].allocate("32MiB")
        """,
        "cuMemUnmap" if cuda.has_virtual_memory else "cuMemFree",
        devices=4,
    )


def test_the_environment_is_read_before_the_first_pool(
    run_emulated: Callable[..., Any],
) -> None:
    run_emulated(
        """
        from spillover import allocator
        settings = allocator.Pool().settings()
        assert settings["limit"] == 96 << 20, settings
        assert settings["thread_cache"] is False, settings
        """,
        env={"SPILLOVER_ALLOCATOR": "limit=96MiB, thread_cache=off"},
    )


def test_keywords_come_after_the_environment(run_emulated: Callable[..., Any]) -> None:
    run_emulated(
        """
        from spillover import allocator
        allocator.configure(limit="64MiB")
        settings = allocator.Pool(virtual_memory="auto").settings()
        assert (settings["limit"], settings["wait_max"]) == (64 << 20, 5.0), settings
        """,
        env={"SPILLOVER_ALLOCATOR": "limit=96MiB,wait_max=5s"},
    )


def test_a_wrong_environment_is_told_by_install(run_emulated: Callable[..., Any]) -> None:
    run_emulated(
        """
        import spillover
        try:
            spillover.allocator.install()
        except spillover.ConfigError as error:
            assert str(error).startswith("SPILLOVER_ALLOCATOR: there is no setting 'limits'"), error
            assert "the nearest is 'limit'" in str(error), error
        else:
            raise AssertionError("no error")
        """,
        env={"SPILLOVER_ALLOCATOR": "limits=20GiB"},
    )


def test_install_takes_settings(run_emulated: Callable[..., Any]) -> None:
    run_emulated(
        """
        import spillover
        assert spillover.allocator.install(limit="128MiB")
        import torch
        held = torch.empty(100 << 20, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(100 << 20, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert "This process may use 128.00 MiB" in str(error), error
        else:
            raise AssertionError("no error")
        """
    )


def test_trim_keeps_what_it_is_told(pool: _core.Pool) -> None:
    live = pool.alloc(10 * MIB)
    blocks = [pool.alloc(20 * MIB) for _ in range(5)]
    for block in blocks:
        pool.free(block)
    allocator.trim(keep="40MiB")
    # Memory goes to the driver in whole chunks.
    kept_bytes = held_bytes(pool)
    assert 30 * MIB <= kept_bytes <= 40 * MIB
    allocator.trim(keep="1GiB")
    assert held_bytes(pool) == kept_bytes
    allocator.trim(keep=kept_bytes - 1)
    assert held_bytes(pool) < kept_bytes
    allocator.trim()
    assert held_bytes(pool) == 10 * MIB
    pool.free(live)
    with pytest.raises(spillover.ConfigError, match="keep"):
        allocator.trim(keep="a lot")

"""The happens-before checker reports seeded ordering bugs under every schedule, fixed ones not."""

from __future__ import annotations

import re
from ctypes import byref, c_char_p

import pytest
from driver_ctypes import (
    HAZARD,
    MIB,
    NOT_READY,
    SCHEDULES,
    SUCCESS,
    Buffer,
    Driver,
    expect,
    run_program,
)

SIZE = 1000


def check(cuda: Driver, status: int, *, fixed: bool, words: str) -> None:
    """Exactly one hazard with these words in the broken version, none in the fixed one."""
    hazards = cuda.hazards()
    if fixed:
        assert (status, hazards) == (SUCCESS, [])
        return
    expect(HAZARD, status)
    assert len(hazards) == 1, hazards
    assert re.search(words, hazards[0]), hazards[0]
    assert cuda.library.spillover_emulator_last_hazard().decode() == hazards[0]
    text = c_char_p()
    cuda("cuGetErrorString", HAZARD, byref(text))
    assert text.value == hazards[0].encode()


def no_wait_before_use(*, fixed: bool = False) -> None:
    cuda = Driver()
    copies, compute, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    cuda.upload(pointer, cuda.pinned(SIZE), copies)
    if fixed:
        cuda.order(copies, compute)
    status = cuda.operator(compute, "aten::sum", reads=[(pointer, SIZE)])
    words = (
        r"hazard: read of 1000 bytes at 0x[0-9a-f]+ by aten::sum on stream \d+ \(operation \d+\) "
        r"is not ordered after write by memcpy host-to-device on stream \d+ \(operation \d+\); "
        r"make the reader wait: record an event after the write and wait for it"
    )
    check(cuda, status, fixed=fixed, words=words)


def no_wait_for_the_producer(*, fixed: bool = False) -> None:
    cuda = Driver()
    copies, compute, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    expect(SUCCESS, cuda.operator(compute, "aten::mm", writes=[(pointer, SIZE)]))
    if fixed:
        cuda.order(compute, copies)
    target = cuda.pinned(SIZE)
    status = cuda.status("cuMemcpyDtoHAsync_v2", target, pointer, SIZE, copies)
    words = "read of .* by memcpy device-to-host .* after write by aten::mm"
    check(cuda, status, fixed=fixed, words=words)


def staging_buffer_reused_early(*, fixed: bool = False) -> None:
    cuda = Driver()
    copies, pointer, staging = cuda.stream(), cuda.alloc(SIZE), cuda.pinned(SIZE)
    expect(SUCCESS, cuda.host_access(writes=[staging]))
    cuda.upload(pointer, staging, copies)
    if fixed:
        cuda("cuEventSynchronize", cuda.record(copies))
    status = cuda.host_access(writes=[staging])
    words = "write of .* by host code on the host is not ordered after read by memcpy"
    check(cuda, status, fixed=fixed, words=words)


def early_unmap(*, fixed: bool = False) -> None:
    cuda = Driver()
    stream, pointer = cuda.stream(), cuda.reserve(2 * MIB)
    cuda.map(pointer, 2 * MIB, cuda.create(2 * MIB))
    expect(SUCCESS, cuda.operator(stream, "aten::add_", writes=[(pointer, SIZE)]))
    if fixed:
        cuda.sync(stream)
    status = cuda.status("cuMemUnmap", pointer, 2 * MIB)
    words = "free of 2097152 bytes .* by cuMemUnmap on the host .* after write by aten::add_"
    check(cuda, status, fixed=fixed, words=words)


def early_free_on_another_stream(*, fixed: bool = False) -> None:
    cuda = Driver()
    owner, user = cuda.stream(), cuda.stream()
    pointer = cuda.alloc_async(SIZE, owner)
    cuda.fill(pointer, 1, SIZE, owner)
    cuda.order(owner, user)
    expect(SUCCESS, cuda.operator(user, "aten::relu", reads=[(pointer, SIZE)]))
    if fixed:
        cuda.order(user, owner)
    status = cuda.status("cuMemFreeAsync", pointer, owner)
    words = "free of .* by cuMemFreeAsync on stream .* after read by aten::relu"
    check(cuda, status, fixed=fixed, words=words)


def address_recycled_early(*, fixed: bool = False) -> None:
    """What a caching allocator does: hands memory on with no driver call."""
    cuda = Driver()
    side, main, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    cuda.fill(pointer, 0, SIZE, main)
    cuda.order(main, side)
    target = cuda.pinned(SIZE)
    cuda.download(target, pointer, side)
    if fixed:  # record_stream
        event = cuda.record(side)
        while cuda.status("cuEventQuery", event) == NOT_READY:
            pass
    status = cuda.operator(main, "aten::fill_", writes=[(pointer, SIZE)])
    words = (
        "write of .* by aten::fill_ .* after read by memcpy device-to-host .*make the writer wait"
    )
    check(cuda, status, fixed=fixed, words=words)


def host_read_before_sync(*, fixed: bool = False) -> None:
    cuda = Driver()
    stream, pointer, target = cuda.stream(), cuda.alloc(SIZE), cuda.pinned(SIZE)
    cuda.fill(pointer, 1, SIZE, stream)
    cuda.download(target, pointer, stream)
    if fixed:
        cuda.sync(stream)
    status = cuda.host_access(reads=[target])
    words = "read of .* by host code on the host .* write by memcpy device-to-host .*host must wait"
    check(cuda, status, fixed=fixed, words=words)


BUGS = (
    no_wait_before_use,
    no_wait_for_the_producer,
    staging_buffer_reused_early,
    early_unmap,
    early_free_on_another_stream,
    address_recycled_early,
    host_read_before_sync,
)


def all_bugs() -> None:
    """Each bug and its fix, one after the other on one device."""
    cuda = Driver()
    for bug in BUGS:
        for fixed in (False, True):
            cuda("cuCtxSynchronize")
            cuda.library.spillover_emulator_hazards_clear()
            bug(fixed=fixed)


def orders_that_count() -> None:
    """Everything that CUDA orders is seen as ordered."""
    cuda = Driver()
    first, second, blocking = cuda.stream(), cuda.stream(), cuda.stream(0)
    pointer, pinned = cuda.alloc(SIZE), cuda.pinned(SIZE)
    use = [(pointer, SIZE)]
    expect(SUCCESS, cuda.operator(first, "one", writes=use))
    event = cuda.record(first)
    while cuda.status("cuEventQuery", event) == NOT_READY:
        pass
    expect(SUCCESS, cuda.operator(second, "two", writes=use))  # a query that said "done"
    while cuda.status("cuStreamQuery", second) == NOT_READY:
        pass
    expect(SUCCESS, cuda.operator(blocking, "three", writes=use))  # the same of a stream
    expect(SUCCESS, cuda.operator(0, "four", writes=use))  # the default stream's order
    expect(SUCCESS, cuda.operator(blocking, "five", writes=use))  # and the other way round
    cuda("cuMemcpyDtoH_v2", pinned, pointer, SIZE)  # blocks
    expect(SUCCESS, cuda.host_access(reads=[pinned]))
    cuda.download(Buffer.pageable(SIZE), pointer, 0)  # blocks too, pageable
    expect(SUCCESS, cuda.operator(first, "six", writes=use))
    cuda.order(first, blocking)
    cuda.order(blocking, second)  # handed on
    expect(SUCCESS, cuda.operator(second, "seven", reads=use))
    cuda("cuCtxSynchronize")
    expect(SUCCESS, cuda.operator(first, "eight", writes=use))
    cuda("cuStreamWaitEvent", 0, cuda.record(first), 0)
    expect(SUCCESS, cuda.operator(blocking, "nine", writes=use))  # through the default stream
    assert cuda.hazards() == []


def reads_do_not_conflict() -> None:
    cuda = Driver()
    streams, pointer = [cuda.stream() for _ in range(3)], cuda.alloc(SIZE)
    for stream in streams:
        expect(SUCCESS, cuda.operator(stream, "read", reads=[(pointer, SIZE)]))
    for stream in streams[:-1]:
        cuda.order(stream, streams[-1])
    expect(SUCCESS, cuda.operator(streams[-1], "write", writes=[(pointer, SIZE)]))
    # Neighbours do not conflict either, to the byte.
    expect(SUCCESS, cuda.operator(streams[0], "left", writes=[(pointer + SIZE, 0)]))
    left, right = (pointer, 500), (pointer + 500, 500)
    cuda("cuCtxSynchronize")
    expect(SUCCESS, cuda.operator(streams[0], "left", writes=[left]))
    expect(SUCCESS, cuda.operator(streams[1], "right", writes=[right]))
    expect(HAZARD, cuda.operator(streams[1], "over", reads=[(pointer + 499, 1)]))


def columns_of_a_matrix() -> None:
    """Pitched copies touch their rows alone."""
    cuda = Driver()
    first, second, pointer = cuda.stream(), cuda.stream(), cuda.alloc(1024)

    def fill_columns(offset: int, stream: int) -> int:
        return cuda.status("cuMemsetD2D8Async", pointer + offset, 64, 1, 32, 16, stream)

    expect(SUCCESS, fill_columns(0, first))
    expect(SUCCESS, fill_columns(32, second))
    expect(HAZARD, fill_columns(31, second))


def freed_memory_is_forgotten() -> None:
    """Addresses that the driver hands out again carry no history."""
    cuda = Driver()
    first, second, pinned = cuda.stream(), cuda.stream(), cuda.pinned(SIZE)
    pointer = cuda.alloc(SIZE)
    cuda.upload(pointer, pinned, first)
    cuda.free(pointer)  # waits
    assert cuda.alloc(SIZE) == pointer
    expect(SUCCESS, cuda.operator(second, "next", writes=[(pointer, SIZE)]))
    cuda("cuMemFreeHost", pinned)
    again = cuda.alloc_async(SIZE, first)
    cuda.fill(again, 1, SIZE, first)
    cuda("cuMemFreeAsync", again, first)
    cuda.sync(first)
    reused = cuda.alloc_async(SIZE, second)
    cuda.fill(reused, 1, SIZE, second)
    assert cuda.hazards() == []


def outputs_allocated_after_launch() -> None:
    """An operator learns what its outputs' allocator learnt by polling after it began."""
    cuda = Driver()
    side, main, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    cuda.fill(pointer, 1, SIZE, side)
    event = cuda.record(side)
    expect(SUCCESS, cuda.operator(main, "aten::empty"))
    while cuda.status("cuEventQuery", event) == NOT_READY:
        pass
    expect(SUCCESS, cuda.operator(main, "aten::empty", writes=[(pointer, SIZE)]))


def recycled_streams() -> None:
    """A new stream with an old one's handle and number is still another stream."""
    cuda = Driver()
    pointer = cuda.alloc(SIZE)
    for _ in range(200):
        stream = cuda.stream()
        cuda.fill(pointer, 1, SIZE, stream)
        cuda.sync(stream)
        cuda("cuStreamDestroy_v2", stream)
    assert cuda.hazards() == []
    old = cuda.stream()
    cuda.fill(pointer, 2, SIZE, old)
    cuda("cuStreamDestroy_v2", old)
    new = cuda.stream()
    assert new == old
    expect(HAZARD, cuda.status("cuMemsetD8Async", pointer, 3, SIZE, new))
    cuda("cuCtxSynchronize")  # also waits for streams that are gone
    expect(SUCCESS, cuda.status("cuMemsetD8Async", pointer, 4, SIZE, cuda.stream()))


def counting() -> None:
    cuda = Driver()
    first, second, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    for _ in range(10):
        cuda.fill(pointer, 1, SIZE, first)
        cuda.fill(pointer, 1, SIZE, second)
    count = cuda.library.spillover_emulator_hazard_count()
    texts = cuda.hazards()
    print(count, len(texts), cuda.library.spillover_emulator_hazards_enabled())
    cuda.library.spillover_emulator_hazards_clear()
    assert cuda.library.spillover_emulator_hazard_count() == 0


ORDERS = (
    orders_that_count,
    reads_do_not_conflict,
    columns_of_a_matrix,
    freed_memory_is_forgotten,
    outputs_allocated_after_launch,
    recycled_streams,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bugs_are_reported_and_their_fixes_are_not(schedule: str) -> None:
    run_program(all_bugs, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_counts_as_ordered(schedule: str) -> None:
    run_program(*ORDERS, schedule=schedule)


@pytest.mark.parametrize(
    ("policy", "printed", "lines"),
    [("off", "0 0 0", 0), ("count", "19 2 1", 0), ("warn", "19 2 1", 2)],
)
def test_policies(policy: str, printed: str, lines: int) -> None:
    result = run_program(counting, hazards=policy)
    assert result.stdout.strip() == printed
    assert result.stderr.count("hazard: ") == lines

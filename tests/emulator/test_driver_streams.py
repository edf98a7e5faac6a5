"""Streams, events and host functions under each schedule."""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import byref, c_int, c_uint64, c_void_p

import pytest
from driver_ctypes import (
    HOST_FUNCTION,
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    INVALID_VALUE,
    LEGACY,
    MIB,
    NOT_PERMITTED,
    NOT_READY,
    PER_THREAD,
    SCHEDULES,
    SUCCESS,
    Buffer,
    Driver,
    elapsed_ms,
    expect,
    flags_of,
    run_program,
)


def fifo_and_event_order() -> None:
    cuda = Driver()
    first, second = cuda.stream(), cuda.stream()
    pointer, copied = cuda.alloc(MIB), cuda.alloc(MIB)
    source, target = cuda.pinned(MIB).fill(7), cuda.pinned(MIB).fill(0)
    for value in range(20):
        cuda.fill(pointer, value, MIB, first)
    cuda.upload(pointer, source, first)
    cuda.order(first, second)
    cuda.copy(copied, pointer, MIB, second)
    cuda.order(second, first)
    cuda.fill(pointer, 1, MIB, first)  # must not overtake the copy
    cuda.download(target, copied, second)
    cuda.sync(second)
    assert target.holds(7)
    assert cuda.fetch(pointer, 10) == b"\1" * 10


def long_chain_of_waits() -> None:
    """Waits back and forth between two streams, thousands deep."""
    cuda = Driver()
    streams, pointer = (cuda.stream(), cuda.stream()), cuda.alloc(4)
    for step in range(3000):
        cuda("cuMemsetD32Async", pointer, step, 1, streams[step % 2])
        cuda.order(streams[step % 2], streams[(step + 1) % 2])
    cuda.sync(streams[1])
    assert cuda.peek(pointer, 4) == (2999).to_bytes(4, "little")


def legacy_stream_order() -> None:
    cuda = Driver()
    blocking, source = cuda.stream(0), cuda.pinned(MIB).fill(1)
    pointer, copied, target = cuda.alloc(MIB), cuda.alloc(MIB), cuda.pinned(MIB)
    for default in (0, LEGACY):
        cuda.upload(pointer, source, blocking)
        cuda.copy(copied, pointer, MIB, default)  # after everything on blocking streams
        cuda.download(target, copied, blocking)  # after everything on the default stream
        cuda.sync(blocking)
        assert target.holds(1)
        target.fill(0)
    cuda.upload(pointer, source, PER_THREAD)  # blocks too
    cuda.copy(copied, pointer, MIB, 0)
    cuda.sync(0)
    assert cuda.peek(copied, 3) == b"\1\1\1"
    assert (flags_of(cuda, blocking), flags_of(cuda, cuda.stream(1))) == (0, 1)


def pageable_and_pinned() -> None:
    cuda = Driver()
    stream, pointer = cuda.stream(), cuda.alloc(MIB)
    pageable = Buffer.pageable(MIB).fill(5)
    cuda.upload(pointer, pageable, stream)
    pageable.fill(6)  # the bytes were taken at the call
    cuda.download(pageable, pointer, stream)  # and are there when the call returns
    assert pageable.holds(5)
    cuda.sync(stream)


def stream_destroyed_with_pending_work() -> None:
    cuda = Driver()
    live = cuda.live()[4]
    stream, other, pointer = cuda.stream(), cuda.stream(), cuda.alloc(MIB)
    source, target = cuda.pinned(MIB).fill(3), cuda.pinned(MIB)
    cuda.upload(pointer, source, stream)
    event = cuda.record(stream)
    cuda("cuStreamDestroy_v2", stream)
    expect(INVALID_HANDLE, cuda.status("cuStreamQuery", stream))
    expect(INVALID_HANDLE, cuda.status("cuStreamDestroy_v2", stream))
    cuda("cuStreamWaitEvent", other, event, 0)
    cuda.download(target, pointer, other)
    cuda.sync(other)
    assert target.holds(3)
    reissued = cuda.stream()
    assert reissued == stream  # as CUDA may do
    cuda.fill(pointer, 1, MIB, reissued)
    cuda("cuStreamDestroy_v2", reissued)
    cuda("cuCtxSynchronize")
    assert cuda.peek(pointer, 2) == b"\1\1"
    assert cuda.live()[4] == live + 1


def queries_make_progress() -> None:
    cuda = Driver()
    stream, pointer, source = cuda.stream(), cuda.alloc(MIB), cuda.pinned(MIB).fill(2)
    for _ in range(5):
        cuda.upload(pointer, source, stream)
    event = cuda.record(stream)
    for _ in range(10000):
        if cuda.status("cuEventQuery", event) == SUCCESS:
            break
        time.sleep(0)
    assert cuda.status("cuEventQuery", event) == SUCCESS
    cuda.upload(pointer, source, stream)
    for _ in range(10000):
        if cuda.status("cuStreamQuery", stream) == SUCCESS:
            break
        time.sleep(0)
    assert cuda.peek(pointer, 2) == b"\2\2"


def query_does_not_block_on_a_running_operation() -> None:
    cuda = Driver()
    stream, gate, entered = cuda.stream(), threading.Event(), threading.Event()

    @HOST_FUNCTION
    def wait(_: object) -> None:
        entered.set()
        gate.wait(20)

    cuda("cuLaunchHostFunc", stream, wait, None)
    event = cuda.record(stream)
    assert entered.wait(20)  # without a call of ours
    for _ in range(100):
        expect(NOT_READY, cuda.status("cuEventQuery", event))
        expect(NOT_READY, cuda.status("cuStreamQuery", stream))
    gate.set()
    cuda("cuEventSynchronize", event)
    cuda.sync(stream)


def host_functions_fire_without_a_wait() -> None:
    cuda = Driver()
    stream, other, pointer = cuda.stream(), cuda.stream(), cuda.alloc(1000)
    source, target = cuda.pinned(1000).fill(8), cuda.pinned(1000).fill(0)
    seen: list[bytes] = []
    done = threading.Event()

    @HOST_FUNCTION
    def look(_: object) -> None:
        seen.append(target.get())
        seen.append(bytes([cuda.status("cuStreamQuery", stream) % 256]))
        done.set()

    cuda.upload(pointer, source, other)
    cuda.order(other, stream)
    cuda.download(target, pointer, stream)
    cuda("cuLaunchHostFunc", stream, look, None)
    assert done.wait(20)
    assert seen == [b"\x08" * 1000, bytes([NOT_PERMITTED % 256])]
    cuda.sync(stream)


def host_function_while_another_thread_synchronises() -> None:
    """A callback that needs the main thread, while another thread waits for its stream."""
    cuda = Driver()
    stream, other, gate = cuda.stream(), cuda.stream(), threading.Event()

    @HOST_FUNCTION
    def wait(_: object) -> None:
        assert gate.wait(20)

    cuda("cuLaunchHostFunc", stream, wait, None)
    waiter = threading.Thread(target=lambda: (cuda.use_device(0), cuda.sync(stream)))
    waiter.start()
    pointer = cuda.alloc(1000)
    cuda.fill(pointer, 1, 1000, other)
    cuda.sync(other)  # not held up by the other stream
    gate.set()
    waiter.join(20)
    assert not waiter.is_alive()


def stream_callbacks() -> None:
    cuda = Driver()
    stream, seen = cuda.stream(), []
    kind = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_void_p)
    callback = kind(lambda handle, status, data: seen.append((handle, status, data)))
    cuda("cuStreamAddCallback", stream, callback, 77, 0)
    cuda.sync(stream)
    assert seen == [(stream, 0, 77)]


def events() -> None:
    cuda = Driver()
    stream, never, timed = cuda.stream(), cuda.event(), [cuda.event(0) for _ in range(2)]
    expect(SUCCESS, cuda.status("cuEventQuery", never))
    cuda("cuEventSynchronize", never)
    cuda("cuStreamWaitEvent", stream, never, 0)
    assert elapsed_ms(cuda, *timed)[0] == INVALID_HANDLE  # not recorded
    pointer = cuda.alloc(1000)
    for event in timed:
        cuda.fill(pointer, 1, 1000, stream)
        cuda.record(stream, event)
    cuda.sync(stream)
    code, milliseconds = elapsed_ms(cuda, *timed)
    assert code == SUCCESS
    assert milliseconds >= 0
    cuda.record(stream, never)
    assert elapsed_ms(cuda, timed[0], never)[0] == INVALID_HANDLE  # timing is disabled
    cuda("cuEventDestroy_v2", never)
    expect(INVALID_HANDLE, cuda.status("cuEventQuery", never))
    expect(INVALID_HANDLE, cuda.status("cuEventRecord", never, stream))
    expect(INVALID_HANDLE, cuda.status("cuEventDestroy_v2", never))
    assert cuda.event() != never  # handles of events are not issued again
    expect(INVALID_HANDLE, cuda.status("cuEventRecord", timed[0], 0xDEAD00))
    expect(INVALID_HANDLE, cuda.status("cuStreamSynchronize", 0xDEAD00))
    expect(INVALID_VALUE, cuda.status("cuStreamCreate", byref(c_uint64()), 2))


def late_runs_nothing_early() -> None:
    cuda = Driver()
    stream, pointer, source = cuda.stream(), cuda.alloc(100), cuda.pinned(100).fill(1)
    cuda.upload(pointer, source, stream)
    event = cuda.record(stream)
    time.sleep(0.05)
    assert cuda.peek(pointer, 4) == b"\xff" * 4
    expect(NOT_READY, cuda.status("cuEventQuery", event))
    source.fill(2)  # a race: the copy has not read its source
    cuda("cuEventSynchronize", event)
    assert cuda.peek(pointer, 4) == b"\2" * 4


def eager_runs_at_once() -> None:
    cuda = Driver()
    pointer = cuda.alloc(100)
    cuda.fill(pointer, 1, 100, cuda.stream())
    assert cuda.peek(pointer, 4) == b"\1" * 4


def threaded_runs_by_itself() -> None:
    cuda = Driver()
    stream, pointer = cuda.stream(), cuda.alloc(100)
    cuda.fill(pointer, 1, 100, stream)
    deadline = time.monotonic() + 20
    while cuda.peek(pointer, 4) != b"\1" * 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert cuda.peek(pointer, 4) == b"\1" * 4


def random_order() -> None:
    """Print which of eight unordered copies have run after each call."""
    cuda = Driver()
    pointer, trace = cuda.alloc(8), []
    streams = [cuda.stream() for _ in range(8)]
    for index, stream in enumerate(streams):
        cuda.fill(pointer + index, 1, 1, stream)
        trace.append(cuda.peek(pointer, 8).replace(b"\xff", b"."))
    for _ in range(8):
        cuda("cuDeviceGet", byref(c_int()), 0)
        trace.append(cuda.peek(pointer, 8).replace(b"\xff", b"."))
    print(trace)


def values_in_memory() -> None:
    cuda = Driver()
    first, second, pointer, flag = cuda.stream(), cuda.stream(), cuda.alloc(4), cuda.alloc(64)
    cuda("cuMemsetD32_v2", flag, 0, 4)
    cuda("cuCtxSynchronize")
    cuda("cuStreamWaitValue32_v2", second, flag, 3, 0)  # at least 3
    cuda("cuMemsetD32Async", pointer, 1, 1, second)
    cuda("cuMemsetD32Async", flag + 4, 1, 1, first)
    cuda("cuStreamWriteValue32_v2", first, flag, 3, 0)
    cuda.sync(second)
    assert cuda.peek(pointer, 1) == b"\1"
    host = cuda.pinned(8).fill(0)
    cuda("cuStreamWaitValue64_v2", second, host, 1, 1)  # exactly 1
    waiter = threading.Thread(target=lambda: (cuda.use_device(0), cuda.sync(second)))
    waiter.start()
    time.sleep(0.01)
    assert waiter.is_alive()
    host.fill(0)
    c_uint64.from_address(host.address).value = 1  # without a call
    waiter.join(20)
    assert not waiter.is_alive()
    expect(INVALID_VALUE, cuda.status("cuStreamWriteValue32_v2", first, flag + 1, 3, 0))
    expect(ILLEGAL_ADDRESS, cuda.status("cuStreamWriteValue32_v2", first, flag + 64, 3, 0))


def per_thread_streams() -> None:
    cuda = Driver()
    pointer, ids = cuda.alloc(3000), []

    def work() -> None:
        cuda.use_device(0)
        cuda.fill(pointer + 1000 * len(ids), 4, 1000, PER_THREAD)
        identity = c_uint64()
        cuda("cuStreamGetId", PER_THREAD, byref(identity))
        ids.append(identity.value)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert len(set(ids)) == 3
    assert cuda.fetch(pointer, 3000) == b"\4" * 3000  # also of threads that have ended


PROGRAMS = (
    fifo_and_event_order,
    long_chain_of_waits,
    legacy_stream_order,
    pageable_and_pinned,
    stream_destroyed_with_pending_work,
    queries_make_progress,
    query_does_not_block_on_a_running_operation,
    host_functions_fire_without_a_wait,
    host_function_while_another_thread_synchronises,
    stream_callbacks,
    events,
    values_in_memory,
    per_thread_streams,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_under_every_schedule(schedule: str) -> None:
    run_program(*PROGRAMS, schedule=schedule)


def test_late_runs_nothing_early() -> None:
    run_program(late_runs_nothing_early)


def test_eager_runs_at_once() -> None:
    run_program(eager_runs_at_once, schedule="eager")


def test_threaded_runs_by_itself() -> None:
    run_program(threaded_runs_by_itself, schedule="threaded")


def test_random_is_seeded() -> None:
    traces = [run_program(random_order, schedule="random", seed=seed).stdout for seed in (1, 1, 2)]
    assert traces[0] == traces[1]
    assert len(set(traces)) == 2

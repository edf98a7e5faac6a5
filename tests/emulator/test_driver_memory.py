"""Device, pinned, registered and managed memory, and what a pointer is."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p

from driver_ctypes import (
    ALREADY_REGISTERED,
    HAZARD,
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_VALUE,
    MIB,
    NOT_REGISTERED,
    OUT_OF_MEMORY,
    SUCCESS,
    Buffer,
    Driver,
    converted,
    copy_batch,
    expect,
    run_program,
)

MEMORY_TYPE = 2
DEVICE_POINTER = 3
HOST_POINTER = 4
IS_MANAGED = 8
DEVICE_ORDINAL = 9
RANGE_START = 11
RANGE_SIZE = 12
PER_THREAD_NULL = 2  # CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM


def attribute(cuda: Driver, which: int, pointer: int) -> tuple[int, int]:
    value = c_uint64(0)
    code = cuda.status("cuPointerGetAttribute", byref(value), which, pointer)
    return code, value.value


def device_memory() -> None:
    cuda = Driver()
    before = cuda.free_bytes()
    assert before == 64 * MIB
    small, large = cuda.alloc(1000), cuda.alloc(40 * MIB)
    assert cuda.fetch(large, 100) == b"\xff" * 100  # poison, not zeros
    expect(OUT_OF_MEMORY, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 40 * MIB))
    expect(OUT_OF_MEMORY, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 2**63))
    expect(INVALID_VALUE, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 0))
    expect(INVALID_VALUE, cuda.status("cuMemAlloc_v2", None, 10))
    expect(INVALID_VALUE, cuda.status("cuMemFree_v2", small + 8))
    expect(SUCCESS, cuda.status("cuMemFree_v2", 0))
    assert cuda.library.spillover_emulator_peak_bytes(0) >= 40 * MIB + 1000
    cuda.free(large)
    cuda.free(small)
    expect(INVALID_VALUE, cuda.status("cuMemFree_v2", small))
    assert cuda.free_bytes() == before
    assert cuda.live()[:2] == (0, 0)


def addresses() -> None:
    cuda = Driver()
    pointer, host = cuda.alloc(1000), Buffer.pageable(2000)
    expect(SUCCESS, cuda.status("cuMemcpyHtoD_v2", pointer, host, 1000))
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemcpyHtoD_v2", pointer, host, 1001))
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemsetD8Async", pointer + 999, 0, 2, 0))
    expect(INVALID_VALUE, cuda.status("cuMemcpyHtoD_v2", host.address, host, 10))
    expect(INVALID_VALUE, cuda.status("cuMemcpyDtoH_v2", pointer, pointer, 10))
    expect(INVALID_VALUE, cuda.status("cuMemsetD32_v2", pointer + 2, 0, 1))
    expect(INVALID_VALUE, cuda.status("cuMemcpyHtoD_v2", 0, host, 10))
    expect(SUCCESS, cuda.status("cuMemcpyHtoD_v2", pointer, host, 0))
    base, size = c_uint64(), c_size_t()
    cuda("cuMemGetAddressRange_v2", byref(base), byref(size), pointer + 500)
    assert (base.value, size.value) == (pointer, 1000)
    cuda.free(pointer)
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemcpyHtoD_v2", pointer, host, 1))


def pointer_attributes() -> None:
    cuda = Driver()
    device, pinned, plain = cuda.alloc(512), cuda.pinned(512), Buffer.pageable(512)
    assert attribute(cuda, MEMORY_TYPE, device + 5) == (SUCCESS, 2)
    assert attribute(cuda, MEMORY_TYPE, pinned.address + 5) == (SUCCESS, 1)
    assert attribute(cuda, MEMORY_TYPE, plain.address)[0] == INVALID_VALUE
    assert attribute(cuda, HOST_POINTER, device)[0] == INVALID_VALUE
    assert attribute(cuda, HOST_POINTER, pinned.address) == (SUCCESS, pinned.address)
    assert attribute(cuda, DEVICE_POINTER, pinned.address + 1) == (SUCCESS, pinned.address + 1)
    assert attribute(cuda, RANGE_START, device + 7) == (SUCCESS, device)
    assert attribute(cuda, RANGE_SIZE, device + 7) == (SUCCESS, 512)
    ordinal, kind = c_int(7), c_uint(7)
    which = (c_int * 2)(DEVICE_ORDINAL, MEMORY_TYPE)
    outs = (c_void_p * 2)(ctypes.addressof(ordinal), ctypes.addressof(kind))
    cuda("cuPointerGetAttributes", 2, which, outs, plain.address)
    assert (ordinal.value, kind.value) == (-2, 0)
    cuda("cuPointerGetAttributes", 2, which, outs, device)
    assert (ordinal.value, kind.value) == (0, 2)


def host_memory() -> None:
    cuda = Driver()
    pinned, own = cuda.pinned(4096), Buffer.pageable(8192)
    assert cuda.library.spillover_emulator_pinned_count() == 1
    cuda("cuMemHostRegister_v2", own, 8192, 0)
    expect(ALREADY_REGISTERED, cuda.status("cuMemHostRegister_v2", own.address + 100, 8, 0))
    expect(ALREADY_REGISTERED, cuda.status("cuMemHostRegister_v2", pinned, 8, 0))
    expect(INVALID_VALUE, cuda.status("cuMemFreeHost", own))
    expect(NOT_REGISTERED, cuda.status("cuMemHostUnregister", pinned))
    expect(NOT_REGISTERED, cuda.status("cuMemHostUnregister", own.address + 100))
    assert cuda.live()[2:4] == (4096 + 8192, 2)
    same = c_uint64()
    cuda("cuMemHostGetDevicePointer_v2", byref(same), own.address + 3, 0)
    assert same.value == own.address + 3
    cuda("cuMemHostUnregister", own)
    expect(NOT_REGISTERED, cuda.status("cuMemHostUnregister", own))
    cuda("cuMemFreeHost", pinned)
    expect(INVALID_VALUE, cuda.status("cuMemFreeHost", pinned))
    assert cuda.library.spillover_emulator_pinned_count() == 0


def managed_memory() -> None:
    cuda = Driver()
    pointer = c_uint64()
    cuda("cuMemAllocManaged", byref(pointer), 1000, 1)
    assert attribute(cuda, IS_MANAGED, pointer.value) == (SUCCESS, 1)
    cuda.fill(pointer.value, 5, 1000, 0)
    cuda.sync(0)
    assert Buffer(pointer.value, 1000).holds(5)  # the host reads it directly
    cuda.free(pointer.value)
    expect(INVALID_VALUE, cuda.status("cuMemFree_v2", pointer.value))


def stream_ordered_memory() -> None:
    cuda = Driver()
    stream, pool = cuda.stream(), c_uint64()
    cuda("cuDeviceGetDefaultMemPool", byref(pool), 0)
    first = cuda.alloc_async(40 * MIB, stream)
    used, high = c_uint64(), c_uint64()
    cuda("cuMemPoolGetAttribute", pool, 7, byref(used))
    assert used.value == 40 * MIB
    cuda.fill(first, 1, MIB, stream)
    cuda("cuMemFreeAsync", first, stream)
    expect(INVALID_VALUE, cuda.status("cuMemFreeAsync", first, stream))
    # The free's turn comes in time for an allocation that needs the room.
    second = cuda.alloc_async(40 * MIB, stream)
    cuda("cuMemPoolGetAttribute", pool, 8, byref(high))
    assert high.value == 40 * MIB
    cuda.free(second)
    expect(INVALID_VALUE, cuda.status("cuMemFreeAsync", cuda.alloc(100), stream))
    cuda("cuMemPoolTrimTo", pool, 0)
    threshold = c_uint64(12345)
    cuda("cuMemPoolSetAttribute", pool, 4, byref(threshold))
    cuda("cuMemPoolGetAttribute", pool, 4, byref(used))
    assert used.value == 12345
    expect(INVALID_VALUE, cuda.status("cuMemPoolDestroy", pool))


DURING_CALL, ANY_TIME = 2, 3


def batched_copies() -> None:
    """Both versions of the call: order with the stream, and what is refused."""
    cuda = Driver()
    stream, device = cuda.stream(), cuda.alloc(300)
    hosts = [cuda.pinned(100).fill(index) for index in range(3)]
    copies = [(device + 100 * index, host.address, 100) for index, host in enumerate(hosts)]
    cuda.fill(device, 9, 300, stream)
    cuda("cuMemcpyBatchAsync_v2", *copy_batch(copies), stream)
    back = [cuda.pinned(100) for _ in range(3)]
    cuda(
        "cuMemcpyBatchAsync_v2",
        *copy_batch([(host.address, device + 100 * index, 100) for index, host in enumerate(back)]),
        stream,
    )
    cuda.sync(stream)
    assert all(host.holds(index) for index, host in enumerate(back))
    failed = c_size_t(7)
    cuda("cuMemcpyBatchAsync", *copy_batch(copies, orders=(ANY_TIME,)), byref(failed), stream)
    assert failed.value == 2**64 - 1
    wrong = [*copies[:2], (device + 201, hosts[2].address, 100)]
    status = cuda.status("cuMemcpyBatchAsync", *copy_batch(wrong), byref(failed), stream)
    expect(ILLEGAL_ADDRESS, status)
    assert failed.value == 2
    for refused in (
        copy_batch(copies, orders=(0,)),
        copy_batch(copies, firsts=(1,)),
        copy_batch(copies, orders=(4,)),
    ):
        expect(INVALID_VALUE, cuda.status("cuMemcpyBatchAsync_v2", *refused, stream))
    expect(INVALID_VALUE, cuda.status("cuMemcpyBatchAsync_v2", *copy_batch(copies), 0))
    call = c_uint64()
    cuda("cuGetProcAddress_v2", b"cuMemcpyBatchAsync", byref(call), 13000, PER_THREAD_NULL, None)
    per_thread = ctypes.CFUNCTYPE(c_int)(call.value)
    cuda("cuCtxSynchronize")
    expect(SUCCESS, per_thread(*map(converted, (*copy_batch(copies), 0))))
    cuda("cuCtxSynchronize")
    # The source may be used again once the call is over.
    cuda("cuMemcpyBatchAsync_v2", *copy_batch(copies[:1], orders=(DURING_CALL,)), stream)
    hosts[0].fill(77)
    assert cuda.fetch(device, 100) == bytes(100)


def dependent_batches() -> None:
    """Copies of one batch have no order among themselves; batches have the stream's."""
    cuda = Driver()
    stream, device, host = cuda.stream(), cuda.alloc(400), cuda.pinned(400)
    here = [device + 100 * part for part in range(4)]
    there = [host.address + 100 * part for part in range(4)]
    name = "cuMemcpyBatchAsync_v2"
    for copies in (
        [(here[0], there[0], 100), (here[1], here[0], 100)],  # reads what the first one brings
        [(here[0], there[0], 100), (here[0] + 99, there[1], 100)],  # two to one byte
        [(here[1], here[0], 100), (here[0], there[0], 100)],  # overwrites what the first one reads
        [(here[0], there[0], 300), (here[3], there[3], 10), (here[2], there[1], 10)],
    ):
        expect(HAZARD, cuda.status(name, *copy_batch(copies), stream))
    assert all("kind: dependent copies in one batch" in text for text in cuda.hazards())
    cuda.library.spillover_emulator_hazards_clear()
    for copies in (
        [(here[0], there[0], 100), (here[1], there[0], 100)],  # one source for two
        [(here[0], there[0], 100), (here[1], there[1], 100), (here[2], there[2], 0)],
        [(there[0], here[0], 100), (there[1], here[1], 100)],
        [(here[1], here[0], 100)],
        [(here[0], there[0], 100)],
    ):
        cuda(name, *copy_batch(copies), stream)
    cuda.sync(stream)


def unordered_batch() -> None:
    """A batch is judged like the copies it is made of."""
    cuda = Driver()
    stream, device, host = cuda.stream(), cuda.alloc(100), cuda.pinned(100)
    cuda.fill(device, 1, 100, cuda.stream())
    status = cuda.status(
        "cuMemcpyBatchAsync_v2", *copy_batch([(host.address, device, 100)]), stream
    )
    expect(HAZARD, status)
    assert len(cuda.hazards()) == 1


def freed_before_its_turn() -> None:
    """A copy whose memory is unmapped before it runs: a sticky error, not a crash."""
    cuda = Driver()
    stream, source = cuda.stream(), cuda.pinned(100)
    pointer = cuda.reserve(2 * MIB)
    cuda.map(pointer, 2 * MIB, cuda.create(2 * MIB))
    cuda.upload(pointer, source, stream)
    expect(HAZARD, cuda.status("cuMemUnmap", pointer, 2 * MIB))
    expect(ILLEGAL_ADDRESS, cuda.status("cuStreamSynchronize", stream))
    expect(ILLEGAL_ADDRESS, cuda.status("cuCtxSynchronize"))
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 100))
    cuda("cuDevicePrimaryCtxReset_v2", 0)
    expect(SUCCESS, cuda.status("cuCtxSynchronize"))


def without_context() -> None:
    cuda = Driver()
    cuda("cuCtxSetCurrent", None)
    expect(INVALID_CONTEXT, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 100))
    expect(INVALID_CONTEXT, cuda.status("cuStreamSynchronize", 0))
    cuda.use_device(0)
    cuda.alloc(100)


def several_devices() -> None:
    cuda = Driver()
    count = c_int()
    cuda("cuDeviceGetCount", byref(count))
    assert count.value == 3
    first, host = cuda.alloc(1000), cuda.pinned(1000).fill(3)
    cuda.use_device(2)
    assert cuda.free_bytes() == 64 * MIB
    second, stream = cuda.alloc(1000), cuda.stream()
    device = c_int()
    cuda("cuStreamGetDevice", stream, byref(device))
    assert device.value == 2
    assert attribute(cuda, DEVICE_ORDINAL, second) == (SUCCESS, 2)
    assert attribute(cuda, DEVICE_ORDINAL, first) == (SUCCESS, 0)
    cuda.upload(second, host, stream)
    contexts = [c_void_p(), c_void_p()]
    for context, owner in zip(contexts, (0, 2), strict=True):
        cuda("cuDevicePrimaryCtxRetain", byref(context), owner)
    cuda("cuMemcpyPeerAsync", first, contexts[0], second, contexts[1], 1000, stream)
    assert cuda.fetch(first, 1000) == b"\3" * 1000
    cuda("cuCtxSetCurrent", None)
    cuda.use_device(0)
    peer = c_void_p()
    cuda("cuDevicePrimaryCtxRetain", byref(peer), 1)
    cuda("cuCtxEnablePeerAccess", peer, 0)
    expect(704, cuda.status("cuCtxEnablePeerAccess", peer, 0))


def test_device_memory() -> None:
    run_program(device_memory)


def test_addresses() -> None:
    result = run_program(addresses)
    assert "illegal address: write of 1001 bytes" in result.stderr


def test_pointer_attributes() -> None:
    run_program(pointer_attributes)


def test_host_memory() -> None:
    run_program(host_memory)


def test_managed_memory() -> None:
    run_program(managed_memory)


def test_stream_ordered_memory() -> None:
    run_program(stream_ordered_memory)


def test_batched_copies() -> None:
    run_program(batched_copies)


def test_dependent_batches() -> None:
    run_program(dependent_batches)


def test_unordered_batch() -> None:
    run_program(unordered_batch)


def test_freed_before_its_turn() -> None:
    result = run_program(freed_before_its_turn)
    assert "freed or unmapped between the call and the operation's turn" in result.stderr


def test_without_context() -> None:
    run_program(without_context)


def test_several_devices() -> None:
    run_program(several_devices, devices=3)

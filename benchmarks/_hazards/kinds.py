"""Each kind of bug that the checker finds, as a program that is broken and a program that is not.

``python -m benchmarks._hazards.kinds SCHEDULE`` runs all of them on emulated devices and prints the
reports of each as JSON; :func:`measure` does it and counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import _harness
from benchmarks._hazards import driver

#: Where torch is imported late: the emulator must be there first.
Program = Callable[[bool], object]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of bug. ``words`` appear in the report of the broken program."""

    name: str
    program: Program
    words: tuple[str, ...]


def _torch() -> Any:
    import torch

    return torch


def no_wait_before_use(correct: bool) -> None:
    torch = _torch()
    side, host = torch.cuda.Stream(), torch.full((driver.SIZE,), 3.0).pin_memory()
    weights = torch.zeros(driver.SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        weights.copy_(host, non_blocking=True)
    if correct:
        torch.cuda.current_stream().wait_stream(side)
    (weights * 2).sum()


def no_wait_for_the_producer(correct: bool) -> None:
    torch = _torch()
    side, host = torch.cuda.Stream(), torch.zeros(driver.SIZE).pin_memory()
    result = torch.ones(driver.SIZE, device="cuda") + 3
    if correct:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(result, non_blocking=True)
    side.synchronize()


def staging_buffer_reused_early(correct: bool) -> None:
    torch = _torch()
    side, staging = torch.cuda.Stream(), torch.ones(driver.SIZE).pin_memory()
    weights = torch.zeros(driver.SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        weights.copy_(staging, non_blocking=True)
    if correct:
        side.synchronize()
    staging.fill_(2)
    side.synchronize()


def host_read_before_sync(correct: bool) -> None:
    torch = _torch()
    host = torch.zeros(driver.SIZE).pin_memory()
    host.copy_(torch.ones(driver.SIZE, device="cuda"), non_blocking=True)
    if correct:
        torch.cuda.current_stream().synchronize()
    host.sum().item()


def host_write_during_copy(correct: bool) -> None:
    torch = _torch()
    host = torch.zeros(driver.SIZE).pin_memory()
    host.copy_(torch.ones(driver.SIZE, device="cuda"), non_blocking=True)
    if correct:
        torch.cuda.current_stream().synchronize()
    host.zero_()


def early_free(correct: bool) -> None:
    owner, user = driver.stream(), driver.stream()
    pointer = driver.made("cuMemAllocAsync", driver.SIZE, owner)
    driver.call("cuMemsetD8Async", pointer, 1, driver.SIZE, owner)
    driver.order(owner, user)
    driver.operator(user, "reader", pointer, write=False)
    if correct:
        driver.order(user, owner)
    driver.call("cuMemFreeAsync", pointer, owner)


def block_reused_under_another_stream(correct: bool) -> None:
    torch = _torch()
    side, host = torch.cuda.Stream(), torch.zeros(driver.SIZE).pin_memory()
    tensor = torch.ones(driver.SIZE, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(tensor, non_blocking=True)
    if correct:
        tensor.record_stream(side)
    del tensor
    torch.full((driver.SIZE,), 9.0, device="cuda")
    side.synchronize()


class _RawMemory:
    """Memory by its address alone, as a library without references to it has it."""

    def __init__(self, tensor: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def use_after_free_in_the_caching_allocator(correct: bool) -> None:
    torch = _torch()
    tensor = torch.ones(driver.SIZE, device="cuda")
    kept = torch.as_tensor(_RawMemory(tensor), device="cuda")
    if not correct:
        del tensor
    kept.sum()


def use_after_free(correct: bool) -> None:
    side = driver.stream()
    pointer = driver.made("cuMemAlloc_v2", driver.SIZE)
    driver.call("cuMemsetD8Async", pointer, 1, driver.SIZE, side)
    if not correct:
        driver.call("cuMemFree_v2", pointer)
    driver.operator(side, "late reader", pointer, write=False)
    if correct:
        driver.call("cuMemFree_v2", pointer)


def double_free(correct: bool) -> None:
    pointer = driver.made("cuMemAlloc_v2", driver.SIZE)
    driver.call("cuMemFree_v2", pointer)
    if not correct:
        driver.call("cuMemFree_v2", pointer)


def leak(correct: bool) -> list[str]:
    """The reports are what is there at the end and was not at the beginning."""
    from spillover import emulator

    before = set(emulator.leaks())
    pointer, mark = driver.made("cuMemAlloc_v2", driver.SIZE), driver.event()
    if correct:
        driver.call("cuMemFree_v2", pointer)
        driver.call("cuEventDestroy_v2", mark)
    return [text for text in emulator.leaks() if text not in before]


def unmap_with_work_in_flight(correct: bool) -> None:
    side, address = driver.stream(), driver.made("cuMemAddressReserve", 2 * driver.MIB, 0, 0, 0)
    driver.map_memory(address, 2 * driver.MIB)
    driver.operator(side, "writer", address, write=True)
    if correct:
        driver.call("cuStreamSynchronize", side)
    driver.call("cuMemUnmap", address, 2 * driver.MIB)


def access_while_unmapped(correct: bool) -> None:
    side, address = driver.stream(), driver.made("cuMemAddressReserve", 2 * driver.MIB, 0, 0, 0)
    handle = driver.map_memory(address, 2 * driver.MIB)
    driver.call("cuMemUnmap", address, 2 * driver.MIB)
    if correct:
        driver.show_memory(address, 2 * driver.MIB, handle)
    driver.operator(side, "sleepwalker", address, write=True)
    driver.call("cuStreamSynchronize", side)


def stream_used_after_destruction(correct: bool) -> None:
    side = driver.stream()
    if correct:
        driver.call("cuStreamSynchronize", side)
    driver.call("cuStreamDestroy_v2", side)
    if not correct:
        driver.call("cuStreamSynchronize", side)


def event_used_after_destruction(correct: bool) -> None:
    mark, side = driver.event(), driver.stream()
    driver.call("cuEventRecord", mark, side)
    if correct:
        driver.call("cuEventSynchronize", mark)
    driver.call("cuEventDestroy_v2", mark)
    if not correct:
        driver.call("cuStreamWaitEvent", side, mark, 0)


def reissued_stream_handle(correct: bool) -> None:
    pointer = driver.made("cuMemAlloc_v2", driver.SIZE)
    old = driver.stream()
    driver.operator(old, "writer", pointer, write=True)
    done = driver.event()
    driver.call("cuEventRecord", done, old)
    driver.call("cuStreamDestroy_v2", old)
    new = driver.stream()
    if new != old:
        raise AssertionError("the driver did not issue the handle again")
    if correct:
        driver.call("cuStreamWaitEvent", new, done, 0)
    # Whoever keeps the handle takes this for the stream that wrote.
    driver.operator(new, "reader", pointer, write=False)
    driver.call("cuMemFree_v2", pointer)


def uninitialised_read(correct: bool) -> None:
    side, pointer = driver.stream(), driver.made("cuMemAlloc_v2", driver.SIZE)
    if correct:
        driver.call("cuMemsetD8Async", pointer, 0, driver.SIZE, side)
    driver.operator(side, "reader", pointer, write=False)
    driver.call("cuMemFree_v2", pointer)


def uninitialised_read_of_a_block(correct: bool) -> None:
    """The block was written in an earlier life, so the driver cannot tell."""
    torch = _torch()
    old = torch.ones(driver.SIZE, device="cuda")
    del old
    tensor = torch.empty(driver.SIZE, device="cuda")
    if correct:
        tensor.zero_()
    tensor.sum()


def cross_device_without_peer_access(correct: bool) -> None:
    other = driver.use_device(1)
    pointer = driver.made("cuMemAlloc_v2", driver.SIZE)
    driver.call("cuMemsetD8_v2", pointer, 0, driver.SIZE)
    driver.call("cuCtxSynchronize")
    driver.use_device(0)
    if correct:
        driver.call("cuCtxEnablePeerAccess", driver.c_void_p(other), 0)
    side = driver.stream()
    driver.operator(side, "reader of the neighbour", pointer, write=False)
    driver.call("cuStreamSynchronize", side)
    if correct:
        driver.call("cuCtxDisablePeerAccess", driver.c_void_p(other))


def host_thread_did_not_wait(correct: bool) -> None:
    """One thread waits for the copy; another uses its result without hearing of it."""
    torch = _torch()
    side, host = torch.cuda.Stream(), torch.ones(driver.SIZE).pin_memory()
    weights = torch.zeros(driver.SIZE, device="cuda")
    torch.cuda.synchronize()
    arrived = threading.Event()
    waits = [False]

    def loader() -> None:
        with torch.cuda.stream(side):
            weights.copy_(host, non_blocking=True)
        side.synchronize()
        waits[0] = True
        if correct:
            arrived.set()

    thread = threading.Thread(target=loader)
    thread.start()
    if correct:
        arrived.wait()
    else:
        while not waits[0]:  # a flag that nobody sees, and that is no synchronisation
            pass
    (weights * 2).sum()
    thread.join()


def aliased_mapping(correct: bool) -> None:
    """One physical handle is mapped at two addresses."""
    first, second = driver.stream(), driver.stream()
    a, b = (driver.made("cuMemAddressReserve", 2 * driver.MIB, 0, 0, 0) for _ in range(2))
    handle = driver.map_memory(a, 2 * driver.MIB)
    driver.show_memory(b, 2 * driver.MIB, handle)
    driver.operator(first, "writer", a, write=True)
    if correct:
        driver.order(first, second)
    driver.operator(second, "reader", b, write=False)


def dependent_copies(correct: bool) -> None:
    """The second copy of a batch needs what the first one brings."""
    side, host = driver.stream(), driver.made("cuMemHostAlloc", driver.SIZE, 0)
    first, second = (driver.made("cuMemAlloc_v2", driver.SIZE) for _ in range(2))
    copies = [(first, host), (second, first)]
    for batch in [copies[:1], copies[1:]] if correct else [copies]:
        driver.copy_batch(batch, side)
    driver.call("cuStreamSynchronize", side)


KINDS = tuple(
    Kind(name=name, program=program, words=words)
    for name, program, words in (
        ("no wait before use", no_wait_before_use, ("aten::mul", "memcpy host-to-device")),
        ("no wait for the producer", no_wait_for_the_producer, ("aten::add", "device-to-host")),
        ("staging buffer reused early", staging_buffer_reused_early, ("aten::fill_", "the host")),
        ("host read before synchronising", host_read_before_sync, ("aten::sum", "the host")),
        ("host write during a copy", host_write_during_copy, ("aten::zero_", "device-to-host")),
        ("early free", early_free, ("cuMemFreeAsync", "reader")),
        (
            "block reused while another stream works on it",
            block_reused_under_another_stream,
            ("aten::fill_", "memcpy device-to-host"),
        ),
        (
            "use after free",
            use_after_free_in_the_caching_allocator,
            ("aten::sum", "caching allocator", "taken back at"),
        ),
        ("use after free", use_after_free, ("late reader", "given back by cuMemFree")),
        ("double free", double_free, ("cuMemFree", "free already")),
        ("leak", leak, ("cuMemAlloc", "cuEventCreate")),
        ("unmap with work in flight", unmap_with_work_in_flight, ("cuMemUnmap", "writer")),
        ("access while unmapped or asleep", access_while_unmapped, ("sleepwalker", "cuMemUnmap")),
        ("stream used after destruction", stream_used_after_destruction, ("cuStreamDestroy",)),
        ("event used after destruction", event_used_after_destruction, ("cuEventDestroy",)),
        ("reissued stream handle", reissued_stream_handle, ("the handle", "issued again")),
        ("uninitialised read", uninitialised_read, ("reader", "never written")),
        ("uninitialised read", uninitialised_read_of_a_block, ("aten::sum", "never written")),
        (
            "cross-device use without peer access",
            cross_device_without_peer_access,
            ("reader of the neighbour", "device 0"),
        ),
        ("no wait before use", host_thread_did_not_wait, ("aten::mul",)),
        ("no wait for the producer", aliased_mapping, ("reader", "writer")),
        ("dependent copies in one batch", dependent_copies, ("cuMemcpyBatchAsync", "copy 1")),
    )
)


def caught(kind: Kind, reports: list[str]) -> bool:
    """Whether one report names the kind, and all of them together say what they should."""
    text = "\n".join(reports)
    named = f"kind: {kind.name}\n" in text + "\n" or kind.name == "leak"
    return bool(reports) and named and all(word in text for word in kind.words)


def run_all() -> dict[str, list[str]]:
    """Run every program, corrected and broken, in this process; reports by name and version."""
    from spillover import emulator

    torch = _torch()
    torch.cuda.init()
    reports = {}
    for kind in KINDS:
        for version in ("corrected", "broken"):
            torch.cuda.synchronize()
            driver.use_device(0)
            emulator.clear_hazards()
            found = kind.program(version == "corrected")
            texts = found if isinstance(found, list) else emulator.hazards()
            reports[f"{kind.program.__name__}/{version}"] = texts
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    emulator.clear_hazards()
    return reports


def measure(schedule: str) -> dict[str, list[str]]:
    """``run_all`` in a process with emulated devices of its own."""
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks._hazards.kinds", schedule],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    result: dict[str, list[str]] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    import spillover.emulator

    spillover.emulator.enable(
        devices=2,
        vram="512MiB",
        schedule=sys.argv[1],  # type: ignore[arg-type]
        hazards="count",
        uninitialized=True,
        blocks=True,
    )
    _harness.end_measurement(run_all())

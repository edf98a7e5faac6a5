"""The virtual clock against hand calculations, on the driver alone.

Each group of programs runs in one process, on a card of round numbers: 25 GB/s each way, 1000 GB/s
of memory, and no latencies unless a program's numbers say otherwise.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable
from ctypes import c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

from driver_ctypes import (
    HOST_FUNCTION,
    NOT_READY,
    SUCCESS,
    Buffer,
    Driver,
    elapsed_ms,
    expect,
    run_program,
)
from graph_calls import begin, end, instantiate

KERNEL_BODY = ctypes.CFUNCTYPE(ctypes.c_int, c_void_p, c_void_p, c_size_t)
RELEASE = ctypes.CFUNCTYPE(None, c_void_p)

SIZE = 25_000_000  # exactly a millisecond at 25 GB/s
MS = 1_000_000

SEVEN = (
    *("compute", "copy-in", "copy-out", "peer-link"),
    *("cpu-optimizer", "disk-read", "disk-write"),
)

ROUND = {
    "gpu.pcie_to_device_gb_s": 25,
    "gpu.pcie_to_host_gb_s": 25,
    "gpu.pcie_duplex_gb_s": 50,
    "gpu.memory_bandwidth_gb_s": 1000,
    "gpu.memory_efficiency": 1,
    "gpu.l2_mib": 1,
    "gpu.kernel_ramp_us": 0,
    "gpu.kernel_gap_us": 0,
    "gpu.launch_latency_us": 0,
    "gpu.copy_latency_us": 0,
    "gpu.peer_gb_s": 25,
    "gpu.pageable_to_device_gb_s": 5,
    "gpu.pageable_to_host_gb_s": 5,
    "host.operator_us": 0,
    "host.launch_us": 0,
    "host.event_us": 0,
    "host.stream_call_us": 0,
    "host.graph_launch_us": 0,
    "host.wait_us": 0,
    "host.query_us": 1,
    "host.function_us": 0,
    "host.memory_bandwidth_gb_s": 100,
    "host.optimizer_bandwidth_gb_s": 50,
    "disk.read_gb_s": 5,
    "disk.read_latency_us": 0,
    "disk.write_gb_s": 5,
    "disk.write_latency_us": 0,
}


def values(**changes: float) -> str:
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return "\n".join(f"{key}={value}" for key, value in {**ROUND, **changed}.items())


class Clocked(Driver):
    """The driver, two streams, two buffers on each side, and what the clock says."""

    def __init__(self) -> None:
        super().__init__()
        for name, result in (
            ("now", c_int64),
            ("clock_report", c_size_t),
            ("work_submit", c_uint64),
            ("profile", ctypes.c_double),
        ):
            getattr(self.library, f"spillover_emulator_{name}").restype = result
        self.a, self.b = self.stream(), self.stream()
        self.x, self.y = self.alloc(SIZE), self.alloc(SIZE)
        self.h, self.g = self.pinned(SIZE), self.pinned(SIZE)

    def now(self) -> int:
        return int(self.library.spillover_emulator_now())

    def kernel(self, stream: int, ns: int, bytes_: int = 0) -> None:
        self.library.spillover_emulator_kernel(
            c_uint64(stream), b"kernel", c_uint64(ns), c_uint64(bytes_)
        )

    def time(self, work: Callable[[], object]) -> int:
        """Virtual time until everything that work launched is done."""
        self("cuCtxSynchronize")
        start = self.now()
        work()
        self("cuCtxSynchronize")
        return self.now() - start

    def context(self, device: int) -> c_void_p:
        context = c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        return context

    def work(self, resource: bytes, size_bytes: int) -> None:
        work = self.library.spillover_emulator_work
        expect(SUCCESS, work(resource, c_size_t(size_bytes), c_int64(-1)))

    def background_work(self, resource: bytes, size_bytes: int) -> None:
        """Work of another thread, which has really done it."""
        number = self.library.spillover_emulator_work_submit(resource, c_size_t(size_bytes))
        self.library.spillover_emulator_work_begin(c_uint64(number))
        self.library.spillover_emulator_work_end(c_uint64(number))

    def report(self) -> dict[str, Any]:
        length = self.library.spillover_emulator_clock_report(None, c_size_t(0))
        text = ctypes.create_string_buffer(length + 1)
        self.library.spillover_emulator_clock_report(text, c_size_t(length + 1))
        return dict(json.loads(text.value))


def busy(report: dict[str, Any], name: str) -> int:
    return sum(use["busy_ns"] for use in report["resources"] if use["name"] == name)


def clocked(*programs: Callable[[], object], **changes: float) -> None:
    run_program(*programs, vram="256MiB", clock=1, profile_values=values(**changes))


def a_copy_takes_its_bytes_over_the_link() -> None:
    cuda = Clocked()
    assert cuda.time(lambda: cuda.upload(cuda.x, cuda.h, cuda.a)) == MS
    assert cuda.time(lambda: cuda.download(cuda.h, cuda.x, cuda.a)) == MS


def both_directions_run_at_once() -> None:
    cuda = Clocked()

    def both() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.download(cuda.g, cuda.y, cuda.b)

    assert cuda.time(both) == MS


def two_copies_in_one_direction_share_the_engine() -> None:
    cuda = Clocked()

    def two() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.upload(cuda.y, cuda.g, cuda.b)

    assert cuda.time(two) == 2 * MS


def a_kernel_hides_a_copy() -> None:
    cuda = Clocked()

    def both() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.kernel(cuda.b, 3 * MS)

    assert cuda.time(both) == 3 * MS


def a_copy_takes_memory_bandwidth_from_a_kernel() -> None:
    cuda = Clocked()

    # The kernel wants all 1000 GB/s for a millisecond; the copy leaves it 975 while it runs.
    def both() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.kernel(cuda.b, MS, 1000 * MS)

    taken = cuda.time(both)
    assert MS + 0.025 * MS <= taken <= MS + 0.026 * MS, taken


def kernels_of_two_streams_take_turns() -> None:
    cuda = Clocked()

    def two() -> None:
        cuda.kernel(cuda.a, MS)
        cuda.kernel(cuda.b, 2 * MS)

    assert cuda.time(two) == 3 * MS


def an_event_wait_delays_the_other_stream() -> None:
    cuda = Clocked()

    def chain() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.order(cuda.a, cuda.b)
        cuda.kernel(cuda.b, MS // 2)

    assert cuda.time(chain) == MS + MS // 2


def a_wait_for_what_is_really_done_still_counts() -> None:
    cuda = Clocked()

    def chain() -> None:
        cuda.kernel(cuda.a, MS)  # performed at once, but virtually still running
        cuda.order(cuda.a, cuda.b)
        cuda.upload(cuda.x, cuda.h, cuda.b)

    assert cuda.time(chain) == 2 * MS


def the_default_stream_orders_in_virtual_time() -> None:
    cuda = Clocked()
    blocking = cuda.stream(0)

    def chain() -> None:
        cuda.kernel(blocking, MS)
        cuda.upload(cuda.x, cuda.h, 1)

    assert cuda.time(chain) == 2 * MS


def events_measure_virtual_time() -> None:
    cuda = Clocked()
    start, end = cuda.event(0), cuda.event(0)
    cuda.record(cuda.a, start)
    cuda.upload(cuda.x, cuda.h, cuda.a)
    cuda.kernel(cuda.a, 2 * MS)
    cuda.record(cuda.a, end)
    cuda("cuEventSynchronize", end)
    code, milliseconds = elapsed_ms(cuda, start, end)
    expect(SUCCESS, code)
    assert abs(milliseconds - 3) < 1e-6


def polling_ends_when_the_event_has_passed() -> None:
    cuda = Clocked()
    cuda.h.fill(7)
    cuda.upload(cuda.x, cuda.h, cuda.a)
    event = cuda.record(cuda.a)
    start, polls = cuda.now(), 1
    while cuda.status("cuEventQuery", event) == NOT_READY:
        polls += 1
    # A query that polls takes a microsecond, which the first 32 do not, and later ones a 128th of
    # what was polled before; and the bytes are there.
    assert MS <= cuda.now() - start < MS + MS // 100
    assert polls < 500
    assert cuda.peek(cuda.x, 4) == bytes([7]) * 4


def a_stream_is_ready_in_virtual_time() -> None:
    cuda = Clocked()
    cuda.kernel(cuda.a, 10_000)
    polls = 1
    while cuda.status("cuStreamQuery", cuda.a) == NOT_READY:
        polls += 1
    assert polls == 10 + 32 + 1


def pageable_memory_is_slow_and_holds_the_host_up() -> None:
    cuda = Clocked()
    source = Buffer.pageable(SIZE)
    start = cuda.now()
    cuda("cuMemcpyHtoDAsync_v2", cuda.x, source, SIZE, cuda.a)
    assert cuda.now() - start == 5 * MS


def host_functions_have_durations() -> None:
    cuda = Clocked()

    def body(_: object) -> None:
        assert cuda.library.spillover_emulator_work(b"cpu-optimizer", c_size_t(0), c_int64(MS)) == 0

    function = HOST_FUNCTION(body)

    def chain() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda("cuLaunchHostFunc", cuda.a, function, None)
        cuda.kernel(cuda.a, MS)

    assert cuda.time(chain) == 3 * MS


def host_work_competes_for_its_resource_and_memory() -> None:
    cuda = Clocked()
    work = cuda.library.spillover_emulator_work
    start = cuda.now()
    expect(SUCCESS, work(b"cpu-optimizer", c_size_t(50 * MS), c_int64(-1)))
    assert cuda.now() - start == MS
    expect(1, work(b"no-such-thing", c_size_t(1), c_int64(-1)))


def another_threads_work_waits_for_what_its_thread_waited_for() -> None:
    cuda = Clocked()
    library = cuda.library
    start = cuda.now()
    cuda.download(cuda.h, cuda.x, cuda.a)
    event = cuda.record(cuda.a)
    work = library.spillover_emulator_work_submit(b"disk-write", c_size_t(5 * MS))
    assert work != 0

    def io_thread() -> None:
        library.spillover_emulator_work_begin(c_uint64(work))
        cuda.use_device(0)
        cuda("cuEventSynchronize", event)
        library.spillover_emulator_work_end(c_uint64(work))

    thread = threading.Thread(target=io_thread)
    thread.start()
    thread.join()
    assert cuda.now() == start  # nobody has waited yet
    assert not library.spillover_emulator_work_is_done(c_uint64(work))
    library.spillover_emulator_work_wait(c_uint64(work))
    assert cuda.now() - start == 2 * MS
    assert library.spillover_emulator_work_is_done(c_uint64(work))


def the_report_adds_up() -> None:
    cuda = Clocked()
    before = cuda.report()
    cuda.upload(cuda.x, cuda.h, cuda.a)
    cuda.order(cuda.a, cuda.b)
    cuda.kernel(cuda.b, 2 * MS)
    after = cuda.report()
    assert busy(after, "copy-in") - busy(before, "copy-in") == MS
    assert busy(after, "compute") - busy(before, "compute") == 2 * MS
    assert after["makespan_ns"] - before["makespan_ns"] == 3 * MS
    path = sum(part["ns"] for part in after["critical_path"])
    assert path == after["makespan_ns"] == cuda.now()
    stalls = {stall["name"] for stall in after["stalls"]}
    assert "waiting for copy-in" in stalls
    assert max(bytes_ for *_, bytes_ in after["memory"]) >= 2 * SIZE


EXACT = (
    a_copy_takes_its_bytes_over_the_link,
    both_directions_run_at_once,
    two_copies_in_one_direction_share_the_engine,
    a_kernel_hides_a_copy,
    a_copy_takes_memory_bandwidth_from_a_kernel,
    kernels_of_two_streams_take_turns,
    an_event_wait_delays_the_other_stream,
    a_wait_for_what_is_really_done_still_counts,
    the_default_stream_orders_in_virtual_time,
    events_measure_virtual_time,
    polling_ends_when_the_event_has_passed,
    a_stream_is_ready_in_virtual_time,
    pageable_memory_is_slow_and_holds_the_host_up,
    host_functions_have_durations,
    host_work_competes_for_its_resource_and_memory,
    another_threads_work_waits_for_what_its_thread_waited_for,
)


def test_hand_calculations() -> None:
    for schedule in ("late", "eager"):
        run_program(
            *EXACT, schedule=schedule, vram="1GiB", clock=1, profile_values=values(), timeout=300
        )


def test_the_report_adds_up() -> None:
    clocked(the_report_adds_up)


def a_full_launch_queue_holds_the_host_up() -> None:
    cuda = Clocked()
    start = cuda.now()
    for _ in range(8):
        cuda.kernel(cuda.a, MS)
    assert cuda.now() == start
    cuda.kernel(cuda.a, MS)  # the ninth fits once the first is done
    assert cuda.now() - start == MS
    waits = {wait["name"]: wait["ns"] for wait in cuda.report()["host_waits"]}
    assert waits["launch queue full"] == MS


def test_a_full_launch_queue_holds_the_host_up() -> None:
    clocked(a_full_launch_queue_holds_the_host_up, host__launch_queue_depth=8)


def graph_nodes_take_their_time_and_one_launch() -> None:
    cuda = Clocked()
    body = KERNEL_BODY(lambda *_: 0)
    release = RELEASE(lambda _: None)
    begin(cuda, cuda.a)
    for _ in range(20):
        arguments = (c_uint64(cuda.a), b"triple", body, None, release, None, c_size_t(0))
        capture = cuda.library.spillover_emulator_capture_kernel
        expect(SUCCESS, capture(*arguments, c_uint64(MS), c_uint64(0)))
    executable = instantiate(cuda, end(cuda, cuda.a))
    start = cuda.now()
    cuda("cuGraphLaunch", executable, cuda.a)
    assert cuda.now() - start == 7_000  # 20 nodes are one launch of a queue of eight
    cuda("cuCtxSynchronize")
    assert cuda.now() - start == 20 * MS + 7_000
    operations = {entry["name"]: entry for entry in cuda.report()["operations"]}
    assert (operations["triple"]["ns"], operations["triple"]["count"]) == (20 * MS, 20)


def test_graphs() -> None:
    clocked(
        graph_nodes_take_their_time_and_one_launch,
        host__launch_queue_depth=8,
        host__graph_launch_us=7,
    )


def one_direction_slows_the_other_down() -> None:
    cuda = Clocked()

    def both() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.download(cuda.g, cuda.y, cuda.b)

    assert abs(cuda.time(both) - MS * 50 // 40) < 10


def latencies_and_launches_add_up() -> None:
    cuda = Clocked()
    assert cuda.time(lambda: cuda.upload(cuda.x, cuda.h, cuda.a)) == MS + 3_000 + 5_000 + 7_000


def test_other_cards() -> None:
    clocked(one_direction_slows_the_other_down, gpu__pcie_duplex_gb_s=40)
    clocked(
        latencies_and_launches_add_up,
        gpu__copy_latency_us=3,
        gpu__launch_latency_us=5,
        host__launch_us=7,
    )


def every_resource_works_at_once() -> None:
    cuda = Clocked()
    cuda.use_device(1)
    there = cuda.alloc(SIZE)
    contexts = [cuda.context(device) for device in (0, 1)]
    cuda.use_device(0)
    copies = cuda.stream()
    before = cuda.report()

    def all_of_them() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.download(cuda.g, cuda.y, cuda.b)
        cuda("cuMemcpyPeerAsync", there, contexts[1], cuda.x, contexts[0], SIZE, copies)
        cuda.kernel(cuda.stream(), MS)
        for resource in (b"disk-read", b"disk-write"):
            cuda.background_work(resource, 5 * MS)
        cuda.work(b"cpu-optimizer", 50 * MS)

    assert cuda.time(all_of_them) == MS
    after = cuda.report()
    for name in SEVEN:
        assert busy(after, name) - busy(before, name) == MS, name


def the_optimizer_has_what_copies_leave() -> None:
    cuda = Clocked()

    # Both copies take 50 of the host's 75 GB/s for a millisecond, in which the optimizer, which
    # would take 50, comes half of its way.
    def three() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.download(cuda.g, cuda.y, cuda.b)
        cuda.work(b"cpu-optimizer", 50 * MS)

    assert abs(cuda.time(three) - 3 * MS // 2) < 10


def a_kernel_in_the_cache_leaves_copies_alone() -> None:
    cuda = Clocked()

    def both() -> None:
        cuda.upload(cuda.x, cuda.h, cuda.a)
        cuda.kernel(cuda.b, MS, 0)

    assert cuda.time(both) == MS


def test_resources_run_side_by_side() -> None:
    settings = {"vram": "256MiB", "clock": 1, "hazards": "off"}
    wide = values(host__memory_bandwidth_gb_s=200)
    run_program(every_resource_works_at_once, profile_values=wide, devices=2, **settings)
    narrow = values(host__memory_bandwidth_gb_s=75)
    run_program(the_optimizer_has_what_copies_leave, profile_values=narrow, **settings)
    clocked(a_kernel_in_the_cache_leaves_copies_alone)


def off_keeps_no_time() -> None:
    cuda = Clocked()
    cuda.upload(cuda.x, cuda.h, cuda.a)
    cuda.kernel(cuda.a, MS)
    cuda("cuCtxSynchronize")
    assert cuda.now() == 0
    assert cuda.library.spillover_emulator_clock_enabled() == 0
    assert cuda.library.spillover_emulator_clock_report(None, c_size_t(0)) == 0
    assert cuda.library.spillover_emulator_work_submit(b"disk-write", c_size_t(1)) == 0


def test_off_keeps_no_time() -> None:
    run_program(off_keeps_no_time, vram="256MiB")


def bad_numbers_are_refused() -> None:
    expect(1, Driver(initialise=False).status("cuInit", 0))


def test_bad_numbers_are_refused() -> None:
    for text in ("gpu.sm_count=many", "gpu.sm_count", "gpu.pcie_to_device_gb_s=0"):
        result = run_program(bad_numbers_are_refused, clock=1, profile_values=text)
        assert "SPILLOVER_EMULATOR_PROFILE_VALUES has" in result.stderr

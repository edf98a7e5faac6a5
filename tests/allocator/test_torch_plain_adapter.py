"""The plain adapter: the tests of the full one, and what is its own."""

from __future__ import annotations

import subprocess
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_torch_caching
import test_torch_devices
import test_torch_out_of_memory
import test_torch_private_pools
import test_torch_processes_and_threads
import test_torch_run
import test_torch_settings
import test_torch_sleep
import test_torch_snapshot
import test_torch_statistics
import test_torch_streams
import test_torch_training
from test_torch_run import Run
from torch_process import ENABLE, TorchProcess

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]

#: Tests of what only the full adapter has.
FULL_ONLY = {
    # histories
    "test_a_forked_child_frees_whatever_the_parents_threads_do",
    "test_a_snapshot_is_an_event_of_later_ones",
    "test_functions_for_all_devices_touch_none_that_is_not_used",
    "test_a_block_that_a_pool_has_lent_is_the_pools",
    "test_history_and_viewer",
    "test_which_segments_grow",
    "test_out_of_memory_is_in_the_history",
    "test_private_pools_are_in_the_history",
    "test_regions_are_in_the_history",
    "test_segments_are_in_the_history",
    "test_segments_without_caching_are_in_the_history",
    "test_texts_of_the_user_are_in_the_history",
    "test_blocks_of_a_pool_that_does_not_split_are_segments",
    # memory from the driver for each tensor; caching off keeps nothing idle here
    "test_out_of_memory_without_caching",
    "test_without_caching_each_tensor_has_memory_of_its_own",
    # settings whose values only torch's parser knows
    "test_settings_of_torch",
    "test_sizes_are_rounded_as_torch_is_told",
    # what a graph records, and the stream that begins it
    "test_a_capture_reuses_what_it_has_waited_for",
    "test_the_cache_is_emptied_while_a_graph_is_recorded",
    # checkpoints of private pools
    "test_a_graph_and_checkpoints_in_a_pool_that_does_not_split",
    "test_a_checkpoint_brings_back_what_was_freed",
    "test_a_checkpoint_of_a_pool",
}

#: Tests in processes of their own that hardly meet what differs between the adapters.
SOAK = {
    "test_children_with_devices_of_their_own",
    "test_copies_feed_compute_in_any_order",
    "test_memory_that_another_process_may_have_open_stays_awake",
    "test_multiprocessing_by_fork_is_told_why",
    "test_refusals_and_which_setting_comes_first",
    "test_torchs_variable_against_caching",
}


def marked(test: types.FunctionType, *marks: pytest.MarkDecorator) -> types.FunctionType:
    """The same test with marks, which its own module's does not get."""
    copy = types.FunctionType(
        test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__
    )
    vars(copy).update(vars(test))
    for mark in marks:
        copy = mark(copy)
    return copy


for module in (
    test_torch_caching,
    test_torch_devices,
    test_torch_out_of_memory,
    test_torch_private_pools,
    test_torch_processes_and_threads,
    test_torch_settings,
    test_torch_sleep,
    test_torch_snapshot,
    test_torch_statistics,
    test_torch_streams,
    test_torch_training,
):
    for name, test in vars(module).items():
        if name.startswith("test_") and name not in FULL_ONLY:
            # What a mark of the module does to the test there it does here.
            own = getattr(module, "pytestmark", None)
            marks = ([own] if own else []) + ([pytest.mark.soak] if name in SOAK else [])
            globals()[name] = marked(test, *marks)


spillover_run = test_torch_run.spillover_run


@pytest.fixture(scope="session")
def torch_with_pool() -> Iterator[TorchProcess]:
    process = TorchProcess(adapter="plain")
    yield process
    process.close()


@pytest.fixture(scope="module")
def torch_with_devices() -> Iterator[TorchProcess]:
    process = TorchProcess(ENABLE.replace("vram=", "devices=3, vram="), adapter="plain")
    yield process
    process.close()


@pytest.fixture
def run_emulated(run_emulated: RunEmulated) -> RunEmulated:
    def run(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_emulated(code.replace('"full"', '"plain"'), *arguments, **options)

    return run


def test_every_function_that_torch_asks_for_is_ours() -> None:
    """A setter that a later torch adds is seen here."""
    import torch

    from spillover.allocator import _plain, _pool

    path = _pool.library()._name
    names = ("spillover_pluggable_alloc", "spillover_pluggable_free")
    functions = torch.cuda.memory.CUDAPluggableAllocator(path, *names).allocator()
    assert {name for name in dir(functions) if name.startswith("set_")} == set(_plain._SETTERS)
    for name in (*names, *_plain._SETTERS.values()):
        assert hasattr(_pool.library(), name), name


def test_it_says_once_what_it_lacks(run_emulated: RunEmulated) -> None:
    result = run_emulated(
        """
        import logging, warnings
        import spillover
        logging.basicConfig(level=logging.WARNING, format="LOG %(message)s")
        warnings.simplefilter("error")
        for _ in range(3):
            assert spillover.allocator.install(adapter="plain")
        import torch
        torch.ones(3, device="cuda")

        # What it says is so.
        def refused(action):
            try:
                action()
            except RuntimeError:
                return
            raise AssertionError(action)

        x = torch.ones(1000, device="cuda")
        refused(torch.cuda.memory._record_memory_history)
        refused(x.untyped_storage()._share_cuda_)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 1
        refused(lambda: torch._C._cuda_getCheckpointState(0, graph.pool()))
        functions = torch.cuda.memory._get_current_allocator().allocator()
        try:
            torch.cuda.MemPool(functions)
        except NotImplementedError as error:
            assert "C++ compiler" in str(error), error
        else:
            raise AssertionError("no error")
        """
    )
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("LOG ")]
    for lack in (
        "memory histories",
        "sharing tensors with other processes",
        "'reduce-overhead'",
        "torch.backends.cudnn.benchmark",
        "torch.cuda.MemPool with an allocator of its own",
    ):
        assert lack in line, line


def test_running_out_of_memory_again_and_again(torch_with_pool: TorchProcess) -> None:
    """The error is made without torch's headers: it must be whole, and leave nothing behind."""
    torch_with_pool.run(
        """
        import resource, threading

        def fail():
            try:
                torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
            except RuntimeError as error:
                assert type(error) is torch.OutOfMemoryError, type(error)
                text = str(error)
                assert text.startswith("CUDA out of memory. Tried to allocate 1024.00 GiB."), text
                return text
            raise AssertionError("no error")

        held = torch.ones(300 * MiB, dtype=torch.uint8, device="cuda")
        first = fail()
        assert "spillover.offload_activations" in first  # the report's last sentence

        def many(count):
            for _ in range(count):
                fail()

        many(50)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        threads = [threading.Thread(target=many, args=(100,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        many(600)
        # Each error has more than a kilobyte of text; a thousand that leaked would be seen.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024
        assert torch.cuda.memory_stats()["num_ooms"] == 1051
        assert torch.cuda.memory_allocated() == 300 * MiB

        # From a thread of autograd, and through operators of C++.
        class Hungry(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                torch.empty(400 * MiB, dtype=torch.uint8, device="cuda")

        x = torch.ones(3, device="cuda", requires_grad=True)
        for action in (
            lambda: Hungry.apply(x).sum().backward(),
            lambda: held.repeat(2),
            lambda: held.to(torch.int64),
        ):
            try:
                action()
            except torch.OutOfMemoryError as error:
                assert "Tried to allocate" in str(error), error
            else:
                raise AssertionError("no error")
        del held
        assert torch.ones(400 * MiB, dtype=torch.uint8, device="cuda")[-1].item() == 1
        """
    )


def test_an_observer_that_fails_does_not_hide_the_error(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import sys
        seen, reported = [], []
        fails = [True]

        def observer(*facts):
            if fails:
                fails.clear()
                raise ValueError("of the observer")
            seen.append(facts)
            assert torch.ones(3, device="cuda").sum().item() == 3  # it may use the device

        hook, sys.unraisablehook = sys.unraisablehook, reported.append
        torch._C._cuda_attach_out_of_memory_observer(observer)
        try:
            for _ in range(2):
                try:
                    torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
                except torch.OutOfMemoryError:
                    continue
                raise AssertionError("no error")
        finally:
            sys.unraisablehook = hook
        assert [str(report.exc_value) for report in reported] == ["of the observer"]
        assert len(seen) == 1 and seen[0][:2] == (0, 1 << 40), seen
        """
    )


def test_figures_have_the_form_of_the_full_adapters(run_emulated: RunEmulated) -> None:
    """Whoever reads them, torch's viewer among them, finds every key."""
    code = """
        import json
        import spillover
        assert spillover.allocator.install(adapter="{adapter}")
        import torch
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            x = torch.ones(1000, device="cuda")
        y = torch.ones(3 << 20, device="cuda")
        snapshot = torch.cuda.memory._snapshot()
        for segment in snapshot["segments"]:
            segment["address"] = bool(segment["address"])
            for block in segment["blocks"]:
                block["address"] = bool(block["address"])
        print(json.dumps([snapshot, torch.cuda.memory_stats(), torch.cuda.memory_summary()]))
        """
    full, plain = (
        run_emulated(code.format(adapter=adapter)).stdout for adapter in ("full", "plain")
    )
    assert full == plain


def test_a_graph_keeps_a_pool_that_was_used_in_its_capture(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        if hasattr(torch.cuda.CUDAGraph, "_retain_pool"):
            source = torch.ones(MiB, device="cuda")
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
            with torch.cuda.graph(graph):
                with torch.cuda.use_mem_pool(pool):
                    inner = source + 1
                out = inner * 2
            address = inner.data_ptr()
            number = pool.id
            del inner, pool
            others = [torch.zeros(MiB, device="cuda") for _ in range(4)]
            assert address not in [other.data_ptr() for other in others]
            for value in (1.0, 4.0):
                source.fill_(value)
                graph.replay()
                assert out.sum().item() == 2 * (value + 1) * MiB
            assert all(other.sum().item() == 0 for other in others)
            graph.reset()
            del out, others
            torch.cuda.empty_cache()
            kept = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}
            assert number not in kept, kept
        """
    )


def test_streams_of_torch_are_known_to_live(torch_with_pool: TorchProcess) -> None:
    """Their memory serves other streams as soon as their work is done, without a wait."""
    torch_with_pool.run(
        """
        side = torch.cuda.Stream()
        assert isinstance(side, torch.cuda.Stream)
        with torch.cuda.stream(side):
            assert torch.cuda.current_stream() == side
            x = torch.ones(300 * MiB, dtype=torch.uint8, device="cuda")
        side.synchronize()
        del x
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        y = torch.ones(300 * MiB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() < 400 * MiB
        assert torch.cuda.memory_stats()["num_alloc_retries"] == retries

        # Streams that others made are used as they are.
        other = torch.cuda.ExternalStream(side.cuda_stream)
        assert other.cuda_stream == side.cuda_stream
        """
    )


def test_memory_of_others_may_be_recorded(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        side = torch.cuda.Stream()
        block = allocator.Pool().allocate(1 << 20)
        view = torch.from_dlpack(block)
        view[100:].record_stream(side)
        torch.empty(0, device="cuda").record_stream(side)
        side.wait_stream(torch.cuda.current_stream())
        del view, block
        """
    )


#: Runs without the adapter's compiler, whatever this machine has.
NO_COMPILER = textwrap.dedent(
    """
    import spillover
    import spillover._build
    def build(part, *arguments, build=spillover._build.build, **options):
        if part == "adapter":
            raise spillover.BuildError("there is no compiler")
        return build(part, *arguments, **options)
    spillover._build.build = build
    """
)

END = textwrap.dedent(
    """
    import threading
    assert spillover.allocator.is_installed()
    held = torch.ones(1000, device="cuda", requires_grad=True)
    (held * 2).sum().backward()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        other = torch.nn.Linear(100, 100, device="cuda")(torch.ones(10, 100, device="cuda"))
    pool, graph = torch.cuda.MemPool(), torch.cuda.CUDAGraph()
    with torch.cuda.use_mem_pool(pool):
        pooled = torch.ones(1000, device="cuda")
    with torch.cuda.graph(graph):
        captured = pooled * 2
    torch._C._cuda_attach_out_of_memory_observer(lambda *facts: None)
    cycle = [torch.ones(1000, device="cuda")]
    cycle.append(cycle)

    def hold():
        x = torch.ones(1000, device="cuda")
        ready.release()
        threading.Event().wait()

    ready = threading.Semaphore(0)
    threading.Thread(target=hold, daemon=True).start()
    ready.acquire()
    print("end")
    """
)


def check_end(result: subprocess.CompletedProcess[str]) -> None:
    assert result.stdout.endswith("end\n"), result.stdout
    assert "there is no compiler" in result.stderr, result.stderr
    for trouble in ("Fatal", "Traceback", "freeing device memory"):
        assert trouble not in result.stderr, result.stderr


@pytest.mark.parametrize("start", ["install", "variable"])
def test_the_end_of_a_program(run_emulated: RunEmulated, start: str) -> None:
    """Tensors, pools, graphs and threads that hold tensors live until the process is gone.

    Threads that go on allocating end the process, with whatever allocator torch has: the
    interpreter unwinds their stacks through functions of torch that must not be unwound.
    """
    install, environment = {
        "install": ("spillover.allocator.install()\n", {}),
        "variable": ("", {"SPILLOVER": "1"}),
    }[start]
    check_end(run_emulated(NO_COMPILER + install + "import torch\n" + END, env=environment))


def test_the_end_of_a_program_under_spillover_run(spillover_run: Run, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(NO_COMPILER + "import torch\n" + END)
    check_end(spillover_run("program.py"))


def test_a_class_that_was_imported_too_early_says_so(run_emulated: RunEmulated) -> None:
    run_emulated(
        """
        from torch.cuda import MemPool as early
        import spillover
        assert spillover.allocator.install(adapter="plain")
        import torch

        try:
            early()
        except spillover.StateError as error:
            assert "imported by name before spillover.allocator.install()" in str(error), error
        else:
            raise AssertionError("no error")
        with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
            torch.ones(1000, device="cuda")
        """
    )


def test_a_forked_child_lets_go_of_pools_and_graphs(run_emulated: RunEmulated) -> None:
    result = run_emulated(
        """
        import os, sys, warnings
        import spillover
        assert spillover.allocator.install(adapter="plain")
        import torch

        warnings.simplefilter("ignore", DeprecationWarning)
        pools = [torch.cuda.MemPool(), torch.cuda.MemPool(use_on_oom=True)]
        for pool in pools:
            with torch.cuda.use_mem_pool(pool):
                torch.ones(1000, device="cuda")
        sys.stderr.write("start\\n")
        child = os.fork()
        if child == 0:
            del pools[:], pool
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        del pools[:], pool
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        """
    )
    assert result.stderr.partition("start\n")[2] == ""


def test_threads_allocate_and_free_each_others_memory(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import queue, random, threading

        handed = queue.Queue(maxsize=64)
        failures = []

        def work(seed):
            try:
                pick = random.Random(seed)
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    for _ in range(150):
                        size = pick.choice([10, 1000, 100_000, 300_000])
                        x = torch.full((size,), seed, device="cuda")
                        assert x[-1].item() == seed
                        x.record_stream(torch.cuda.default_stream())
                        try:
                            handed.put_nowait((x, stream))
                        except queue.Full:
                            handed.get()
                        del x
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        while not handed.empty():
            handed.get()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.memory_reserved() == 0
        """
    )

"""The adapter beside forked children and beside threads that need Python's lock."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("adapter", ["full", pytest.param("plain", marks=pytest.mark.soak)])
def test_a_forked_child_frees_tensors_without_a_word(
    run_emulated: RunEmulated, adapter: str
) -> None:
    result = run_emulated(
        f"""
        import gc, os, sys
        import spillover
        assert spillover.allocator.install(adapter={adapter!r})
        import torch

        tensors = [torch.ones(1000, device="cuda") for _ in range(5)]
        tensors.append(torch.ones(1000, device="cuda"))
        side = torch.cuda.Stream()
        tensors[0].record_stream(side)
        sys.stderr.write("start\\n")
        child = os.fork()
        if child == 0:
            del tensors
            gc.collect()
            sys.stderr.write("child\\n")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [tensor.sum().item() for tensor in tensors] == [1000] * 6
        spillover.allocator.check_invariants()
        assert spillover.allocator.stats()["allocation.all.current"] >= 6
        """
    )
    assert result.stderr.partition("start\n")[2] == "child\n"


def test_a_forked_child_frees_whatever_the_parents_threads_do(run_emulated: RunEmulated) -> None:
    """A thread of the parent may be inside the allocator at the moment of the fork."""
    run_emulated(
        """
        import os, threading, warnings
        import spillover
        assert spillover.allocator.install(adapter="full")
        import torch

        warnings.simplefilter("ignore", DeprecationWarning)
        torch.cuda.memory._record_memory_history(stacks="python")
        stop = threading.Event()

        def churn():
            while not stop.is_set():
                torch.empty(1000, device="cuda")

        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            tensor = torch.empty(1000, device="cuda")
            child = os.fork()
            if child == 0:
                del tensor
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        for thread in threads:
            thread.join()
        """,
        timeout=60,
    )


@pytest.mark.parametrize(
    "action",
    [
        "del held",
        pytest.param("torch.cuda.memory_stats()", marks=pytest.mark.soak),
        pytest.param("x.record_stream(s)", marks=pytest.mark.soak),
    ],
)
def test_a_python_host_function_may_run_while_the_pool_waits(
    run_emulated: RunEmulated, action: str
) -> None:
    """One thread waits in the pool for a host function; the others must leave it Python's lock."""
    run_emulated(
        f"""
        import ctypes, faulthandler, threading
        import spillover
        assert spillover.allocator.install(adapter="full")
        import torch

        faulthandler.dump_traceback_later(40, exit=True)  # where the threads wait for each other
        runtime = ctypes.CDLL("libcudart.so.13")
        started, go = threading.Event(), threading.Event()

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def host_function(_):
            started.set()
            go.wait()

        held, x = torch.ones(1000, device="cuda"), torch.ones(1000, device="cuda")
        freed = torch.ones(1000, device="cuda")
        side, s = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            stream = ctypes.c_void_p(side.cuda_stream)
            assert runtime.cudaLaunchHostFunc(stream, host_function, None) == 0
        freed.record_stream(side)
        del freed  # the pool has to wait for the host function
        waiting = threading.Thread(target=torch.cuda.empty_cache)
        waiting.start()
        assert started.wait(20)
        # From a thread, as this one is about to wait.
        threading.Timer(0.3, go.set).start()
        {action}
        waiting.join()
        torch.cuda.synchronize()
        spillover.allocator.check_invariants()
        """,
        timeout=60,
    )


def test_a_forked_child_lets_go_of_pools_without_a_word(run_emulated: RunEmulated) -> None:
    """torch's destructors would end the child where one of the calls that they make throws."""
    result = run_emulated(
        """
        import gc, os, sys
        import spillover
        assert spillover.allocator.install(adapter="full")
        import torch

        pools = [torch.cuda.MemPool(use_on_oom=lends) for lends in (False, True)]
        tensors = []
        for pool in pools:
            with torch.cuda.use_mem_pool(pool):
                tensors.append(torch.ones(1000, device="cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pools[0].id):
            tensors.append(tensors[0] + 1)
        torch.cuda.synchronize()
        sys.stderr.write("start\\n")
        child = os.fork()
        if child == 0:
            del tensors, pool, pools
            gc.collect()
            sys.stderr.write("child\\n")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        graph.replay()
        assert [tensor.sum().item() for tensor in tensors] == [1000, 1000, 2000]
        del tensors, pool, pools, graph
        spillover.allocator.check_invariants()
        """
    )
    assert result.stderr.partition("start\n")[2] == "child\n"

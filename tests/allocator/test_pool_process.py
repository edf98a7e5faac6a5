"""The pool and its process: what is left at the end, and what a forked child may do."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable

import pytest


def test_nothing_is_left_after_trim(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    run_emulated(
        """
        import random
        from spillover import _core, emulator

        pool = _core.Pool(0)
        generator = random.Random(0)
        live = []
        for _ in range(500):
            if live and generator.random() < 0.5:
                pool.free(live.pop(generator.randrange(len(live))))
            else:
                live.append(pool.alloc(generator.choice([1, 700, 90_000, 1 << 20, 3 << 20])))
        for address in live:
            pool.free(address)
        assert emulator.live().device_bytes > 0
        pool.trim()
        assert emulator.live().device_bytes == 0, emulator.live()
        assert emulator.live().device_allocations == 0, emulator.live()
        """,
        vram="2GiB",
    )


@pytest.mark.virtual_memory
def test_the_whole_device_can_be_used_and_then_fails(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = run_emulated(
        """
        from spillover import _core

        pool = _core.Pool(0)
        held = []
        try:
            while True:
                held.append(pool.alloc(8 << 20))
        except RuntimeError as error:
            print(error)
        assert len(held) == 8, len(held)
        pool.free(held.pop(3))
        held.append(pool.alloc(8 << 20))
        pool.check_invariants()
        for address in held:
            pool.free(address)
        pool.free(pool.alloc(64 << 20))
        pool.trim()
        """,
        vram="64MiB",
    )
    assert "8.00 MiB requested" in result.stdout


def test_a_forked_child_leaves_the_parents_pool_alone(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Even while another thread of the parent holds the pool's lock at the moment of the fork."""
    result = run_emulated(
        """
        import os, threading, warnings
        import spillover
        from spillover import _core

        warnings.simplefilter("ignore", DeprecationWarning)
        pool = _core.Pool(0)
        address = pool.alloc(4096)
        stop = threading.Event()

        def churn():
            while not stop.is_set():
                pool.free(pool.alloc(2 << 20))

        thread = threading.Thread(target=churn)
        thread.start()
        calls = {
            "alloc": lambda: pool.alloc(100),
            "free": lambda: pool.free(address),
            "record_stream": lambda: pool.record_stream(address, 0),
            "stats": pool.stats,
            "segments": pool.segments,
            "trim": pool.trim,
            "check": pool.check_invariants,
            "version": _core.driver_version,
            "count": _core.device_count,
            "memory": _core.memory_info,
        }
        for _ in range(5):
            child = os.fork()
            if child == 0:
                wrong = []
                for name, call in calls.items():
                    try:
                        call()
                        wrong.append(name)
                    except spillover.StateError as error:
                        if "forked child" not in str(error):
                            wrong.append(name)
                if _core.driver_available() or _core.device_of(address) != -1:
                    wrong.append("queries")
                os._exit(len(wrong))
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, status
        stop.set()
        thread.join()
        pool.free(address)
        pool.check_invariants()
        print("parent is fine")
        """,
        timeout=60,
    )
    assert "parent is fine" in result.stdout


def test_a_child_forked_before_the_first_call_may_use_the_pool(
    run_python: Callable[..., str],
) -> None:
    output = run_python(
        "import os\n"
        "import spillover.emulator\n"
        "from spillover import _core\n"
        "child = os.fork()\n"
        "spillover.emulator.enable(vram='64MiB')\n"
        "pool = _core.Pool(0)\n"
        "pool.free(pool.alloc(100))\n"
        "if child:\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    print('child', os.waitstatus_to_exitcode(status))\n"
    )
    assert output == "child 0\n"


def test_a_child_of_a_process_that_only_started_the_driver_is_told_why(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Importing other CUDA libraries may start the driver, too."""
    run_emulated(
        """
        import ctypes, os
        import spillover
        from spillover import _core

        assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
        child = os.fork()
        if child == 0:
            try:
                _core.Pool(0)
            except spillover.DriverError as error:
                os._exit(0 if "forked child" in str(error) else 2)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        """
    )


# What happens at a process's end and in children, as a program; each must end well, and silently.
ENDINGS = {
    "os._exit with live blocks": """
        pool.alloc(3 << 20)
        os._exit(0)
    """,
    "blocks freed by atexit": """
        import atexit
        address = pool.alloc(3 << 20)
        pool.free(pool.alloc(4096))
        def at_exit():
            pool.free(address)
            pool.check_invariants()
            pool.trim()
        atexit.register(at_exit)
    """,
    "blocks that the interpreter takes down": """
        import sys
        blocks = [allocator.Pool().allocate(size) for size in (100, 3 << 20)]
        sys.modules["keeps"] = blocks  # type: ignore
        cycle = [allocator.Pool().allocate(5000)]
        cycle.append(cycle)
    """,
    "daemon threads with full magazines": """
        import threading, time
        started = threading.Barrier(3)
        def work():
            blocks = [pool.alloc(size) for size in (512, 4096, 3 << 20) for _ in range(20)]
            for address in blocks:
                pool.free(address)
            started.wait()
            time.sleep(60)
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        started.wait()
    """,
    "daemon threads inside the pool": """
        import threading
        def work():
            while True:
                pool.free(pool.alloc(3 << 20, 2))
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        threading.Event().wait(0.05)
    """,
    "a forked child that ends like any process": """
        block = allocator.Pool().allocate(3 << 20)
        pool.free(pool.alloc(4096))
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            block.free()
            pool.check_invariants()
    """,
    "a forked child that executes another program": """
        import sys, threading
        stop = threading.Event()
        def churn():
            while not stop.is_set():
                pool.free(pool.alloc(2 << 20))
        thread = threading.Thread(target=churn)
        thread.start()
        child = os.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-c",
                "import spillover.emulator as e; e.enable(vram='64MiB');"
                "from spillover import _core; p = _core.Pool(0); p.free(p.alloc(100)); p.trim()"])
        status = os.waitpid(child, 0)[1]
        stop.set()
        thread.join()
        assert os.waitstatus_to_exitcode(status) == 0, status
    """,
    "a child of a forked child": """
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild == 0:
                try:
                    pool.alloc(100)
                except Exception as error:
                    os._exit(0 if "forked child" in str(error) else 2)
                os._exit(1)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_a_process(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]], ending: str
) -> None:
    result = run_emulated(
        "import os, warnings\n"
        "from spillover import _core, allocator\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "pool = _core.Pool(0)\n" + textwrap.dedent(ENDINGS[ending]),
        timeout=60,
    )
    assert (result.stdout, result.stderr) == ("", "")

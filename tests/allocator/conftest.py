"""A pool that each test finds empty and must leave empty."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from cuda_calls import Cuda, live_blocks
from torch_process import TorchProcess

from spillover import _core


@pytest.fixture(scope="session")
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def pool(cuda: Cuda) -> Iterator[_core.Pool]:
    """The pool of device 0; every block that the test has left is freed after it."""
    pool = _core.Pool(0)
    cuda.use_device()
    cuda.synchronize()
    pool.trim()
    assert pool.stats()["active"]["all"]["current"] == 0
    pool.reset_peak_stats()
    pool.reset_accumulated_stats()
    pool.configure("check_every=4", "the tests")
    yield pool
    pool.configure("check_every=64", "the tests")
    pool.set_memory_fraction(1.0)
    for address in live_blocks(pool):
        pool.free(address)
    cuda.synchronize()
    pool.check_invariants()
    pool.trim()
    pool.check_invariants()
    assert pool.segments() == []


@pytest.fixture(scope="session")
def kept_streams(cuda: Cuda) -> list[int]:
    """Streams that live as long as the process, which the pool was told."""
    cuda.use_device()
    streams = [cuda.create_stream() for _ in range(3)]
    for stream in streams:
        _core.Pool(0).keep_stream(stream)
    return streams


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a program in a new process that enables the emulator itself; gives its output."""

    def run(code: str, *arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def torch_with_pool() -> Iterator[TorchProcess]:
    """A process with the pool installed in torch, shared by the tests of the adapter."""
    process = TorchProcess()
    yield process
    process.close()

"""The threads that kernels share: numbers, processors, forks, and callers at the same time."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import CASES, gradient_of, make_state

from spillover import ConfigError, _core
from spillover.optim import _kernels


def ones(count: int) -> torch.Tensor:
    """Made by numpy: torch's own threads do not survive a fork."""
    return torch.from_numpy(np.ones(count, dtype=np.float32))


def thread_names() -> list[str]:
    folder = Path("/proc/self/task")
    return [(each / "comm").read_text().strip() for each in folder.iterdir()]


def test_default_is_a_thread_a_processor() -> None:
    assert _core.optimizer_threads() == len(os.sched_getaffinity(0))
    _core.set_optimizer_threads(3)
    assert _core.optimizer_threads() == 3
    _core.set_optimizer_threads(0)
    assert _core.optimizer_threads() == len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match="threads=-1"):
        _core.set_optimizer_threads(-1)


def test_no_more_threads_than_asked_for_and_none_for_little() -> None:
    """In a process of its own, since threads stay."""
    child = os.fork()
    if child == 0:
        tensor = ones(200_000)
        ok = thread_names().count("spillover-optim") == 0
        _kernels.scale([tensor[:1000]], 1.0, threads=4)
        _kernels.scale([tensor], 1.0, threads=1)
        ok = ok and thread_names().count("spillover-optim") == 0
        _kernels.scale([tensor], 1.0, threads=4)
        ok = ok and thread_names().count("spillover-optim") == 3
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_has_threads_of_its_own() -> None:
    tensor = ones(300_000)
    _kernels.scale([tensor], 2.0, threads=3)
    stop = threading.Event()

    def keep_working() -> None:
        mine = ones(300_000)
        while not stop.is_set():
            _kernels.scale([mine], 1.0, threads=3)

    worker = threading.Thread(target=keep_working)
    worker.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                _kernels.scale([tensor], 2.0, threads=3)
                os._exit(0 if (tensor.numpy() == 4).all() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()


def test_idle_threads_sleep() -> None:
    _kernels.scale([torch.ones(300_000)], 1.0, threads=4)
    before = {
        path: path.read_text().split()[13:15]
        for path in (each / "stat" for each in Path("/proc/self/task").iterdir())
        if "spillover-optim" in path.read_text()
    }
    assert len(before) >= 3
    time.sleep(0.2)
    for path, ticks in before.items():
        assert path.read_text().split()[13:15] == ticks


def test_callers_at_the_same_time() -> None:
    case = CASES[0]
    gradient = gradient_of(200_000, torch.float32, 1)
    wanted = make_state(case, 200_000)
    case.kernel([wanted.range(gradient, 1)], **case.options, threads=1)
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            state = make_state(case, 200_000)
            case.kernel([state.range(gradient, 1)], **case.options, threads=3)
            if not torch.equal(state.weight, wanted.weight):
                failures.append("other weights")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_interpreter_is_free_while_kernels_work() -> None:
    tensor = torch.ones(30_000_000)
    counts = [0]
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counts[0]
    _kernels.scale([tensor], 1.0)
    assert counts[0] > before
    stop.set()
    thread.join()


def test_processors_by_node(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    nodes = tmp_path / "sys/devices/system/node"
    for number, processors in (("0", f"{mine[0]},9000"), ("3", f"{mine[1]}-{mine[1]}")):
        (nodes / f"node{number}").mkdir(parents=True)
        (nodes / f"node{number}" / "cpulist").write_text(processors + "\n")
    (nodes / "node1").mkdir()
    (nodes / "node1" / "cpulist").write_text("\n")
    (nodes / "online").write_text("0-1,3\n")
    assert _core._processors_by_node(str(tmp_path)) == [[mine[0]], [mine[1]]]
    for root in (str(tmp_path / "none"), ""):
        assert sorted(itertools.chain(*_core._processors_by_node(root))) == mine


def test_touching_pages_zeroes_their_first_bytes() -> None:
    memory = torch.ones((5 << 20) + 5, dtype=torch.uint8)
    _core.touch_pages(memory.data_ptr(), memory.numel(), threads=2)
    assert int((memory == 0).sum()) == -(-memory.numel() // 4096)


def test_the_instruction_set_can_be_chosen() -> None:
    before = _core._instruction_set()
    assert before == _core._instruction_sets()[-1]
    with pytest.raises(ConfigError, match=r"'sse'.*portable"):
        _core._set_instruction_set("sse")
    assert _core._instruction_set() == before

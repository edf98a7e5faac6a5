"""A process whose torch runs on Spillover's pool and that executes one test's code after another.

Loading torch takes seconds and an allocator can be installed only once a process, so the tests of
the adapter share one. Each test's code runs in a namespace of its own with ``torch``, ``allocator``
and ``MiB``; it finds the pool empty, with fresh counters, and must leave no hazard behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

ENABLE = """
import os
import spillover.emulator
spillover.emulator.enable(
    vram="512MiB",
    schedule="late",
    hazards="raise",
    virtual_memory=os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1",
)
"""

INSTALL = """
import spillover.allocator as allocator
assert allocator.install(adapter="full")
import torch
MiB = 1 << 20
"""

_SERVER = """
import gc, json, linecache, os, sys, traceback
from spillover import emulator

replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a test prints must not mix with the replies

def execute(code):
    linecache.cache["<test>"] = (len(code), None, code.splitlines(True), "<test>")
    names = {"torch": torch, "allocator": allocator, "MiB": MiB}
    try:
        exec(compile(code, "<test>", "exec"), names)
        torch.cuda.synchronize()
        allocator.check_invariants()
        found = emulator.hazards() if emulator.is_enabled() else []
        assert not found, found
        return {"answer": names.get("answer")}
    except BaseException:
        return {"error": traceback.format_exc()}
    finally:
        names.clear()

def start_afresh():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    assert torch.cuda.memory_allocated() == 0, torch.cuda.memory_allocated()

torch.cuda.init()
for line in sys.stdin:
    start_afresh()
    print(json.dumps(execute(json.loads(line))), file=replies, flush=True)
"""


class TorchProcess:
    """Owns the process; used by one thread."""

    def __init__(self, enable: str = ENABLE, adapter: str = "full") -> None:
        install = INSTALL.replace('"full"', f'"{adapter}"')
        self._process = subprocess.Popen(
            [sys.executable, "-c", enable + install + _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> str:
        """Run code; what it assigned to ``answer``. Fails the test where the code fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended with exit code {self._process.wait()}"
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        return str(reply["answer"])

    def close(self) -> None:
        """End the process; it must end well."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0, self._process.returncode

"""The process's end waits for what torch's autograd threads still hold."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]


def test_exit_waits_until_autograd_has_freed_what_was_queued(run_emulated: RunEmulated) -> None:
    # A thread keeps the callback for a while, as one of autograd's may.
    result = run_emulated("""
import atexit, threading, time

atexit.register(lambda: print("held at the end:", len(_backward_end._queued)))

import torch
from spillover import _backward_end

x = torch.ones(4, device="cuda", requires_grad=True)
x.register_hook(lambda g: _backward_end.queue_backward_end(lambda: print("backward ended")))
held = []
x.register_hook(lambda g: held.extend(_backward_end._queued))
(x * 2).sum().backward()
assert len(held) == 1

def let_go():
    time.sleep(0.3)
    held.clear()

threading.Thread(target=let_go, daemon=True).start()
""")
    assert result.stdout.splitlines() == ["backward ended", "held at the end: 0"]

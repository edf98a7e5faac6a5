"""Captures and launches that fail: what is over then, and what works again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

from spillover import emulator
from spillover.emulator import Fault, faults

RunEmulated = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("function", ["cuStreamEndCapture", "cudaStreamEndCapture"])
def test_a_capture_whose_end_fails_is_over(function: str) -> None:
    x = torch.ones(4, device="cuda")
    with (
        faults(Fault(function)) as injected,
        pytest.raises(RuntimeError, match="OS call failed"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.add_(1)
    assert len(injected.fired()) == 1
    torch.cuda.synchronize()
    assert x.tolist() == [1] * 4

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    graph.replay()
    assert x.tolist() == [2] * 4

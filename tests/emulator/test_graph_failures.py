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


def capture_and_replay() -> float:
    """One capture on two streams, two replays, and what came out."""
    x, side = torch.ones(64, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = y + torch.rand(64, device="cuda")
        torch.cuda.current_stream().wait_stream(side)
        z = z.clone()
    torch.cuda.manual_seed(1)
    graph.replay()
    graph.replay()
    total = z.sum().item()
    graph.reset()
    return total


def test_an_error_at_the_first_call_of_each_function_leaves_no_trace(settled_memory: None) -> None:
    functions = (
        "cuStreamIsCapturing",
        "cuGraphLaunch",
        "cuEventCreate",
        "cuEventRecordWithFlags",
        "cuStreamWaitEvent",
        "cuLaunchKernel",
        "cuPointerGetAttribute",
        "cuThreadExchangeStreamCaptureMode",
    )
    capture_and_replay()
    points = [Fault(name, call=1) for name in functions]
    report = emulator.sweep(capture_and_replay, points=points)
    report.check()
    assert report.raised.total() == len(functions)


def test_a_sweep_tells_of_a_device_that_does_not_work_and_holds_nothing_itself(
    run_emulated: RunEmulated,
) -> None:
    run_emulated(
        """
        import torch
        from spillover import emulator
        from spillover.emulator import Fault

        def chained():
            x = torch.zeros(4 << 20, device="cuda")
            try:
                x.cpu()
            finally:
                raise RuntimeError("CUDA error: OS call failed")

        def scenario():
            try:
                chained()
            except RuntimeError as error:
                if error.__context__ is not None:
                    raise

        emulator.sweep(scenario, points=[Fault("cuMemcpyAsync")]).check()

        def left_capturing():
            s = torch.cuda.Stream()
            with torch.cuda.stream(s):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin()
                torch.ones(4, device="cuda")
                graph.capture_end()

        left_capturing()
        report = emulator.sweep(left_capturing, points=[Fault("cuLaunchKernel")])
        assert report.raised
        assert any("does not work after it" in str(failure) for failure in report.failures)
        """
    )


def test_a_replay_on_memory_that_is_gone_is_refused_and_breaks_nothing(
    settled_memory: None,
) -> None:
    x = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    del x
    torch.cuda.empty_cache()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            graph.replay()
    assert "after it was freed" in emulator.hazards()[0]
    emulator.clear_hazards()
    # The runtime's last error is checked after every launch, the driver's at every wait.
    torch.cuda.synchronize()
    assert torch.zeros(8, device="cuda").add_(1).tolist() == [1] * 8


def test_compiled_functions_replay_through_torchs_graph_trees(run_emulated: RunEmulated) -> None:
    """They write inputs to addresses that they gave back to their pool, which keeps them."""
    run_emulated(
        """
        import torch
        compiled = torch.compile(lambda t: (t * 2).sin(), backend="cudagraphs")
        x = torch.linspace(0, 1, 64, device="cuda")
        for step in range(5):
            assert torch.equal(compiled(x + step), ((x + step) * 2).sin())
        """
    )

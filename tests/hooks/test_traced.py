"""Offloading under a trace: the same bits, every copy in it once, and its bytes in the figures."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import offloading, on_disk, settle
from activation_models import SMALL, assert_same, gradients, make_gpt, make_mlp

import chrome_format
import spillover
from spillover import offload_activations, stream_parameters, trace
from spillover._streams import CopyStreamStats, all_copy_streams, copy_streams
from spillover.emulator import Fault, faults


@pytest.fixture(autouse=True)
def nothing_is_left_on() -> Any:
    gc.collect()
    yield
    assert not trace.is_recording()


def stream_stats() -> tuple[CopyStreamStats, CopyStreamStats]:
    """Copies in and out of device 0 so far."""
    return copy_streams(torch.device("cuda", 0)).stats()


def traced(path: Path, run: Callable[[], Any]) -> tuple[Any, dict[str, Any], tuple[Any, Any]]:
    """What ``run`` gives, its trace, and the copies in and out that were counted meanwhile."""
    before = stream_stats()
    with trace.record(path, events_max=1 << 16):
        result = run()
        settle()  # What backward took before it had left may still be on its way to the disk.
    changes = [
        Counter(copies=now.copies - was.copies, bytes=now.bytes - was.bytes)
        for was, now in zip(before, stream_stats(), strict=True)
    ]
    return result, chrome_format.read(path), (changes[0], changes[1])


def total(spans: list[dict[str, Any]]) -> Counter[str]:
    return Counter(copies=len(spans), bytes=sum(span["args"]["bytes"] for span in spans))


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_activations(tier: str, tmp_path: Path) -> None:
    model = make_gpt()
    x = torch.randn(4, 24, 32, device="cuda")
    expected = gradients(model, x)
    context = offloading(**(on_disk(tmp_path / "spill") if tier == "disk" else {}))
    found, events, (came, left) = traced(
        tmp_path / "trace.json", lambda: gradients(model, x, context)
    )
    assert_same(found, expected)
    stats = context.stats()
    for name, moved, counted in [
        ("copy out", stats.bytes_out, left),
        ("copy in", stats.bytes_in, came),
    ]:
        spans = total(chrome_format.spans(events, name))
        assert spans["bytes"] == counted["bytes"] == moved > 0
        assert spans["copies"] <= counted["copies"]  # Several small ones are a batch.
    if tier == "disk":
        assert total(chrome_format.spans(events, "write"))["bytes"] == stats.disk_bytes_written > 0


def test_weights(tmp_path: Path) -> None:
    x = torch.randn(32, 64, device="cuda")
    expected = gradients(make_mlp(), x)
    model = make_mlp().cpu()
    handle = stream_parameters(
        model, blocks=[layer for layer in model if len(list(layer.parameters()))]
    )
    found, events, (came, left) = traced(tmp_path / "trace.json", lambda: gradients(model, x))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    stats = handle.stats
    assert total(chrome_format.spans(events, "weights: gradient")) == left
    blocks = [
        span for span in chrome_format.spans(events, "weights: block") if span["cat"] == "copy"
    ]
    assert total(blocks) == came == Counter(copies=stats.fetches, bytes=stats.fetched_bytes)
    assert left["bytes"] == stats.gradient_bytes > 0
    handle.remove()


def test_optimizer(tmp_path: Path) -> None:
    def run(recorded: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = make_mlp()
        optimizer = spillover.optim.AdamW(model.parameters(), lr=1e-2)
        gradients(model, torch.randn(32, 64, device="cuda"))

        def steps() -> None:
            for _ in range(3):
                optimizer.step()

        if not recorded:
            steps()
            return [parameter.detach().clone() for parameter in model.parameters()]
        _, events, (came, left) = traced(tmp_path / "trace.json", steps)
        size_bytes = sum(parameter.nbytes for parameter in model.parameters())
        # Gradients and weights come to the host, weights go back.
        assert (left["bytes"], came["bytes"]) == (6 * size_bytes, 3 * size_bytes)
        assert total(chrome_format.spans(events, "optimizer: gradients")) == left
        assert total(chrome_format.spans(events, "optimizer: new weights")) == came
        for name in ("step", "update", "gradients to arrive"):
            assert len(chrome_format.spans(events, f"optimizer: {name}")) == 3
        return [parameter.detach() for parameter in model.parameters()]

    for plain, recorded in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, recorded)


def test_nothing_is_timed_without_a_trace() -> None:
    before = stream_stats()
    gradients(make_mlp(), torch.randn(96, 64, device="cuda"), offload_activations(**SMALL))
    after = stream_stats()
    for was, now in zip(before, after, strict=True):
        assert now.copies > was.copies
        assert now.timed == was.timed


@pytest.mark.parametrize("times", [1, None])
def test_a_time_that_cannot_be_had_is_missing_and_nothing_else(
    tmp_path: Path, times: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(make_mlp(), x)
    model = make_mlp().cpu()
    handle = stream_parameters(
        model, blocks=[layer for layer in model if len(list(layer.parameters()))]
    )
    stream = torch.cuda.current_stream()

    def run() -> list[torch.Tensor]:
        with faults(Fault("cudaEventElapsedTime", times=times)) as injected:
            found = gradients(model, x)
            torch.cuda.synchronize()
            for streams in all_copy_streams():
                streams.collect()
            assert injected.fired()
        return found

    found, events, moved = traced(tmp_path / "trace.json", run)
    assert_same(found, expected)
    assert torch.cuda.current_stream() == stream
    timed = len([event for event in events["traceEvents"] if event.get("cat") == "copy"])
    copies = sum(direction["copies"] for direction in moved)
    assert timed == 0 if times is None else copies - 1 <= timed <= copies
    assert "is missing in the trace" in caplog.text
    handle.remove()


def test_times_of_copies_lie_within_the_recording(tmp_path: Path) -> None:
    x = torch.randn(96, 64, device="cuda")
    model = make_mlp().cpu()
    handle = stream_parameters(
        model, blocks=[layer for layer in model if len(list(layer.parameters()))]
    )

    def run() -> None:
        with trace.span("around"):
            gradients(model, x, offloading())
            torch.cuda.synchronize()

    _, events, _ = traced(tmp_path / "trace.json", run)
    (around,) = chrome_format.spans(events, "around")
    copies = [event for event in events["traceEvents"] if event.get("cat") in ("copy", "transfer")]
    assert "copy out" in {copy["name"] for copy in copies}
    slack_us = 100_000  # How well two clocks can be told apart on a machine that is busy.
    for copy in copies:
        assert around["ts"] - slack_us <= copy["ts"] <= around["ts"] + around["dur"] + slack_us
    for direction in stream_stats():
        assert direction.timed.in_flight == 0
        assert direction.bandwidth_bytes_s
        assert 0 < direction.timed.bytes <= direction.bytes
    handle.remove()


def test_figures_of_everything(tmp_path: Path) -> None:
    context = offload_activations(**SMALL, **on_disk(tmp_path))
    model = make_mlp()
    gradients(model, torch.randn(96, 64, device="cuda"), context)
    settle()
    found = spillover.stats()
    assert context.stats() in found.others["activations"]
    (store,) = (store for store in found.disks if store.folders[0].folder == str(tmp_path))
    assert store.folders[0].writes.bytes >= context.stats().disk_bytes_written > 0
    assert store.pending_extents == 0
    assert found.pinning.count > 0
    assert any(pool.reserved_bytes_max >= pool.used_bytes_max > 0 for pool in found.host)
    assert found.streams[0].direction == "in"
    text = str(found)
    for part in ("Memory", "Transfers", "Waits and work", "activations", str(tmp_path)[:20]):
        assert part in text
    del context
    gc.collect()
    assert found.others["activations"] != spillover.stats().others.get("activations", ())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_no_figures(tmp_path: Path) -> None:
    trace.start()
    gradients(make_mlp(), torch.randn(96, 64, device="cuda"), offload_activations(**SMALL))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = spillover.stats()
            code = (
                0
                if not (found.streams or found.host or found.disks or found.stalls)
                and not trace.is_recording()
                else 2
            )
        except BaseException as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    trace.stop()

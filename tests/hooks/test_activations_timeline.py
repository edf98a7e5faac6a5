"""The picture of what offloading did, and the points that it is drawn of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import offloading, on_disk
from activation_models import gradients, make_mlp

from spillover._errors import ConfigError, StateError
from spillover.hooks import OffloadedActivations
from spillover.hooks._activation_timeline import Point


def run(context: OffloadedActivations, *, steps: int) -> None:
    model = make_mlp()
    x = torch.randn(96, 64, device="cuda")
    for _ in range(steps):
        gradients(model, x, context)


def points_of(context: OffloadedActivations, rounds: int) -> list[Point]:
    assert context._engine is not None
    (device,) = context._engine.devices()
    assert device.timeline is not None
    return device.timeline.last_rounds(rounds)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_points_tell_where_the_bytes_were(tier: str, tmp_path: Path) -> None:
    options: dict[str, Any] = on_disk(tmp_path) if tier == "disk" else {}
    context = offloading(timeline=True, in_flight_max="16KiB", prefetch=0, **options)
    run(context, steps=3)
    points = points_of(context, 1)
    assert points == sorted(points, key=lambda point: point.time_ns)
    assert len({point.round_number for point in points}) == 1
    forward = [point for point in points if not point.is_backward]
    backward = [point for point in points if point.is_backward]
    assert points == forward + backward
    # All leaves, as `keep_on_device` is 0; and all that had left comes back.
    assert len(forward) > 1
    assert all(point.on_device_bytes == 0 for point in forward)
    away = [point.away_bytes for point in forward]
    assert away == sorted(away)
    assert away[-1] == context.stats().saved_bytes_max
    assert all(0 <= point.leaving_bytes <= point.away_bytes for point in forward)
    assert backward[-1].away_bytes == 0


def test_what_stays_is_on_the_device() -> None:
    context = offloading(timeline=True, keep_on_device="1GiB")
    run(context, steps=3)
    forward = [point for point in points_of(context, 1) if not point.is_backward]
    assert forward[-1].on_device_bytes > 0
    assert forward[-1].away_bytes == 0
    assert points_of(context, 1)[-1].on_device_bytes == 0


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    context = offloading(timeline=True)
    run(context, steps=3)
    context.plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    context.plot(str(tmp_path / "steps.svg"), rounds=1)
    text = (tmp_path / "steps.svg").read_text()
    for word in ("forward", "backward", "on the device", "on their way out", "off the device"):
        assert f"<!-- {word} -->" in text
    with pytest.raises(ConfigError, match="the format 'doc' is not one of"):
        context.plot(tmp_path / "steps.doc")
    with pytest.raises(ConfigError, match="cannot be written"):
        context.plot(tmp_path / "missing" / "steps.png")
    with pytest.raises(ConfigError, match="rounds must be"):
        context.plot(tmp_path / "steps.png", rounds=0)


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    context = offloading()
    run(context, steps=1)
    assert context._engine is not None
    assert all(device.timeline is None for device in context._engine.devices())
    with pytest.raises(StateError, match="timeline=True"):
        context.plot(tmp_path / "steps.png")
    with pytest.raises(StateError, match="run a forward pass"):
        offloading(timeline=True, prefetch="3MiB").plot(tmp_path / "steps.png")


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context = offloading(timeline=True)
    run(context, steps=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install spillover\[plots\]"):
        context.plot(tmp_path / "steps.png")

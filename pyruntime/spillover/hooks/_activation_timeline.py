"""What happened to the saved tensors of the last rounds, and the picture of it.

Times are the host's: it runs ahead of the device, so that a copy is under way for longer than the
picture has it, and bytes count as gone when the host has seen that they are.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spillover import _pictures
from spillover._errors import StateError

#: The oldest of more give way: some dozen steps of a large model.
_POINTS_MAX = 1 << 16
_MIB = 1 << 20


class Point(NamedTuple):
    """What was where, after a tensor was saved or asked for.

    Attributes
    ----------
    time_ns
        Of the monotonic clock; under the emulator's virtual clock, that of the thread.
    round_number
        Which forward and its backward; later ones have greater numbers.
    is_backward
        Whether backward asked; else forward saved.
    on_device_bytes
        That stayed, or have come back and wait for their use.
    leaving_bytes
        On their way out: their device memory is held yet.
    away_bytes
        Off the device, or on their way out.
    """

    time_ns: int
    round_number: int
    is_backward: bool
    on_device_bytes: int
    leaving_bytes: int
    away_bytes: int


class Timeline:
    """The last points of one device; guarded by the activations' lock."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=_POINTS_MAX)
        self._now_ns = _clock()

    def note(
        self,
        round_number: int,
        *,
        is_backward: bool,
        on_device_bytes: int,
        leaving_bytes: int,
        away_bytes: int,
    ) -> None:
        """Add a point of now."""
        self._points.append(
            Point(
                self._now_ns(),
                round_number,
                is_backward,
                on_device_bytes,
                leaving_bytes,
                away_bytes,
            )
        )

    def last_rounds(self, count: int) -> list[Point]:
        """The points of the last ``count`` rounds."""
        numbers = sorted({point.round_number for point in self._points})[-count:]
        return [point for point in self._points if point.round_number in numbers]


def _clock() -> Callable[[], int]:
    from spillover import emulator  # Not needed by who draws nothing.

    if emulator.is_enabled():
        try:
            emulator.now_ns()
        except StateError:  # It keeps no virtual time.
            pass
        else:
            return emulator.now_ns
    return time.monotonic_ns


def draw(panels: Sequence[tuple[str, list[Point]]], path: Path | str) -> None:
    """Draw one panel a device, of its name and points; see ``OffloadedActivations.plot``."""
    _pictures.require_picture(path)
    figure = _pictures.figure_class()(figsize=(9, 3.2 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (name, points) in zip(all_axes, panels, strict=True):
        _draw_panel(axes, name, points)
    _pictures.save(figure, path)


def _draw_panel(axes: Any, name: str, points: list[Point]) -> None:
    start_ns = points[0].time_ns
    _shade(axes, points, start_ns)
    axes.stackplot(
        [(point.time_ns - start_ns) / 1e6 for point in points],
        [point.on_device_bytes / _MIB for point in points],
        [point.leaving_bytes / _MIB for point in points],
        [max(point.away_bytes - point.leaving_bytes, 0) / _MIB for point in points],
        labels=["on the device", "on their way out", "off the device"],
        colors=["tab:green", "tab:orange", "tab:blue"],
        step="post",
    )
    axes.set_title(f"saved tensors, {name}", fontsize="medium")
    axes.set_xlabel("ms")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    # Below the panel: both ends of a round are where the curves are.
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=5)


def _shade(axes: Any, points: Iterable[Point], start_ns: int) -> None:
    """Forward and backward, each from its first point to its last."""
    shown: set[str] = set()
    for (_, is_backward), group in itertools.groupby(
        points, key=lambda point: (point.round_number, point.is_backward)
    ):
        times = [(point.time_ns - start_ns) / 1e6 for point in group]
        label = "backward" if is_backward else "forward"
        axes.axvspan(
            times[0],
            times[-1],
            facecolor="0.8" if is_backward else "0.92",
            label=None if label in shown else label,
        )
        shown.add(label)

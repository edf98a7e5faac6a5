"""The picture of a replay: what was live, and what each allocator held for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spillover._pictures import figure_class, require_picture, save
from spillover.replay._measure import Replay
from spillover.replay._trace import Trace

#: Curves often coincide, so the later ones are dashed and let the earlier ones be seen.
_COLOURS = {"native": "tab:red", "expandable": "tab:orange", "ours": "tab:green"}
_STYLES = {"native": "-", "expandable": (0, (6, 3)), "ours": (0, (2, 2))}
_POINTS_MAX = 4000


def plot(results: Sequence[tuple[Trace, Sequence[Replay]]], path: Path | str) -> None:
    """Draw one panel a trace: requested bytes that are live, and bytes held, over the events.

    Parameters
    ----------
    results
        Each trace with its replays.
    path
        The picture to write; its suffix chooses the format.

    Raises
    ------
    ConfigError
        matplotlib is missing, or does not know the format, or there is no such folder.
    """
    require_picture(path)
    figure = figure_class()(figsize=(9, 3.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, (trace, replays) in zip(panels, results, strict=True):
        _draw(axes, trace, replays)
    save(figure, path)


def _draw(axes: Any, trace: Trace, replays: Sequence[Replay]) -> None:
    live = trace.live_bytes()
    every = max(1, len(live) // _POINTS_MAX)
    axes.fill_between(
        range(0, len(live), every),
        live[::every] / 2**30,
        color="0.8",
        step="post",
        label=f"live, peak {trace.peak_bytes / 2**30:.2f} GiB",
    )
    for replay in sorted(replays, key=lambda one: list(_COLOURS).index(one.allocator)):
        positions = [i * replay.sample_every for i in range(len(replay.reserved_bytes))]
        end = "" if replay.failed_at is None else f", out of memory at event {replay.failed_at}"
        axes.step(
            positions,
            [held / 2**30 for held in replay.reserved_bytes],
            where="post",
            color=_COLOURS[replay.allocator],
            linestyle=_STYLES[replay.allocator],
            label=f"{replay.allocator}, {100 * replay.utilisation:.1f} % used{end}",
        )
    axes.set_title(trace.name, fontsize="medium")
    axes.set_xlabel("event")
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.legend(fontsize="small", loc="lower right")

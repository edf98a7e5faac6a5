"""The main job, shown: training a model whose weights alone exceed the device's memory.

Three runs of the same small GPT on real text: plain PyTorch under a memory limit (dies), Spillover
under the same limit, and plain PyTorch without the limit as the reference. Runs on the emulated
device, or on a real GPU where there is one. Writes ``demo-report/report.json`` and a picture of
device memory over time; the exit code is 0 only if everything that it claims was so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from spillover._units import format_bytes, parse_bytes
from spillover.emulator import Options
from spillover.emulator._command import environment

TRAIN = Path(__file__).with_name("demo_train.py")
UNLIMITED = "8GiB"
LOSS_TOLERANCE = 1e-5


@dataclass
class Run:
    """What one training process reported."""

    title: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_digest: str | None = None
    weight_bytes: int = 0
    device: str = ""
    error: str | None = None
    totals: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    exit_code: int = 0
    stderr_tail: str = ""

    @property
    def step_seconds_median(self) -> float:
        """Median time of a step after the first, in seconds."""
        later = sorted(self.seconds[1:])
        return later[len(later) // 2] if later else float("nan")


def train_events(command: list[str], env: dict[str, str], run: Run) -> Iterator[dict[str, Any]]:
    """Start a training process and yield its events; its end is noted in ``run``."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, cwd=TRAIN.parent
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        run.exit_code = process.wait()
        stderr.seek(0)
        run.stderr_tail = stderr.read()[-2000:]


def train(title: str, arguments: list[str], env: dict[str, str], progress: Progress) -> Run:
    """Run one training process to its end, showing its progress."""
    run = Run(title)
    steps = int(arguments[arguments.index("--steps") + 1])
    task = progress.add_task(title, total=steps, loss="")
    for event in train_events([sys.executable, str(TRAIN), *arguments], env, run):
        kind = event.pop("event")
        if kind == "start":
            run.weight_bytes, run.device = event["weight_bytes"], event["device"]
        elif kind == "step":
            run.losses.append(event["loss"])
            run.seconds.append(event["seconds"])
            run.gradient_digest = event["digest"] or run.gradient_digest
            progress.update(task, advance=1, loss=f"loss {event['loss']:.4f}")
        elif kind == "out_of_memory":
            run.error = event["message"]
            progress.update(task, loss="[red]torch.OutOfMemoryError")
        elif kind == "memory":
            run.memory = [tuple(sample) for sample in event["samples"]]
        elif kind == "done":
            run.totals = event
    progress.stop_task(task)
    return run


def has_real_gpu() -> bool:
    """Whether PyTorch sees a GPU without any help of ours."""
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def claims(plain: Run, offloaded: Run, reference: Run, limit_bytes: int) -> dict[str, bool]:
    """Everything that the demo claims, and whether it was so."""
    pairs = list(zip(offloaded.losses, reference.losses, strict=False))
    complete = bool(pairs) and len(offloaded.losses) == len(reference.losses)
    peak = offloaded.totals.get("peak_reserved_bytes", limit_bytes + 1)
    return {
        "the weights alone exceed the limit": reference.weight_bytes > limit_bytes,
        "plain PyTorch under the limit dies with torch.OutOfMemoryError": plain.error is not None,
        "offloaded under the limit finishes": bool(offloaded.totals) and offloaded.exit_code == 0,
        "its device memory stays under the limit": peak <= limit_bytes,
        "host and disk hold what the device does not": offloaded.totals.get("host_bytes", 0) > 0
        and offloaded.totals.get("disk_bytes", 0) > 0,
        "its loss falls": complete and offloaded.losses[-1] < 0.8 * offloaded.losses[0],
        "first loss and all gradients equal the reference bit for bit": complete
        and offloaded.losses[0] == reference.losses[0]
        and offloaded.gradient_digest is not None
        and offloaded.gradient_digest == reference.gradient_digest,
        f"all losses equal the reference within {LOSS_TOLERANCE:g}": complete
        and all(abs(a - b) <= LOSS_TOLERANCE * abs(b) for a, b in pairs),
    }


def table_of(runs: list[Run]) -> Table:
    """The comparison as a table."""
    table = Table(
        title="A small GPT on the standard library's sources: peak memory, time, loss",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("run", "device", "host", "disk", "s/step", "first", "last"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for run in runs:
        if not run.totals:
            outcome = "OOM error" if run.error else f"exit code {run.exit_code}"
            table.add_row(run.title, f"[red]{outcome}", "", "", "", "", "")
            continue
        table.add_row(
            run.title,
            format_bytes(run.totals["peak_allocated_bytes"]),
            format_bytes(run.totals["host_bytes"]),
            format_bytes(run.totals["disk_bytes"]),
            f"{run.step_seconds_median:.2f}",
            f"{run.losses[0]:.3f}",
            f"{run.losses[-1]:.3f}",
        )
    return table


def draw(runs: list[Run], limit_bytes: int, path: Path) -> None:
    """Draw allocated device memory over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for run in runs:
        if run.memory:
            seconds, sizes = zip(*run.memory, strict=True)
            axes.plot(seconds, [size / 2**20 for size in sizes], label=run.title, linewidth=0.9)
    axes.axhline(limit_bytes / 2**20, color="tab:red", linestyle="--", label="limit")
    weights_mib = max(run.weight_bytes for run in runs) / 2**20
    axes.axhline(weights_mib, color="tab:gray", linestyle=":", label="weights alone")
    axes.set_xlabel("seconds (emulated device: says nothing about a GPU's speed)")
    axes.set_ylabel("allocated device memory, MiB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the demo; 0 only if all that it claims held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", default="96MiB", help="device memory of the limited runs")
    parser.add_argument("--report", type=Path, default=Path("demo-report"))
    arguments = parser.parse_args()
    limit_bytes = parse_bytes(arguments.limit, name="--limit")
    arguments.report.mkdir(parents=True, exist_ok=True)
    report_folder = arguments.report.resolve()
    console = Console()
    start_s = time.monotonic()

    real_gpu = has_real_gpu()
    console.print(
        f"Device: {'a real GPU' if real_gpu else 'emulated (no GPU here; times mean nothing)'}; "
        f"limit {format_bytes(limit_bytes)}"
    )

    def device(vram: str) -> dict[str, str]:
        return dict(os.environ) if real_gpu else environment(Options(vram=vram, hazards="raise"))

    common = ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    limited = [*common, "--limit-bytes", str(limit_bytes if real_gpu else 0)]
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="spill-", dir=report_folder) as spill,
        Progress(
            *columns, TimeElapsedColumn(), TextColumn("{task.fields[loss]}"), console=console
        ) as progress,
    ):
        plain = train(
            "plain, limit",
            ["--mode", "plain", *limited],
            device(arguments.limit),
            progress,
        )
        offloaded = train(
            "spillover, limit",
            ["--mode", "offload", "--spill", spill, *limited],
            device(arguments.limit),
            progress,
        )
        reference = train(
            "plain, no limit", ["--mode", "plain", *common], device(UNLIMITED), progress
        )

    runs = [plain, offloaded, reference]
    if plain.error:
        console.print(f"[red]plain, limited:[/] torch.OutOfMemoryError: {plain.error}")
    for run in runs:
        if run.exit_code != 0:
            console.print(f"[red]{run.title}: exit code {run.exit_code}[/]\n{run.stderr_tail}")
    console.print(table_of(runs))
    held = claims(plain, offloaded, reference, limit_bytes)
    for claim, true in held.items():
        console.print(f"{'[green]yes' if true else '[red]NO '}[/] {claim}")
    differing = sum(a != b for a, b in zip(offloaded.losses, reference.losses, strict=False))
    console.print(f"{differing} of {len(reference.losses)} losses differ in any bit")

    draw(runs, limit_bytes, report_folder / "memory.png")
    report = {
        "device": reference.device,
        "emulated": not real_gpu,
        "limit_bytes": limit_bytes,
        "weight_bytes": reference.weight_bytes,
        "claims": held,
        "runs": [vars(run) for run in runs],
        "seconds": round(time.monotonic() - start_s, 1),
    }
    (report_folder / "report.json").write_text(json.dumps(report, indent=1))
    console.print(f"Report: {arguments.report}/report.json and memory.png")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

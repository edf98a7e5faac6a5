"""Durable stores that lose power on a simulated disk, processes and trainings that are killed.

A point is survived when the store opens by itself afterwards and everything in it is that of the
last commit that was acknowledged, or of the one under way, as a whole.
``crash_points_lost_without_syncs`` is the control: the same check on a disk that forgets what was
flushed must find losses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks._crash import killed, simulated, training
from benchmarks._crash.simulated import Workload


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told beyond the common options."""
    parser.add_argument("--folder", type=Path, help="where processes are killed; else temporary")


def run(*, quick: bool, folder: Path | None = None) -> dict[str, Any]:
    """Cut histories everywhere, then kill processes."""
    points_min, seeds, kills = (300, 1, 6) if quick else (10_000, 4, 200)
    trainings = 3 if quick else 50
    tried = 0
    problems: list[str] = []
    workers = min(4, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        first = 0
        while tried < points_min:
            batch = [
                Workload(number, commits=1 if quick else 3, engine=_engine(number))
                for number in range(first, first + 2 * workers)
            ]
            for count, found in pool.map(simulated.cut_everywhere, batch, [seeds] * len(batch)):
                tried += count
                problems += found
            first += len(batch)
        lost = pool.submit(simulated.lost_without_syncs, Workload(1), seeds).result()
    assert lost > 0, "a disk that forgets what was flushed was not noticed: the check is blind"
    with tempfile.TemporaryDirectory(dir=folder) as root:
        kill_problems = killed.kill_many(Path(root), kills)
    trained = training.kill_many(folder, trainings)
    training_problems: list[str] = trained["problems"]
    return {
        "metrics": {
            "optimizer_kill_points_survived": trainings - len(training_problems),
            "optimizer_kill_points_tried": trainings,
            "kill_points_survived": kills - len(kill_problems),
            "kill_points_tried": kills,
            "crash_points_survived": tried - len(problems),
            "crash_points_tried": tried,
            "crash_points_lost_without_syncs": lost,
        },
        "details": {"problems": (problems + kill_problems + training_problems)[:100]},
        "notes": [
            f"{first} workloads, each cut after every event of its history, with {seeds} seeds "
            "a cut; every fourth one crashes again while it is opened and used",
            "processes end by SIGKILL within 80 ms of their start of opening the store; each third "
            "one while there is no store yet, or while it is made",
            f"trainings with state on disk are killed within {trained['window_s']:.2f} s of their "
            f"start, {trained['in_training']} of them between the first step and the last; "
            "each resumes and ends with the weights of one that was never killed",
            *problems[:5],
            *kill_problems[:5],
            *training_problems[:5],
        ],
    }


def _engine(number: int) -> str:
    return "auto" if number % 8 == 7 else "threads"

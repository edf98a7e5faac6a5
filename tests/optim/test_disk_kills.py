"""Trainings with state on disk that are killed at random instants, as 50 are in the benchmark."""

from __future__ import annotations

from pathlib import Path

from benchmarks._crash import training


def test_who_is_killed_resumes_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    found = training.kill_many(tmp_path, 5)
    assert found["problems"] == []

"""Operators in dry runs: the results, peaks and allocations of runs that compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def measured(way: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.emulator.dry_operators", way],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.soak
def test_operators_that_training_meets() -> None:
    computed, dry = measured("computed"), measured("dry")
    assert computed.keys() == dry.keys()
    failed = {name: value for name, value in computed.items() if isinstance(value, str)}
    assert not failed
    for name, expected in computed.items():
        assert dry[name] == expected, name

"""The demo's claims hold, on a shorter run than `make demo`'s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_demo_holds_what_it_claims(tmp_path: Path) -> None:
    result = demo("--steps", "3", "--batch", "1", "--report", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(report["claims"].values())
    assert report["weight_bytes"] > report["limit_bytes"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("spill-*")), "the spill folder was left behind"


@pytest.mark.soak
def test_demo_fails_when_a_claim_does_not_hold(tmp_path: Path) -> None:
    """With a limit that everything fits, plain PyTorch does not run out of memory."""
    result = demo("--steps", "2", "--batch", "1", "--limit", "2GiB", "--report", str(tmp_path))
    assert result.returncode == 1
    assert "NO  the weights alone exceed the limit" in result.stdout

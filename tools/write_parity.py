"""Writes docs/parity.md: runs the checks of tests/parity under every allocator."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]

from spillover import emulator  # noqa: E402

emulator.enable(vram="512MiB")  # Importing the checks imports torch.

import table  # noqa: E402


def main() -> None:
    """Run and write."""
    table.DOCUMENT.write_text(table.render(table.run()))


if __name__ == "__main__":
    main()

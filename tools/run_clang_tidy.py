"""Runs clang-tidy over our sources in a build folder's compile commands, two at a time.

Usage: run_clang_tidy.py BUILD_FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(build_folder: Path) -> int:
    """Check each source once and return the number of files with findings."""
    commands = json.loads((build_folder / "compile_commands.json").read_text())
    files = sorted({entry["file"] for entry in commands if f"{ROOT}/csrc/" in entry["file"]})
    tidy = Path(sys.executable).with_name("clang-tidy")

    def check(file: str) -> bool:
        result = subprocess.run(
            [str(tidy), "-p", str(build_folder), "--quiet", file],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0 or "warning:" in result.stdout:
            print(result.stdout, flush=True)
            return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = sum(not passed for passed in pool.map(check, files))
    print(f"clang-tidy: {len(files)} files, {failed} with findings")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)

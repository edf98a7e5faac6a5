"""Runs several programs in one process: ``python tests/stacks/programs NAME...``; none runs all.

Prints one JSON object a program, ``{"program": ..., "outcome": "ok", "skipped" or "failed"}``, and
exits with 1 if any failed. One that passed names the allocator of the device's memory, too.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import _program
import torch


def run(name: str) -> dict[str, object]:
    """Run one program and say how it went."""
    start = time.perf_counter()
    module = importlib.import_module(name)
    reason = _program.missing(getattr(module, "NEEDS", ()))
    if reason is not None:
        return {"program": name, "outcome": "skipped", "reason": reason}
    try:
        _program.check(module.run)
    except Exception:
        return {"program": name, "outcome": "failed", "reason": traceback.format_exc()}
    return {
        "program": name,
        "outcome": "ok",
        "allocator": torch.cuda.get_allocator_backend(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(names: list[str]) -> int:
    """Run the programs one after another."""
    here = Path(__file__).parent
    names = names or sorted(path.stem for path in here.glob("[a-z]*.py"))
    failed = False
    for name in names:
        result = run(name)
        failed |= result["outcome"] == "failed"
        print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

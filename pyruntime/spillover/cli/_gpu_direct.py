"""Probes GPUDirect Storage: ``python -m spillover.cli._gpu_direct FOLDER``, for the doctor."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from spillover import _core

_NAME = "libcufile.so.0"
_MARK = "gpu_direct "


def main(folder: str) -> None:
    """Ask the first library that can be loaded, and print one line for ``parse()``."""
    if not _core.driver_available():
        answer = (False, 0, "there is no CUDA driver that works")
    else:
        for library in libraries():
            found = _core.probe_gpu_direct(library, folder)
            answer = (found.works, found.library_version, found.reason)
            if found.library_version:
                break
    print(_MARK + json.dumps(answer), flush=True)


def libraries() -> list[str]:
    """Names for dlopen: the system's, then those that torch brings."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in sorted(Path(place).glob(f"*/lib/{_NAME}"))]
    return [_NAME, *map(str, found)]


def parse(output: str) -> tuple[bool, int, str] | None:
    """What ``main()`` printed; None where it did not get that far."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            works, version, reason = json.loads(line.removeprefix(_MARK))
            return bool(works), int(version), str(reason)
    return None


if __name__ == "__main__":
    main(sys.argv[1])

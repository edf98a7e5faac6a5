"""A program with our allocator in place:
``python -m spillover.allocator._run [--record-trace FILE] (SCRIPT | -m MODULE) [ARGS]``.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from spillover._errors import SpilloverError
from spillover.allocator._install import install
from spillover.allocator._record import record_trace


def main() -> None:
    """Install the allocator, then run the script or module as ``python`` would."""
    try:
        install()
        if sys.argv[1] == "--record-trace":
            record_trace(sys.argv[2])
            del sys.argv[1:3]
    except SpilloverError as error:
        sys.exit(f"spillover run: {error}")
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

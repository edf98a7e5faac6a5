"""``python -m spillover.allocator._run [--record-trace FILE] SCRIPT [ARGS]``: a script with our
allocator in place.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from spillover._errors import SpilloverError
from spillover.allocator._install import install
from spillover.allocator._record import record_trace


def main() -> None:
    """Install the allocator, then run the script as ``python SCRIPT`` would."""
    try:
        install()
        if sys.argv[1] == "--record-trace":
            record_trace(sys.argv[2])
            del sys.argv[1:3]
    except SpilloverError as error:
        sys.exit(f"spillover run: {error}")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

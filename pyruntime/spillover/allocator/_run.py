"""``python -m spillover.allocator._run SCRIPT [ARGS]``: a script with our allocator in place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from spillover._errors import SpilloverError
from spillover.allocator._install import install


def main() -> None:
    """Install the allocator, then run the script as ``python SCRIPT`` would."""
    try:
        install()
    except SpilloverError as error:
        sys.exit(f"spillover run: {error}")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

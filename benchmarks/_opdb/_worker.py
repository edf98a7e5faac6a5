"""A process that compares operators: reads their names, writes one JSON object a line.

``python -m benchmarks._opdb._worker float32`` (or ``--list`` for all names).
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings


def main() -> None:
    """Serve names from standard input until it ends."""
    # Whatever operators print must not reach the results.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import spillover.emulator

    spillover.emulator.enable(vram="4GiB", schedule="late", hazards="raise")
    import torch

    torch.set_num_threads(1)
    # Also keeps op_db from asking for packages that only its references need.
    from benchmarks._opdb import _compare

    database = _compare.database()
    if sys.argv[1] == "--list":
        output.write("\n".join(database))
        return
    comparison = _compare.Comparison(sys.argv[1])
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        result = comparison.compare(database[name])
        spillover.emulator.clear_hazards()
        result["seconds"] = round(time.perf_counter() - start, 3)
        output.write(json.dumps({"name": name, **result}) + "\n")
        output.flush()


if __name__ == "__main__":
    main()

"""``python -m benchmarks NAME [--quick] [--json FILE]``; also ``--list`` and ``--all``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks
from benchmarks import _harness


def names() -> list[str]:
    """Every public module of this package is a benchmark with a ``run(quick)`` function.

    One with options of its own has ``add_options(parser)``, and gets them as keywords.
    """
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def main() -> int:
    """Run the named benchmark; 0 when its data verified."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names(), help="which benchmark")
    parser.add_argument("--all", action="store_true", help="run every benchmark")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and exit")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments, rest = parser.parse_known_args()
    if arguments.list:
        print("\n".join(names()))
        return 0
    if bool(arguments.name) == arguments.all:
        parser.error(f"name one benchmark ({', '.join(names())}) or pass --all")
    if arguments.all and arguments.json:
        parser.error("--json takes the result of one benchmark; name it")
    if arguments.all and rest:
        parser.error(f"{rest[0]} is an option of one benchmark; name it")
    for name in names() if arguments.all else [arguments.name]:
        module = importlib.import_module(f"benchmarks.{name}")
        own = argparse.ArgumentParser(prog=f"python -m benchmarks {name}")
        if hasattr(module, "add_options"):
            module.add_options(own)
        options = vars(own.parse_args(rest))
        result = {
            "benchmark": name,
            "quick": arguments.quick,
            "machine": _harness.machine_facts(),
            **module.run(quick=arguments.quick, **options),
        }
        _harness.print_result(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

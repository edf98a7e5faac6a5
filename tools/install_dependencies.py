"""Installs the project's dependencies without the project itself.

Usage: install_dependencies.py EXTRA...
       install_dependencies.py --optional EXTRA...

pip can install a project's dependencies only along with the project, whose build comes later.
With --optional, only the named extras are installed, the torch that is installed stays as it is,
and what cannot be had is said and left out.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pip carries the same parser.
    from pip._vendor import tomli as tomllib

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements_of(extras: list[str]) -> list[str]:
    """What the extras ask for."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    return [text for extra in extras for text in project["optional-dependencies"][extra]]


def install(requirements: list[str], *options: str) -> bool:
    """Whether pip could install them."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, *requirements]
    return subprocess.run(command, check=False).returncode == 0


def install_optional(extras: list[str]) -> None:
    """Install what can be had beside the installed torch: all at once, else one by one."""
    requirements = requirements_of(extras)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n")
        options = ("--retries", "1", "--constraint", str(constraints))
        if install(requirements, *options):
            return
        missing = [text for text in requirements if not install([text], *options)]
    if missing:
        print(f"not installed, so their tests are skipped: {', '.join(missing)}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Install the dependencies and those of the named extras, or optional extras alone."""
    if arguments[:1] == ["--optional"]:
        install_optional(arguments[1:])
        return 0
    project = tomllib.loads(PROJECT.read_text())["project"]
    return 0 if install(project["dependencies"] + requirements_of(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

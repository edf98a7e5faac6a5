"""Runs the C++ compiler: several files at a time, and with its own words where it fails."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spillover._errors import BuildError, ConfigError

_JOBS_MAX = 4
_LINES_SHOWN_MAX = 40


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that works."""

    command: tuple[str, ...]
    identity: str  # what it says of itself; part of the cache's key


def find_compiler() -> Compiler:
    """The compiler in ``$CXX``, else ``c++``, else ``g++``.

    Raises
    ------
    BuildError
        There is none, or it does not run.
    ConfigError
        ``$CXX`` is not a command.
    """
    configured = os.environ.get("CXX")
    names = [configured] if configured else ["c++", "g++", "clang++"]
    for name in names:
        words = _split(name)
        path = shutil.which(words[0]) if words else None
        if path is not None:
            command = (path, *words[1:])
            return Compiler(command=command, identity=_identify(command))
    raise BuildError(
        f"no C++ compiler was found (looked for {', '.join(names)}); install one, for example "
        "with 'apt install g++', or set CXX to its path"
    )


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(
            f"CXX={command!r} is not a command ({error}); set it to a C++ compiler, such as "
            "'g++' or 'ccache g++'"
        ) from error


def _identify(command: tuple[str, ...]) -> str:
    # With the arguments: of "ccache g++" it is g++ that compiles, and that may be missing.
    shown = shlex.join(command)
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {shown} does not run: {error}") from error
    if result.returncode != 0:
        raise BuildError(
            f"the C++ compiler {shown} does not run: '{shown} --version' ended with exit code "
            f"{result.returncode}: {result.stderr.strip()}"
        )
    return result.stdout.strip()


def compile_and_link(
    compiler: Compiler,
    sources: Sequence[Path],
    *,
    output: Path,
    compile_flags: Sequence[str],
    link_flags: Sequence[str],
) -> None:
    """Compile ``sources`` into the shared library ``output``; objects lie beside it for a while.

    As many translation units are made as there are processors, each of several sources: parsing
    torch's headers takes most of the time, and is thus done once a unit instead of once a file.
    The names in the sources' anonymous namespaces must therefore differ.

    Raises
    ------
    BuildError
        The compiler or linker failed; the message has what it printed.
    """
    jobs = max(1, min(_JOBS_MAX, len(os.sched_getaffinity(0)), len(sources)))
    units = _write_units(sources, jobs, output.parent)
    objects = [unit.with_suffix(".o") for unit in units]
    commands = [
        [*compiler.command, *compile_flags, "-c", str(unit), "-o", str(target)]
        for unit, target in zip(units, objects, strict=True)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run, command) for command in commands]
        try:
            for future in futures:
                future.result()
        except BaseException:
            # The rest would fail in the same way; what has not started is dropped.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _run([*compiler.command, "-shared", *map(str, objects), "-o", str(output), *link_flags])
    for path in (*units, *objects):
        path.unlink()


def _write_units(sources: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """Write ``count`` files that include all sources, about equally much text each."""
    groups: list[list[Path]] = [[] for _ in range(count)]
    for source in sorted(sources, key=lambda path: path.stat().st_size, reverse=True):
        smallest = min(groups, key=lambda group: sum(path.stat().st_size for path in group))
        smallest.append(source)
    units = []
    for index, group in enumerate(groups):
        unit = folder / f"unit_{index}.cpp"
        unit.write_text("".join(f'#include "{source}"\n' for source in sorted(group)))
        units.append(unit)
    return units


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise BuildError(f"the C++ compiler does not start: {error}") from error
    if result.returncode == 0:
        return
    lines = (result.stderr + result.stdout).strip().splitlines()
    shown = "\n".join(f"  {line}" for line in lines[:_LINES_SHOWN_MAX])
    if len(lines) > _LINES_SHOWN_MAX:
        shown += f"\n  ... and {len(lines) - _LINES_SHOWN_MAX} more lines"
    raise BuildError(
        f"the C++ compiler failed (exit code {result.returncode}):\n{shown}\n"
        f"The command was: {shlex.join(command)}\n{_advice(result.stderr)}"
    )


def _advice(output: str) -> str:
    if "Python.h" in output:
        return "Install Python's headers, for example with 'apt install python3-dev'."
    if "cannot execute" in output or "cc1plus" in output:
        return "Install a complete C++ compiler, for example with 'apt install g++'."
    if "No space left" in output:
        return "Free some disk space, or set SPILLOVER_CACHE_DIR to a folder elsewhere."
    return "A newer g++ (11 or later) or another one named by CXX may help."

"""Runs a command whose Python processes all get emulated devices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from spillover._children import with_site
from spillover._errors import ConfigError
from spillover._settings import enabled
from spillover.emulator._options import ACTIVE_VARIABLE, Options

_PYTHON = re.compile(r"(python|pypy)[0-9.]*t?")
#: Python's options that end the list of options, take a value, or keep our sitecustomize out.
_LAST_OPTIONS = "cm"
_OPTIONS_WITH_VALUE = "WX"
_BLIND_OPTIONS = {
    "I": "leaves PYTHONPATH out",
    "E": "leaves PYTHONPATH out",
    "S": "leaves sitecustomize out",
}


def environment(options: Options, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``base`` with what a Python process needs to get emulated devices at start."""
    # `python` in the command means the one that runs us, also where its venv is not activated.
    binaries = [str(Path(sys.executable).parent), base.get("PATH", os.defpath)]
    return {
        **with_site(base),
        **options.environment(),
        ACTIVE_VARIABLE: "1",
        "PATH": os.pathsep.join(binaries),
    }


def run(command: Sequence[str], options: Options | None = None) -> int:
    """Run ``command`` on emulated devices, child processes included, and return its exit code.

    Parameters
    ----------
    command
        Program and arguments, such as ``["python", "train.py"]``.
    options
        The devices; None takes ``SPILLOVER_EMULATOR_*`` and the defaults.

    Returns
    -------
    int
        The exit code; a negative number is the signal that ended the program.

    Raises
    ------
    ConfigError
        The program does not exist or cannot be started, an option is wrong, or the command is
        Python with an option that keeps the emulation out.
    """
    program, child_environment = _prepare(command, options)
    try:
        return subprocess.run(
            [program, *command[1:]], env=child_environment, check=False
        ).returncode
    except OSError as error:
        raise ConfigError(f"{program} cannot be started: {error.strerror}") from error


def replace_process(command: Sequence[str], options: Options | None = None) -> NoReturn:
    """Become ``command``: signals, the terminal and the exit code are then the program's own.

    Raises
    ------
    ConfigError
        As ``run()``.
    """
    program, child_environment = _prepare(command, options)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, [program, *command[1:]], child_environment)
    except OSError as error:
        raise ConfigError(f"{program} cannot be started: {error.strerror}") from error


def _prepare(command: Sequence[str], options: Options | None) -> tuple[str, dict[str, str]]:
    options = options or Options.from_environment()
    if not command:
        raise ConfigError("name a command, such as: spillover emulate -- python train.py")
    if not enabled():
        raise ConfigError("SPILLOVER=0 switches the emulated device off; unset it, or set it to 1")
    _require_site(command)
    child_environment = environment(options)
    program = shutil.which(command[0], path=child_environment["PATH"])
    if program is None:
        if Path(command[0]).is_file():
            raise ConfigError(f"{command[0]!r} is not executable; put python in front of it")
        raise ConfigError(f"there is no program {command[0]!r} on the PATH")
    return program, child_environment


def _require_site(command: Sequence[str]) -> None:
    """Refuse ``python -I`` and the like: it would run without emulation, and without a word."""
    if not _PYTHON.fullmatch(Path(command[0]).name):
        return
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            return
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(words, None)
            continue
        for index, letter in enumerate(word[1:], start=1):
            if letter in _BLIND_OPTIONS:
                raise ConfigError(
                    f"python -{letter} {_BLIND_OPTIONS[letter]}, through which the emulated device "
                    f"reaches a process; leave -{letter} out, or call spillover.emulator.enable() "
                    "in the script"
                )
            if letter in _LAST_OPTIONS:
                return
            if letter in _OPTIONS_WITH_VALUE:
                if index == len(word) - 1:
                    next(words, None)
                break

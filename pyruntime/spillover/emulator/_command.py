"""Runs a command whose Python processes all get emulated devices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from spillover._errors import ConfigError
from spillover.emulator._options import ACTIVE_VARIABLE, Options


def environment(options: Options, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``base`` with what a Python process needs to get emulated devices at start."""
    site = str(Path(__file__).with_name("_site"))
    rest = [entry for entry in base.get("PYTHONPATH", "").split(os.pathsep) if entry != site]
    # `python` in the command means the one that runs us, also where its venv is not activated.
    binaries = [str(Path(sys.executable).parent), base.get("PATH", os.defpath)]
    return {
        **base,
        **options.environment(),
        ACTIVE_VARIABLE: "1",
        "PYTHONPATH": os.pathsep.join([site, *filter(None, rest)]),
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

    Raises
    ------
    ConfigError
        The program does not exist, or an option is wrong.
    """
    options = options or Options.from_environment()
    if not command:
        raise ConfigError("name a command, such as: spillover emulate -- python train.py")
    child_environment = environment(options)
    program = shutil.which(command[0], path=child_environment["PATH"])
    if program is None:
        raise ConfigError(f"there is no program {command[0]!r} on the PATH")
    process = subprocess.Popen([program, *command[1:]], env=child_environment)
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal has sent the signal to the child too; its own handling decides.
            continue
        return code if code >= 0 else 128 - code

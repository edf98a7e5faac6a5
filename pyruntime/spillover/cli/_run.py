"""``spillover run``: a program, and the processes that it starts, on Spillover's allocator."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from spillover import _core
from spillover._children import (
    RUN_TRACE_VARIABLE,
    RUN_VARIABLE,
    TRACE_OWNER_VARIABLE,
    TRACE_VARIABLE,
    with_site,
)
from spillover._errors import ConfigError
from spillover._settings import enabled
from spillover.cli._places import require_file_place

_SETTINGS_VARIABLE = "SPILLOVER_ALLOCATOR"


def replace_process(
    program: Sequence[str],
    settings: Sequence[str],
    record_trace: Path | None,
    trace: str | None,
) -> NoReturn:
    """Become ``python`` with the program: its exceptions, signals and exit code are then its own.

    The environment alone has the allocator installed, once the program imports torch.

    Parameters
    ----------
    program
        A script, a folder or an archive with ``__main__.py``, ``-`` for standard input, or ``-m``
        and a module; then arguments.
    settings
        Settings of the pool as ``key=value``; they come before those of the environment.
    record_trace
        Where to write what the program itself allocates on device 0.
    trace
        Where to write a trace of the whole run.

    Raises
    ------
    ConfigError
        There is no such script, what stands in its place is no option of ours, a setting is wrong,
        or the trace cannot be written there.
    """
    _require_program(program)
    environment = with_site(os.environ)
    environment[RUN_VARIABLE] = "1"
    if settings:
        environment[_SETTINGS_VARIABLE] = _merge(os.environ.get(_SETTINGS_VARIABLE, ""), settings)
    if record_trace is not None:
        require_file_place(record_trace)
        environment[RUN_TRACE_VARIABLE] = str(record_trace.absolute())
    if trace is not None:
        require_file_place(Path(trace))
        environment[TRACE_VARIABLE] = str(Path(trace).absolute())
        environment.pop(TRACE_OWNER_VARIABLE, None)
    # Before the program begins, not when it imports torch after an hour.
    if enabled():
        _core.check_settings(environment.get(_SETTINGS_VARIABLE, ""), _SETTINGS_VARIABLE)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *program], environment)


def _require_program(program: Sequence[str]) -> None:
    first = program[0]
    if first == "-m":
        if len(program) == 1:
            raise ConfigError("-m needs the name of a module")
    elif first.startswith("-") and first != "-":
        raise ConfigError(
            f"there is no option {first!r}; before the script there may be --limit, --set, "
            "--record-trace, --trace, and -m MODULE in its place"
        )
    elif first != "-" and not Path(first).exists():
        raise ConfigError(f"there is no script {first!r}")


def _merge(text: str, settings: Sequence[str]) -> str:
    """The environment's settings with those of the command line in the place of the same keys."""
    own = {_key(part) for setting in settings for part in setting.split(",")}
    kept = [part for part in text.split(",") if part.strip() and _key(part) not in own]
    return ",".join([*kept, *settings])


def _key(part: str) -> str:
    return part.split("=")[0].strip()

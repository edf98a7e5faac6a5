"""``SPILLOVER_TRACE=FILE``: a trace from the first import of spillover to the end of the process.

Importing ``spillover`` calls :func:`begin` where the variable is set.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path

from spillover import _core
from spillover._children import TRACE_OWNER_VARIABLE, TRACE_VARIABLE
from spillover._errors import ConfigError
from spillover._settings import enabled, logger
from spillover.trace import _recording
from spillover.trace._files import require_place

_EVENTS_VARIABLE = "SPILLOVER_TRACE_EVENTS"
_PROCESS = "%p"


def begin() -> None:
    """Record from now on and write at the end of the process, if it is the one that is meant.

    Raises
    ------
    ConfigError
        The file cannot be put there, or the number of events is none.
    """
    name = os.environ.get(TRACE_VARIABLE, "")
    if not name or not enabled() or not _is_meant(name):
        return
    events_max = _events_max()
    place = require_place(TRACE_VARIABLE, name.replace(_PROCESS, str(os.getpid())))
    with _recording._lock:
        _recording._join(events_max)
    # What is registered first comes last: other parts end their copies before.
    atexit.register(_write, place, os.getpid())


def _is_meant(name: str) -> bool:
    """Whether this process writes: each does where the name has the number of the process.

    Else only the first one does, not those that it starts, which would write over its file. It
    keeps its number where it becomes another program.
    """
    if _PROCESS in name:
        return True
    owner = os.environ.setdefault(TRACE_OWNER_VARIABLE, str(os.getpid()))
    return owner == str(os.getpid())


def _events_max() -> int:
    text = os.environ.get(_EVENTS_VARIABLE, "").strip()
    if not text:
        return _recording.EVENTS_MAX
    if not text.isdecimal():
        raise ConfigError(f"{_EVENTS_VARIABLE}={text!r} is not a number of events")
    return int(text)


def _write(place: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # A forked child, which inherits what is to be done at the end.
    try:
        _recording._collect_copies()
        _recording._write(place, None)
    except Exception as error:
        # The program has ended well or not; this must not change how.
        logger.error("the trace %s could not be written: %s", place, error)
    finally:
        _core.trace_stop()

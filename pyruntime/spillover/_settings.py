"""The switch ``SPILLOVER=0`` and the package's logger."""

from __future__ import annotations

import logging
import os

from spillover._errors import ConfigError

logger = logging.getLogger("spillover")
logger.addHandler(logging.NullHandler())


def enabled() -> bool:
    """False when ``SPILLOVER=0`` disables everything: each public entry then leaves torch alone.

    Raises
    ------
    ConfigError
        The variable is neither 0 nor 1.
    """
    value = os.environ.get("SPILLOVER", "1").strip()
    if value not in ("0", "1", ""):
        raise ConfigError(f"SPILLOVER={value!r} is not understood; set it to 0 (off) or 1 (on)")
    return value != "0"


def switched_on() -> bool:
    """Whether ``SPILLOVER=1`` asks for the allocator without a change to the program."""
    return os.environ.get("SPILLOVER", "").strip() == "1"

"""Gives the checker's reports the Python stacks of the calls that they name."""

from __future__ import annotations

import ctypes

from spillover.emulator import _libraries


def install() -> bool:
    """Take the stack of every call into the driver from here on.

    Returns
    -------
    bool
        False where this version of Python does not let frames be read; reports then have no stacks.
    """
    from spillover import _emulator_stacks

    function = _libraries.driver().spillover_emulator_set_stacks
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return _emulator_stacks.install(address)

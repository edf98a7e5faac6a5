"""Exceptions of Spillover.

The tree::

    SpilloverError
    ├── BuildError (RuntimeError)           a part could not be compiled for the installed torch
    ├── ConfigError (ValueError)            an option or argument is wrong
    ├── DeviceOutOfMemory (torch.OutOfMemoryError; made on first use, see below)
    ├── DriverError (RuntimeError)          a CUDA driver call failed
    ├── HostOutOfMemory (MemoryError)       the pinned-memory budget or the machine is exhausted
    ├── NonFiniteGradient (ArithmeticError) a gradient has NaN or infinity
    ├── StateError (RuntimeError)           calls in a wrong order, or on a closed object
    └── StorageError (OSError)              a file operation failed
        ├── CorruptData                     a checksum does not match
        └── DiskFull                        no space left, or the write limit is reached

``DeviceOutOfMemory`` derives from ``torch.OutOfMemoryError``, so it exists only once torch is
there: importing this module does not load torch.
"""

from __future__ import annotations

from typing import Any


class SpilloverError(Exception):
    """Base of every error that Spillover raises by itself."""


class BuildError(SpilloverError, RuntimeError):
    """A part could not be compiled for the installed torch; the message says what to install."""


class ConfigError(SpilloverError, ValueError):
    """An option or argument is wrong; the message says what would be right."""


class DriverError(SpilloverError, RuntimeError):
    """A CUDA driver call failed; the message has the call and CUDA's name for the error."""


class HostOutOfMemory(SpilloverError, MemoryError):
    """Pinned host memory ran out: the budget, or what the machine or its cgroup allows."""


class NonFiniteGradient(SpilloverError, ArithmeticError):
    """A gradient has NaN or infinity; the message names the parameters."""


class StateError(SpilloverError, RuntimeError):
    """Calls came in a wrong order, or on a closed object."""


class StorageError(SpilloverError, OSError):
    """A file operation failed. ``errno`` and ``filename`` are set as in ``OSError``."""


class CorruptData(StorageError):
    """Data on disk does not match its checksum."""


class DiskFull(StorageError):
    """No space is left on the device that holds the spill folder."""


def __getattr__(name: str) -> Any:
    if name != "DeviceOutOfMemory":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    class DeviceOutOfMemory(SpilloverError, torch.OutOfMemoryError):
        """Device memory ran out even after everything that could be freed or spilled was."""

    DeviceOutOfMemory.__module__ = __name__
    globals()[name] = DeviceOutOfMemory
    return DeviceOutOfMemory

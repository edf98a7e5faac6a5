"""Train and run PyTorch models that do not fit in GPU memory.

Importing this package loads neither torch nor a CUDA driver; each name loads what it needs when it
is first used.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if not sys.platform.startswith("linux"):
    raise ImportError(f"spillover runs on Linux only; this is {sys.platform}")

from spillover._errors import (
    BuildError,
    ConfigError,
    CorruptData,
    DiskFull,
    DriverError,
    HostOutOfMemory,
    NonFiniteGradient,
    SpilloverError,
    StateError,
    StorageError,
)
from spillover._torch_import import after_torch_import

if TYPE_CHECKING:
    from spillover import allocator, emulator, optim, planner, trace
    from spillover._disk import DiskStore
    from spillover._durable import DurableStore
    from spillover._errors import DeviceOutOfMemory
    from spillover._host import HostPool
    from spillover._statistics import stats
    from spillover._transfer import TransferEngine
    from spillover.hooks import (
        offload_activations,
        offload_activations_of,
        stream_parameters,
    )

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "ConfigError",
    "CorruptData",
    "DeviceOutOfMemory",
    "DiskFull",
    "DiskStore",
    "DriverError",
    "DurableStore",
    "HostOutOfMemory",
    "HostPool",
    "NonFiniteGradient",
    "SpilloverError",
    "StateError",
    "StorageError",
    "TransferEngine",
    "__version__",
    "allocator",
    "emulator",
    "offload_activations",
    "offload_activations_of",
    "optim",
    "planner",
    "stats",
    "stream_parameters",
    "trace",
]

_LAZY_MODULES = {"allocator", "emulator", "optim", "planner", "trace"}
_LAZY_NAMES = {
    "DeviceOutOfMemory": "spillover._errors",
    "DiskStore": "spillover._disk",
    "DurableStore": "spillover._durable",
    "HostPool": "spillover._host",
    "TransferEngine": "spillover._transfer",
    "offload_activations": "spillover.hooks",
    "offload_activations_of": "spillover.hooks",
    "stats": "spillover._statistics",
    "stream_parameters": "spillover.hooks",
}


def __getattr__(name: str) -> Any:
    try:
        if name in _LAZY_MODULES:
            return importlib.import_module(f"spillover.{name}")
        if name in _LAZY_NAMES:
            return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"spillover.{name} needs PyTorch, which is not installed: 'pip install torch'",
            name="torch",
        ) from None
    raise AttributeError(f"module 'spillover' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _when_torch_is_imported() -> None:
    from spillover import _first_use
    from spillover._settings import logger, switched_on

    _first_use.watch()
    if not switched_on():
        return
    if _first_use.torch_has_cuda():
        importlib.import_module("spillover.allocator").install()
    else:
        logger.warning("SPILLOVER=1 changes nothing: this torch was built without CUDA")


after_torch_import(_when_torch_is_imported)

if os.environ.get("SPILLOVER_TRACE"):
    importlib.import_module("spillover.trace._whole_run").begin()

"""Settings of torch's own allocator: which the pool honours, and why the others have no effect.

torch reads ``PYTORCH_CUDA_ALLOC_CONF``, or else ``PYTORCH_ALLOC_CONF``, and takes changes through
``torch._C._accelerator_setAllocatorSettings``. Its parser has seen every text before this module
does, so what is not a key or not a value of it is torch's error.
"""

from __future__ import annotations

import os
import re
import threading
import warnings

from spillover._errors import ConfigError
from spillover._settings import logger
from spillover.allocator import _configure

_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

# The keys that begin with "pinned_" are of torch's allocator for host memory, which stays in place.
_WITHOUT_EFFECT = {
    "max_split_size_mb": "large blocks are put together from idle pages, so splitting one does "
    "not keep its rest from being used",
    "max_non_split_rounding_mb": "it goes with max_split_size_mb, which the pool does not need",
    "large_segment_size_mb": "the pool takes memory from the driver as it is needed",
    "garbage_collection_threshold": "idle pages serve every request before new memory is taken; "
    "unmapped_max and trim() say what is kept",
    "release_lock_on_cudamalloc": "most requests take no lock, and none is held while the pool "
    "waits for the device",
    "release_lock_on_hipmalloc": "it is for ROCm",
    "throw_on_cudamalloc_oom": "the pool's limit is limit= or fraction=, and a request above it "
    "fails before the driver is asked",
}
# The full adapter asks torch's parser for their values.
_FULL_ONLY = {
    "roundup_power2_divisions": "the plain adapter does not know the divisions",
    "graph_capture_record_stream_reuse": "the plain adapter does not see what graphs record",
}
_EXPANDABLE_OFF = "the pool maps memory where the device can; virtual_memory=off turns that off"

_lock = threading.Lock()
_told: set[str] = set()


def split(text: str) -> list[tuple[str, str]]:
    """The keys and values of a text such as ``"max_split_size_mb:20,backend:native"``."""
    # A comma within brackets belongs to the value.
    entries = re.findall(r"([^\s:,\[\]]+):((?:\[[^\]]*\])|[^,]*)", re.sub(r"\s", "", text))
    return [(str(key), str(value)) for key, value in entries]


def apply_environment() -> None:
    """Honour the variable that torch reads, before the allocator is installed.

    Raises
    ------
    ConfigError
        It asks for another allocator, ``backend:cudaMallocAsync``.
    """
    variable, text = environment()
    settings = split(text)
    _refuse_other_allocators(settings, variable)
    _honour_fraction(settings, variable)
    _tell(settings)


def environment() -> tuple[str, str]:
    """The variable that torch reads, and its text; an empty one where there is none."""
    variable = next((name for name in _VARIABLES if name in os.environ), _VARIABLES[0])
    return variable, os.environ.get(variable, "")


def tell_what_plain_lacks(text: str) -> None:
    """Say which settings of the text only the full adapter honours."""
    _tell(split(text), _FULL_ONLY)


def on_change(text: str) -> str:
    """See a text that is given to torch while the pool is installed; what torch is to parse.

    Raises
    ------
    ConfigError
        It asks for another allocator.
    """
    settings = split(text)
    _refuse_other_allocators(settings, "the change of torch's allocator settings")
    _tell(settings)
    # torch compares this key with the name of the allocator that is installed.
    return ",".join(f"{key}:{value}" for key, value in settings if key != "backend")


def _refuse_other_allocators(settings: list[tuple[str, str]], source: str) -> None:
    for key, value in settings:
        if key == "backend" and value != "native":
            raise ConfigError(
                f"{source} asks for {key}:{value}, an allocator that cannot serve torch together "
                "with Spillover's pool; leave 'backend' out to use the pool, or set SPILLOVER=0 "
                f"to use {value}"
            )


def _honour_fraction(settings: list[tuple[str, str]], variable: str) -> None:
    fraction = dict(settings).get("per_process_memory_fraction")
    if fraction is None or _configure.is_named("fraction"):
        return
    try:
        _configure.apply(None, {"fraction": float(fraction)})
    except (ValueError, ConfigError) as error:
        raise ConfigError(
            f"{variable}: per_process_memory_fraction is invalid: {fraction!r} is not a number "
            "from 0 to 1"
        ) from error


def _tell(
    settings: list[tuple[str, str]], without_effect: dict[str, str] = _WITHOUT_EFFECT
) -> None:
    """Say once which keys have no effect, and why."""
    reasons = {key: without_effect[key] for key, _ in settings if key in without_effect}
    if ("expandable_segments", "False") in settings:
        reasons["expandable_segments:False"] = _EXPANDABLE_OFF
    with _lock:
        fresh = [key for key in reasons if key not in _told]
        _told.update(fresh)
    for key in fresh:
        message = (
            f"torch's allocator setting {key} has no effect on Spillover's pool: {reasons[key]}"
        )
        logger.warning(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)

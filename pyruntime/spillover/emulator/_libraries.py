"""Loads the emulated CUDA libraries and declares the functions that Python calls."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from spillover._errors import StateError
from spillover._paths import library_path

#: In the order of their dependencies.
_NAMES = ("libcuda.so.1", "libcudart.so.13", "libcudart.so.12", "libnvidia-ml.so.1")
#: Serves torch builds for CUDA 12; an installation may do without.
_OPTIONAL = "libcudart.so.12"

_loaded: dict[str, ctypes.CDLL] = {}


class Range(ctypes.Structure):
    """``spillover_emulator_range`` of the C interface."""

    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("size_bytes", ctypes.c_size_t),
        ("is_write", ctypes.c_int),
    )


class FaultRow(ctypes.Structure):
    """``spillover_emulator_fault`` of the C interface."""

    _fields_ = (
        ("function", ctypes.c_char_p),
        ("first_call", ctypes.c_uint64),
        ("times", ctypes.c_uint64),
        ("probability", ctypes.c_double),
        ("error", ctypes.c_int),
        ("timing", ctypes.c_int),
    )


def folder() -> Path:
    """Where the emulated libraries lie."""
    return library_path("emulator")


def load() -> None:
    """Load the emulated libraries into this process; call it before torch is imported.

    Raises
    ------
    StateError
        The installation is incomplete; nothing has been loaded then, or a library is damaged.
    """
    names = [name for name in _NAMES if name != _OPTIONAL or (folder() / name).is_file()]
    missing = [name for name in names if not (folder() / name).is_file()]
    if missing:
        raise StateError(
            f"this installation of spillover lacks {', '.join(missing)} in {folder()}; reinstall "
            "it with 'pip install .'"
        )
    for name in names:
        try:
            # torch's own loader opens its libraries locally too; SONAMEs are process-wide.
            _loaded[name] = ctypes.CDLL(str(folder() / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise StateError(
                f"the emulated {name} does not load ({error}); reinstall spillover with "
                "'pip install .'"
            ) from error


def is_ours(maps_line: str) -> bool:
    """Whether a line of ``/proc/self/maps`` belongs to the emulated libraries."""
    path = "/" + maps_line.rstrip().partition("/")[2]
    return Path(path).parent == folder().resolve() or Path(path).parent == folder()


@functools.lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """The emulated ``libcuda.so.1`` with its C interface declared."""
    library = _loaded.get("libcuda.so.1")
    if library is None:
        raise StateError(
            "the emulated device is not enabled in this process; call spillover.emulator.enable() "
            "before importing torch, or run under 'spillover emulate'"
        )
    size, text, status = ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int
    number, stream = ctypes.c_uint64, ctypes.c_void_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "cuInit": (ctypes.c_int, [ctypes.c_uint]),
        "spillover_emulator_follow_blocks": (None, []),
        "spillover_emulator_hazard_count": (size, []),
        "spillover_emulator_hazard_text": (size, [size, text, size]),
        "spillover_emulator_hazards_clear": (None, []),
        "spillover_emulator_last_hazard": (text, []),
        "spillover_emulator_leak_text": (size, [size, text, size]),
        "spillover_emulator_release": (None, [ctypes.c_uint64]),
        "spillover_emulator_acquire": (None, [ctypes.c_uint64]),
        "spillover_emulator_host_access": (ctypes.c_int, [text, ctypes.POINTER(Range), size]),
        "spillover_emulator_live": (None, [ctypes.POINTER(size)] * 6),
        "spillover_emulator_peak_bytes": (size, [ctypes.c_int]),
        "spillover_emulator_config": (text, []),
        "spillover_emulator_configure": (status, []),
        "spillover_emulator_is_known": (status, [ctypes.c_void_p, size]),
        "spillover_emulator_describe_site": (size, [ctypes.c_uint, text, size]),
        "spillover_emulator_plan_begin": (None, [ctypes.POINTER(FaultRow), size, number]),
        "spillover_emulator_plan_end": (None, []),
        "spillover_emulator_call_counts": (size, [text, size]),
        "spillover_emulator_call_bytes": (size, [text, size]),
        "spillover_emulator_faults_fired": (size, [text, size]),
        "spillover_emulator_function_names": (size, [text, size]),
        "spillover_emulator_error_names": (size, [text, size]),
        "spillover_emulator_occupy": (status, [ctypes.c_int, size]),
        "spillover_emulator_limit_pinned": (status, [size]),
        "spillover_emulator_slow_stream": (status, [stream, ctypes.c_uint]),
        "spillover_emulator_hold_stream": (
            status,
            [stream, ctypes.c_uint, ctypes.POINTER(number)],
        ),
        "spillover_emulator_release_stream": (status, [number]),
        "spillover_emulator_clock_enabled": (status, []),
        "spillover_emulator_profile": (ctypes.c_double, [text]),
        "spillover_emulator_now": (ctypes.c_int64, []),
        "spillover_emulator_advance": (None, [ctypes.c_int64]),
        "spillover_emulator_work": (status, [text, size, ctypes.c_int64]),
        "spillover_emulator_clock_report": (size, [text, size]),
        "spillover_emulator_clock_trace": (status, [text]),
        "spillover_emulator_clock_mark": (ctypes.c_int64, []),
        "spillover_emulator_clock_mark_time": (ctypes.c_int64, [ctypes.c_int64]),
        "spillover_emulator_clock_limits": (size, [ctypes.c_int64, ctypes.c_int64, text, size]),
    }
    _declare(library, signatures)
    return library


@functools.lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL:
    """The emulated CUDA runtime with the one function of its own that Python calls declared."""
    driver()  # which says what is wrong where the emulator is off
    library = next(loaded for name, loaded in _loaded.items() if name.startswith("libcudart.so"))
    names = ctypes.POINTER(ctypes.c_char_p)
    _declare(library, {"spillover_emulator_runtime_functions": (names, [])})
    return library


def _declare(library: ctypes.CDLL, signatures: dict[str, tuple[object, list[object]]]) -> None:
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments

"""Gives this process emulated CUDA devices.

The emulated libraries carry the SONAMEs that torch asks for, so loading them before torch is
enough: the dynamic linker resolves torch's needs to the objects that are already there. Once torch
has been imported with its own libraries this silently does nothing, hence the check.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.abc
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from spillover._errors import SpilloverError, StateError
from spillover._settings import enabled, logger
from spillover.emulator import (
    _clock,
    _collectives,
    _dry,
    _dry_values,
    _libraries,
    _library_operators,
    _stacks,
    _threads,
)
from spillover.emulator._options import HazardPolicy, Options, Schedule, UnknownPolicy

_lock = threading.Lock()
_active: Options | None = None


def enable(
    *,
    devices: int = 1,
    vram: int | str | None = None,
    schedule: Schedule = "late",
    seed: int = 0,
    hazards: HazardPolicy = "raise",
    poison: bool = True,
    virtual_memory: bool = True,
    uninitialized: bool = False,
    leaks: bool = False,
    blocks: bool = False,
    stacks: bool = True,
    clock: bool = False,
    profile: str = "",
    trace: str = "",
    dry: bool = False,
    unknown: UnknownPolicy = "error",
    routing: str = "",
) -> bool:
    """Give this process emulated CUDA devices; call it before ``import torch``.

    After it, ``import torch`` also loads the part that runs operators, which is compiled for the
    installed torch at first use (under a minute, once; ``spillover build`` does it ahead).

    Parameters
    ----------
    devices
        Number of devices, 1 to 16.
    vram
        Capacity of each device, bytes or a text such as ``"24GiB"``; by default the profile's
        memory, or 8 GiB without a profile.
    schedule
        ``late``, ``eager``, ``threaded`` or ``random``; see :class:`Options`.
    seed
        Seed of the ``random`` schedule.
    hazards
        ``off``, ``count``, ``warn`` or ``raise``; see :class:`Options`.
    poison
        Fill what the driver hands out and takes back with 0xFF bytes; see :class:`Options`.
    virtual_memory
        Whether the devices have virtual memory management; see :class:`Options`.
    uninitialized
        Report reads of device memory that was never written; see :class:`Options`.
    leaks
        Print what the process still holds of the driver when it ends.
    blocks
        Find uses of blocks that torch's caching allocator has taken back; see :class:`Options`.
    stacks
        Say in reports where the program made the calls.
    clock
        Keep virtual time; see :func:`now_ns` and :func:`clock_report`.
    profile
        The card whose numbers the clock computes with, such as ``"rtx4090"``.
    trace
        Write the clock's trace there when the process ends.
    dry
        Dry run: memory has sizes but no bytes; see :class:`Options`.
    unknown
        What a dry run's host code gets for an unknown value; see :class:`Options`.
    routing
        How a dry run's mixtures of experts route, such as ``"uniform"``; see :class:`Options`.

    Returns
    -------
    bool
        False when ``SPILLOVER=0`` disables Spillover, else True.

    Raises
    ------
    ConfigError
        An option is wrong.
    StateError
        torch or a real CUDA library is loaded already, the emulator is enabled with other options
        (:func:`reconfigure` may change them), or the installation is incomplete.
    """
    return activate(
        Options(
            devices=devices,
            vram=vram,
            schedule=schedule,
            seed=seed,
            hazards=hazards,
            poison=poison,
            virtual_memory=virtual_memory,
            uninitialized=uninitialized,
            leaks=leaks,
            blocks=blocks,
            stacks=stacks,
            clock=clock,
            profile=profile,
            trace=trace,
            dry=dry,
            unknown=unknown,
            routing=routing,
        )
    )


def activate(options: Options) -> bool:
    """``enable()`` with ready options."""
    global _active
    if not enabled():
        logger.info("SPILLOVER=0: the emulated device stays off")
        return False
    with _lock:
        if _active is not None:
            if _active != options:
                raise StateError(
                    f"the emulator is enabled already with {_active}; "
                    "spillover.emulator.reconfigure() changes some of them"
                )
            return True
        _require_clean_process()
        _libraries.load()
        # The driver reads them at its first call. After the load: where that fails, the process
        # and its children go on as if nothing had been asked for.
        os.environ.update(options.environment())
        if options.clock:
            _clock.begin(options.trace)
        if options.hazards != "off" or options.clock:
            _threads.watch(str(_libraries.folder() / "libcuda.so.1"), takes_turns=options.clock)
        if options.stacks and (options.dry or options.hazards != "off"):
            _stacks.install()
        if options.dry:
            _dry_values.watch_math()
        if options.leaks:
            atexit.register(_print_leaks, os.getpid())
        # Not cuInit: a child that is forked before the parent uses CUDA may use it, as on a GPU.
        sys.meta_path.insert(0, _TorchFinder())
        _active = options
    logger.info("emulated CUDA devices: %s", options)
    return True


def reconfigure(
    *,
    devices: int | None = None,
    vram: int | str | None = None,
    schedule: Schedule | None = None,
    seed: int | None = None,
    poison: bool | None = None,
    virtual_memory: bool | None = None,
) -> None:
    """Change options of :func:`enable` that nobody has relied on: no device was used yet.

    A process may so import torch once, which takes seconds, and fork children that each have
    devices of their own. What is not given stays as it is.

    Raises
    ------
    ConfigError
        An option is wrong.
    StateError
        The emulator is off, or a device was used by this process or by its parent before the fork.
        Nothing has changed.
    """
    global _active
    given = {
        "devices": devices,
        "vram": vram,
        "schedule": schedule,
        "seed": seed,
        "poison": poison,
        "virtual_memory": virtual_memory,
    }
    with _lock:
        if _active is None:
            raise StateError("the emulator is off; spillover.emulator.enable() takes options")
        changes: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
        options = replace(_active, **changes)
        os.environ.update(options.environment())
        if not _libraries.driver().spillover_emulator_configure():
            os.environ.update(_active.environment())
            raise StateError(
                "the emulated devices were used already, so that their options cannot change any "
                f"more; they are {_active}"
            )
        _active = options


def is_enabled() -> bool:
    """Whether this process has emulated devices."""
    return _active is not None


def active_options() -> Options | None:
    """The options in force, None where the emulator is off."""
    return _active


def report_at_exit() -> None:
    """Print peak memory and hazards on stderr when this process ends, if it used the device.

    After a dry run also where the memory went.
    """
    if _active is not None and _active.dry:
        atexit.register(_dry.print_at_exit, os.getpid())
    atexit.register(_print_summary, os.getpid())


def _print_summary(owner_pid: int) -> None:
    from spillover._units import format_bytes
    from spillover.emulator import _control

    if os.getpid() != owner_pid or _active is None:
        return
    peaks = [_control.peak_bytes(device) for device in range(_active.devices)]
    if not any(peaks):
        return
    of = format_bytes(_active.vram_bytes)
    parts = ", ".join(f"cuda:{i} {format_bytes(peak)} of {of}" for i, peak in enumerate(peaks))
    found = len(_control.hazards())
    print(
        f"spillover emulator: peak device memory {parts}; hazards: {found}",
        file=sys.stderr,
    )
    if _active.clock:
        _clock.print_summary()


def _print_leaks(owner_pid: int) -> None:
    from spillover.emulator import _control

    if os.getpid() != owner_pid:
        return
    for text in _control.leaks():
        print(f"spillover emulator: {text}", file=sys.stderr)


def _require_clean_process() -> None:
    if "torch" in sys.modules:
        raise StateError(
            "spillover.emulator.enable() came after 'import torch', which has loaded the real CUDA "
            "libraries; call it first, or start the script with 'spillover emulate -- python ...'"
        )
    with open("/proc/self/maps") as maps:
        for line in maps:
            name = os.path.basename(line.rstrip().partition("/")[2])
            if name.startswith(("libcuda.so", "libcudart.so")) and not _libraries.is_ours(line):
                raise StateError(
                    f"{name} is loaded in this process already; enable the emulator before "
                    "importing anything that uses CUDA"
                )


def _after_torch_import() -> None:
    import torch

    if torch.version.cuda is None:
        raise SpilloverError(
            f"torch {torch.__version__} is a CPU-only build; the emulated device runs under the "
            "CUDA build of torch: install it with 'pip install torch'"
        )
    from spillover import _build

    library = str(_build.build("emulator"))
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    _library_operators.watch(torch, library)
    _collectives.replace(torch)
    _refuse_jiterator(torch._C)
    if _active is not None and _active.dry:
        _dry.watch(torch, library, clock=_active.clock)
    if _active is not None and _active.hazards != "off":
        _watch_tolist(torch.Tensor)
    if _active is not None and (_active.hazards != "off" or _active.clock):
        _follow_blocks(library)
    if _active is not None and _active.clock:
        _clock.watch_queries(torch)


def _follow_blocks(library: str) -> None:
    """Have torch's allocator tell the checker of its blocks, once that is of use.

    It costs about a microsecond an allocation. Between threads it is needed, since an allocator
    hands on under a lock of its own what one thread knew when it freed a block.
    """
    from torch import cuda

    def start() -> None:
        if ctypes.CDLL(library).spillover_emulator_aten_follow_blocks() == 0:
            _libraries.driver().spillover_emulator_follow_blocks()

    @functools.lru_cache(maxsize=1)
    def follow() -> None:
        # Torch's allocator takes trackers once it is set up.
        cuda._lazy_call(start)  # type: ignore[no-untyped-call]

    if _active is not None and (_active.blocks or _active.uninitialized):
        follow()
    else:
        _threads.before_first_start(follow)


def _refuse_jiterator(bindings: Any) -> None:
    """Jiterator compiles CUDA source for the GPU at hand; without one torch crashes."""

    def refuse(code: str, name: str, *arguments: Any) -> NoReturn:
        raise NotImplementedError(
            f"spillover emulator: the jiterator's function {name} is not emulated: it is CUDA "
            "source that a real GPU must compile and run"
        )

    bindings._cuda_jiterator_compile_and_launch_kernel = refuse


def _watch_tolist(tensor_class: Any) -> None:
    """Report what ``tolist()`` reads: it looks at a CPU tensor's memory without an operator.

    ``numpy()`` makes a view and reads nothing; what is done with the view cannot be seen.
    """
    from spillover.emulator import _control

    original = tensor_class.tolist

    @functools.wraps(original)
    def tolist(self: Any) -> Any:
        if self.device.type == "cpu" and self.is_contiguous():
            _control.host_access(self, kind="read", name="Tensor.tolist")
        return original(self)

    tensor_class.tolist = tolist


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Runs ``_after_torch_import`` once torch's own import has finished.

    It stays until then: many libraries ask ``importlib.util.find_spec("torch")`` whether torch is
    there, long before anything imports it.
    """

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != "torch" or getattr(self._asking, "others", False):
            return None
        self._asking.others = True
        try:
            spec = importlib.util.find_spec("torch")
        finally:
            self._asking.others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _TorchLoader(spec.loader, self)
        return spec


class _TorchLoader(importlib.abc.Loader):
    def __init__(self, wrapped: importlib.abc.Loader, finder: _TorchFinder) -> None:
        self._wrapped = wrapped
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Tools ask a module's spec and loader for its source, so the wrapper steps aside first.
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        module.__loader__ = self._wrapped
        self._wrapped.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _after_torch_import()

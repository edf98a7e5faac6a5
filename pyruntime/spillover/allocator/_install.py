"""Puts the pool in the place of PyTorch's CUDA allocator."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from spillover import _first_use
from spillover._errors import BuildError, ConfigError, StateError
from spillover._settings import enabled, logger
from spillover.allocator import _configure, _plain, _pool, _torch_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

Adapter = Literal["auto", "full", "plain"]

_MODULE_NAME = "spillover_torch_adapter"
_lock = threading.Lock()
_installed: Literal["full", "plain"] | None = None


def install(*, adapter: Adapter = "auto", **settings: Unpack[_configure.Settings]) -> bool:
    """Use Spillover's pool for every CUDA tensor of this process.

    Call it before the first use of CUDA. The first call on a machine compiles a part for the
    installed torch, which takes a minute or two; ``spillover build`` does that ahead. Further calls
    do nothing.

    Parameters
    ----------
    adapter
        ``"full"`` supports all of ``torch.cuda``'s memory functions and needs a C++ compiler.
        ``"plain"`` needs none and goes through torch's pluggable allocator, which has statistics,
        snapshots, ``MemPool``, CUDA graphs and ``torch.OutOfMemoryError``, but no memory histories
        and no sharing with other processes; a warning in the log says once what it lacks.
        ``"auto"`` takes the full one, and the plain one with a warning where the full one cannot
        be compiled.

    **settings
        Settings of the pools, for example ``limit="20GiB"``; see :func:`configure`. They also apply
        when the allocator is installed already.

    Returns
    -------
    bool
        False when ``SPILLOVER=0`` disables Spillover, else True.

    Raises
    ------
    ConfigError
        There is no CUDA build of torch, an option or ``SPILLOVER_ALLOCATOR`` is wrong, or
        ``PYTORCH_ALLOC_CONF`` asks for ``backend:cudaMallocAsync``; with ``adapter="full"`` also a
        cache folder that others may write to.
    StateError
        CUDA is initialised in this process already.
    BuildError
        ``adapter="full"`` and compiling failed.
    """
    global _installed
    if adapter not in ("auto", "full", "plain"):
        raise ConfigError(f"adapter={adapter!r} is not one of 'auto', 'full' and 'plain'")
    if not enabled():
        logger.info("SPILLOVER=0: torch keeps its own allocator")
        return False
    # Also reads SPILLOVER_ALLOCATOR: what is wrong there is told here, not at the first tensor.
    _configure.apply(None, settings)
    # Imports torch, which may install the allocator by itself (SPILLOVER=1, spillover run).
    _require_cuda_build()
    with _lock:
        if _installed is not None:
            if adapter not in ("auto", _installed):
                raise StateError(
                    f"the {_installed} adapter is installed in this process already; it cannot be "
                    f"replaced by the {adapter} one"
                )
            return True
        _require_uninitialised()
        _torch_settings.apply_environment()
        if adapter == "plain":
            _install_plain()
            logger.warning("torch uses the plain adapter. %s.", _plain.LACKS)
            _installed = "plain"
        else:
            _installed = _install_best(allow_plain=adapter == "auto")
    logger.info("torch's CUDA tensors come from Spillover's pool (%s adapter)", _installed)
    return True


def is_installed() -> bool:
    """Whether this process's CUDA tensors come from Spillover's pool."""
    return _installed is not None


def _require_cuda_build() -> None:
    from spillover._build import _torch

    _torch.torch_facts()


def _require_uninitialised() -> None:
    import torch

    cuda: Any = torch.cuda  # torch leaves some of its functions without types
    if cuda.is_initialized():
        place = _first_use.place()
        where = f"at {place}" if place else "before spillover was imported"
        raise StateError(
            f"spillover.allocator.install() came after CUDA was initialised ({where}); call "
            "it before the first CUDA tensor, stream or torch.cuda query of memory, or start the "
            "script with 'spillover run'"
        )


def _install_best(*, allow_plain: bool) -> Literal["full", "plain"]:
    from spillover import _build

    try:
        module = _load(_build.build("adapter"))
    except (BuildError, ConfigError) as error:
        if not allow_plain:
            raise
        reason = str(error).rstrip(".")
        message = f"{reason}. Torch's plain pluggable allocator is used instead. {_plain.LACKS}."
        logger.warning(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        _install_plain()
        return "plain"
    _install_full(module)
    return "full"


def _install_full(module: ModuleType) -> None:
    import torch

    _swap(torch.cuda.memory._CUDAAllocator(module.make_allocator()))
    module.register_for_accelerator()
    module.watch_settings(_torch_settings.on_change)


def _load(path: Path) -> ModuleType:
    _pool.library()  # the module needs it and finds it loaded
    loader = importlib.machinery.ExtensionFileLoader(_MODULE_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"the compiled adapter does not load ({error}); 'spillover build --clean' makes it anew"
        ) from error
    return module


def _install_plain() -> None:
    _swap(_plain.make_allocator())
    _plain.replace_functions()


def _swap(allocator: Any) -> None:
    import torch

    try:
        torch.cuda.memory.change_current_allocator(allocator)
    except RuntimeError as error:
        raise StateError(
            f"torch does not accept another allocator any more ({error}); call "
            "spillover.allocator.install() before anything uses CUDA"
        ) from error

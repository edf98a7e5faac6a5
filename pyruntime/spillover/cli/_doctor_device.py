"""What ``spillover doctor`` says of the driver, the devices, the allocator and torch."""

from __future__ import annotations

import ctypes
import os

from spillover import _build, _core
from spillover._errors import ConfigError, SpilloverError
from spillover._units import format_bytes
from spillover.cli._doctor_part import Part


def parts() -> list[Part]:
    """The driver, each device with what the allocator does on it, torch and its adapter."""
    driver, count = _driver()
    torch = _torch()
    found = [driver, *(_device(index) for index in range(count)), _settings(), torch]
    return found if torch.state != "works" else [*found, _adapter()]


def _driver() -> tuple[Part, int]:
    name = "CUDA driver"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Part(name, "missing", f"{error}; 'spillover emulate' runs CUDA programs without"), 0
    try:
        version, count = _core.driver_version(), _core.device_count()
    except (SpilloverError, RuntimeError) as error:
        return Part(name, "fails", str(error)), 0
    devices = "1 device" if count == 1 else f"{count} devices"
    text = f"for CUDA {version // 1000}.{version % 1000 // 10}, {devices}"
    facts = {"version": version, "devices": count}
    return Part(name, "works" if count else "fails", text, dict(facts)), count


def _device(index: int) -> Part:
    name = f"device {index}"
    try:
        model = _core.device_name(index)
        size_bytes = _core.device_total_bytes(index)
        maps = _core.supports_virtual_memory(index)
    except (SpilloverError, RuntimeError) as error:
        return Part(name, "fails", str(error))
    mode = "the pool maps memory where it is needed (virtual memory management)"
    if not maps:
        mode = "no virtual memory management: the pool's memory stays at its addresses"
    return Part(
        name,
        "works" if maps else "limited",
        f"{model}, {format_bytes(size_bytes)}; {mode}",
        {"model": model, "memory_bytes": size_bytes, "virtual_memory": maps},
    )


def _settings() -> Part:
    text = os.environ.get("SPILLOVER_ALLOCATOR", "")
    name = "allocator's settings"
    try:
        _core.check_settings(text, "SPILLOVER_ALLOCATOR")
    except ConfigError as error:
        return Part(name, "fails", str(error), {"settings": text})
    detail = f"SPILLOVER_ALLOCATOR={text}" if text else "the defaults (docs/allocator.md)"
    return Part(name, "works", detail, {"settings": text})


def _torch() -> Part:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            return Part("PyTorch", "fails", str(error))
        return Part("PyTorch", "missing", "install a CUDA build with 'pip install torch'")
    except (ImportError, OSError) as error:
        return Part("PyTorch", "fails", f"it does not load: {error}")
    version, cuda = str(torch.__version__), torch.version.cuda
    facts = {"version": version, "cuda": cuda}
    if cuda is None:
        detail = f"{version} is a build without CUDA; install one with 'pip install torch'"
        return Part("PyTorch", "fails", detail, dict(facts))
    return Part("PyTorch", "works", f"{version} for CUDA {cuda}", dict(facts))


def _adapter() -> Part:
    name = "PyTorch adapter"
    try:
        path = _build.find("adapter")
    except SpilloverError as error:
        detail = f"fallback: torch's plain pluggable allocator, which lacks some functions; {error}"
        return Part(name, "limited", detail, {"adapter": "fallback"})
    if path is None:
        detail = "is compiled at first use, in about a minute; 'spillover build' does it now"
        return Part(name, "works", detail, {"adapter": "to compile"})
    return Part(name, "works", f"compiled: {path}", {"adapter": "compiled"})

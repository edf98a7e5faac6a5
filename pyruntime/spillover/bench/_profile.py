"""Measures what was asked for and writes it as a profile file with its sources."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spillover import emulator
from spillover._core import driver_available, driver_version
from spillover._errors import ConfigError
from spillover._units import parse_bytes
from spillover.emulator import profile_names

#: How the emulated device names itself.
_EMULATED_NAME = "emulated"
_SIZE_BYTES_MIN = 1 << 16
_MATMUL_SIZE_MIN = 64


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, and how much of it.

    Parameters
    ----------
    like
        Profile of this package that numbers are taken from which cannot be measured here.
    host_like, disk_like
        The same for the host and the disk.
    gpu
        Measure the current CUDA device. It is an error if there is none.
    folders
        Folders on the disks to measure, one a disk; none leaves disks out.
    size
        Bytes of each copy, host loop and file.
    matmul_size
        Rows of the matrices.
    rounds
        How often each measurement is repeated; the fastest counts.
    allow_emulated
        Write GPU numbers although the device is emulated. They say nothing about a GPU.
    """

    like: str = "a100-sxm"
    host_like: str = "desktop"
    disk_like: str = "gen4x1"
    gpu: bool = True
    folders: tuple[Path, ...] = ()
    size: int | str = "1GiB"
    matmul_size: int = 8192
    rounds: int = 5
    allow_emulated: bool = False

    def __post_init__(self) -> None:
        for section, name in (
            ("gpu", self.like),
            ("host", self.host_like),
            ("disk", self.disk_like),
        ):
            if name not in profile_names(section):
                known = ", ".join(profile_names(section))
                raise ConfigError(f"there is no {section} profile {name!r}; there are {known}")
        if parse_bytes(self.size, name="size") < _SIZE_BYTES_MIN:
            raise ConfigError(f"size must be at least {_SIZE_BYTES_MIN} bytes, got {self.size!r}")
        if self.matmul_size < _MATMUL_SIZE_MIN:
            raise ConfigError(
                f"matmul_size must be at least {_MATMUL_SIZE_MIN}, got {self.matmul_size}"
            )
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One table of the file: numbers that were measured, and on what.

    ``elsewhere`` has the source of numbers that were measured on something else than the rest.
    """

    extends: str
    title: str
    source: str
    numbers: Mapping[str, float]
    method: Mapping[str, str]
    elsewhere: Mapping[str, str] = field(default_factory=dict)


def measure_profile(options: BenchOptions) -> dict[str, Measured]:
    """Measure what ``options`` ask for, by section of the profile.

    Raises
    ------
    ConfigError
        There is no CUDA device, or it is emulated and ``allow_emulated`` is not given.
    """
    from spillover.bench import _disk, _host

    size_bytes = parse_bytes(options.size, name="size")
    machine = f"{_processor()}, {_versions()}"
    found: dict[str, Measured] = {}
    host = _host.measure(size_bytes=size_bytes, rounds=options.rounds)
    elsewhere: dict[str, str] = {}
    if options.gpu:
        gpu, on_device = _measure_gpu(options, size_bytes)
        found["gpu"] = gpu
        host.update(on_device)
        elsewhere = dict.fromkeys(on_device, gpu.source)
    found["host"] = Measured(
        extends=options.host_like,
        title=_processor(),
        source=f"measured on {machine}",
        numbers=host,
        method=_HOST_METHOD,
        elsewhere=elsewhere,
    )
    if options.folders:
        names = ", ".join(str(folder) for folder in options.folders)
        found["disk"] = Measured(
            extends=options.disk_like,
            title=names,
            source=f"measured on {names} of {machine}",
            numbers=_disk.measure(options.folders, size_bytes=size_bytes, rounds=options.rounds),
            method=_DISK_METHOD,
        )
    return found


def _measure_gpu(options: BenchOptions, size_bytes: int) -> tuple[Measured, dict[str, float]]:
    from spillover.bench import _gpu

    if not driver_available():
        raise ConfigError(
            "there is no CUDA device to measure; pass --no-gpu to measure host and disks only"
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "torch finds no CUDA device; install a CUDA build of it, or pass --no-gpu to measure "
            "host and disks only"
        )
    name = torch.cuda.get_device_name()
    emulated = emulator.is_enabled() or _EMULATED_NAME in name.lower()
    if emulated and not options.allow_emulated:
        raise ConfigError(
            f"the device {name!r} is emulated, and emulated time says nothing about a GPU; pass "
            "--no-gpu to measure host and disks only, or --allow-emulated to try the command"
        )
    numbers = _gpu.measure(
        size_bytes=size_bytes, matmul_size=options.matmul_size, rounds=options.rounds
    )
    where = f"measured on {name}, {_versions()}, driver API {driver_version()}"
    if emulated:
        where = f"EMULATED, says nothing about a GPU: {where}"
    gpu = Measured(
        extends=options.like, title=name, source=where, numbers=numbers, method=_GPU_METHOD
    )
    return gpu, _gpu.host_side(size_bytes=size_bytes, rounds=options.rounds)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _versions() -> str:
    today = datetime.date.today().isoformat()
    return f"{today}, torch {importlib.metadata.version('torch')}"


def write_profile(found: Mapping[str, Measured], path: Path) -> None:
    """Write the measured tables to ``path``; what is not in them comes from what they extend."""
    if path.suffix != ".toml":
        raise ConfigError(f"{str(path)!r} must end in .toml, as profiles do")
    lines = [
        "# Written by `spillover bench`. What is not here is taken from the profile that a table",
        "# extends, with that profile's source.",
    ]
    for section, measured in found.items():
        lines += [
            "",
            f"[{section}]",
            f"name = {json.dumps(path.stem)}",
            f"title = {json.dumps(measured.title, ensure_ascii=False)}",
            f"extends = {json.dumps(measured.extends)}",
        ]
        for key, value in measured.numbers.items():
            method = measured.method.get(key, "")
            where = measured.elsewhere.get(key, measured.source)
            source = f"{where}{': ' if method else ''}{method}"
            lines += [
                "",
                f"[{section}.{key}]",
                f"value = {value if isinstance(value, int) else float(f'{value:.5g}')}",
                f"source = {json.dumps(source, ensure_ascii=False)}",
            ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


_GPU_METHOD = {
    "memory_efficiency": "1, since the bandwidth itself was measured",
    "matmul_efficiency": "1, since the peaks themselves were measured",
    "memory_bandwidth_gb_s": "b = 2 a, reads and writes",
    "matmul_k_ramp": "products of two lengths of k",
    "convolution_efficiency": "3x3, 256 channels, over the bf16 product's rate",
    "attention_forward_efficiency": "16 heads of 128, over the bf16 product's rate",
    "attention_backward_efficiency": "16 heads of 128, over the bf16 product's rate",
    "kernel_ramp_us": "0.6 of a small kernel's time in a full queue",
    "kernel_gap_us": "0.4 of a small kernel's time in a full queue",
    "launch_latency_us": "a small kernel on an idle device, less one in a full queue",
    "copy_latency_us": "a pinned copy of 16 bytes with its synchronisation",
    "pcie_duplex_gb_s": "pinned copies in both directions at once",
    **{
        f"peak_{name}_tflops": "square product" for name in ("fp64", "fp32", "tf32", "fp16", "bf16")
    },
}
_HOST_METHOD = {
    "memory_bandwidth_gb_s": "c = a + b on all of torch's threads, reads and writes",
    "optimizer_bandwidth_gb_s": "torch's fused AdamW on the CPU, 28 bytes a parameter",
    "operator_us": "a * 1.5 with autograd, host time alone",
    "pin_gb_s": "cudaHostRegister of memory that was touched",
}
_DISK_METHOD = {
    "read_gb_s": "O_DIRECT, four threads a folder",
    "write_gb_s": "O_DIRECT, four threads a folder, fdatasync included",
    "read_latency_us": "median of one block at a time",
    "write_latency_us": "median of one block at a time",
}

"""Options of the emulated device and their environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from spillover._errors import ConfigError
from spillover._units import parse_bytes
from spillover.emulator import _profiles

Schedule = Literal["late", "eager", "threaded", "random"]
HazardPolicy = Literal["off", "count", "warn", "raise"]
UnknownPolicy = Literal["error", "zero", "one"]

#: Set to 1 in the environment of a process that ``sitecustomize`` shall give emulated devices.
ACTIVE_VARIABLE = "SPILLOVER_EMULATOR"
_PREFIX = "SPILLOVER_EMULATOR_"
_DEVICES_MAX = 16
_VRAM_DEFAULT = "8GiB"
#: The smallest capacity that a CUDA context and torch's first segments fit into.
_VRAM_BYTES_MIN = 4 << 20
#: What the emulated address range has room for, besides what is freed and reserved anew.
VRAM_BYTES_MAX = 1 << 40
_SEED_MAX = 2**63 - 1
_FLAGS = (
    "poison",
    "virtual_memory",
    "uninitialized",
    "leaks",
    "blocks",
    "stacks",
    "clock",
    "dry",
)
_TEXTS = ("profile", "trace", "routing")
_IMBALANCE_MAX = 1024.0
_SWITCHES = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the emulated device is like.

    Parameters
    ----------
    devices
        Number of devices, 1 to 16.
    vram
        Capacity of each device, bytes or a text such as ``"24GiB"``; None for the profile's memory,
        or 8 GiB without a profile.
    schedule
        When queued work runs. ``late``: only when something waits for it, so that a forgotten wait
        reads stale data. ``eager``: at once. ``threaded``: on a thread of its own. ``random``: in a
        random order that the streams' dependencies allow, the same for the same seed.
    seed
        Seed of the ``random`` schedule.
    hazards
        What the happens-before checker does with an access that nothing orders: ``off``, ``count``,
        ``warn`` (on stderr) or ``raise`` (the call fails).
    poison
        Fill what the driver hands out and takes back with 0xFF bytes (NaN as a float). Blocks that
        torch's cache reuses without the driver are not filled.
    virtual_memory
        Whether the devices have virtual memory management (``cuMemCreate``, ``cuMemMap`` and so
        on), which some virtual GPUs have not.
    uninitialized
        Report reads of device memory that was never written. Kernels of the project's own count as
        writing nothing, so this is for programs without them.
    leaks
        Print what the process still holds of the driver when it ends.
    blocks
        Follow the blocks of torch's caching allocator (or of this package's): finds uses of a block
        that was taken back, and says which block a report is about. About a microsecond an
        allocation; on by itself once the program starts threads, and with ``uninitialized``.
    stacks
        Say in reports where the program made the calls: about a tenth of a microsecond a call.
    clock
        Keep virtual time: what the program would take on a card. On by itself with ``profile`` or
        ``trace``.
    profile
        Whose numbers the clock computes with, such as ``"rtx4090"``; ``""`` for a made-up card of
        round numbers.
    trace
        Where the clock's trace is written when the process ends, in Chrome's format; ``""`` for
        none. A child process puts its number before the suffix.
    dry
        Dry run: memory has addresses and sizes but no bytes, operators give shapes. The allocator
        decides as ever, so peaks are those of a run that computes. See ``docs/dry-run.md``.
    unknown
        What host code of a dry run gets where it asks for a value that is not known: ``error`` (an
        exception that names the operator and the line), ``zero`` or ``one``.
    routing
        How a dry run's mixtures of experts route: ``""`` for not stated (what depends on it is an
        error), ``"uniform"``, or a number such as ``"1.5"``: the busiest expert gets so many times
        the mean.
    """

    devices: int = 1
    vram: int | str | None = None
    schedule: Schedule = "late"
    seed: int = 0
    hazards: HazardPolicy = "raise"
    poison: bool = True
    virtual_memory: bool = True
    uninitialized: bool = False
    leaks: bool = False
    blocks: bool = False
    stacks: bool = True
    clock: bool = False
    profile: str = ""
    trace: str = ""
    dry: bool = False
    unknown: UnknownPolicy = "error"
    routing: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.devices, bool) or not isinstance(self.devices, int):
            raise ConfigError(f"devices must be a number, not {self.devices!r}")
        if not 1 <= self.devices <= _DEVICES_MAX:
            raise ConfigError(f"devices must be 1 to {_DEVICES_MAX}, got {self.devices}")
        _check_choice("schedule", self.schedule, get_args(Schedule))
        _check_choice("hazards", self.hazards, get_args(HazardPolicy))
        _check_choice("unknown", self.unknown, get_args(UnknownPolicy))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a number, not {self.seed!r}")
        if not 0 <= self.seed <= _SEED_MAX:
            raise ConfigError(f"seed must be 0 to {_SEED_MAX}, got {self.seed}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, not {getattr(self, name)!r}")
        # The same capacity written in another way is the same option.
        object.__setattr__(self, "vram", self._capacity_bytes())
        _check_routing(self.routing)
        # A program may change its folder, and its children start in others.
        object.__setattr__(self, "profile", _profiles.absolute(self.profile))
        if self.trace:
            object.__setattr__(self, "trace", os.path.abspath(self.trace))
        if self.profile or self.trace:
            object.__setattr__(self, "clock", True)

    def _capacity_bytes(self) -> int:
        profile = _profiles.load(self.profile) if self.profile else None  # says which there are
        given = self.vram
        if given is None:
            given = int(profile.gpu.memory_gib * 2**30) if profile else _VRAM_DEFAULT
        capacity = parse_bytes(given, name="vram")
        if not _VRAM_BYTES_MIN <= capacity <= VRAM_BYTES_MAX:
            raise ConfigError(f"vram must be 4MiB to 1TiB, got {given!r}")
        return capacity

    @property
    def vram_bytes(self) -> int:
        """Capacity of each device in bytes."""
        assert isinstance(self.vram, int)
        return self.vram

    def environment(self) -> dict[str, str]:
        """The variables that the emulated driver reads."""
        return {
            _PREFIX + "DEVICES": str(self.devices),
            _PREFIX + "VRAM": str(self.vram_bytes),
            _PREFIX + "SCHEDULE": self.schedule,
            _PREFIX + "SEED": str(self.seed),
            _PREFIX + "HAZARDS": self.hazards,
            _PREFIX + "UNKNOWN": self.unknown,
            **{_PREFIX + name.upper(): "1" if getattr(self, name) else "0" for name in _FLAGS},
            **{_PREFIX + name.upper(): getattr(self, name) for name in _TEXTS},
            _PREFIX + "PROFILE_VALUES": _profiles.load(self.profile).flatten()
            if self.profile
            else "",
        }

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        given: Mapping[str, object] | None = None,
        defaults: Mapping[str, object] | None = None,
    ) -> Options:
        """Options from ``given``, then ``SPILLOVER_EMULATOR_*``, then ``defaults``, then our own.

        Raises
        ------
        ConfigError
            A value is malformed; the message names the option or the variable.
        """
        values: dict[str, object] = dict(defaults or {})
        for field in fields(cls):
            variable = _PREFIX + field.name.upper()
            text = environment.get(variable)
            if text:
                values[field.name] = _parse(field.name, variable, text)
        values.update(given or {})
        return cls(**values)  # type: ignore[arg-type]


def _parse(name: str, variable: str, text: str) -> object:
    if name in ("devices", "seed"):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{variable}={text!r} is not a number") from None
    if name in _FLAGS:
        _check_choice(variable, text.lower(), tuple(_SWITCHES))
        return _SWITCHES[text.lower()]
    return text


def require_writable_place(option: str, path: Path) -> None:
    """Refuse an output file that cannot be written, before the run rather than after hours.

    Raises
    ------
    ConfigError
        The path is a folder, or lies in one that does not exist.
    """
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {path} lies in a folder that does not exist")


def _check_routing(routing: str) -> None:
    if routing in ("", "uniform"):
        return
    try:
        imbalance = float(routing)
    except ValueError:
        imbalance = 0.0
    if not 1 <= imbalance <= _IMBALANCE_MAX:
        raise ConfigError(
            f"routing={routing!r} is not known; use uniform, or how many times the mean load the "
            f"busiest expert gets, such as 1.5"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")

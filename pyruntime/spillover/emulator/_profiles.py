"""Hardware profiles: rates of a card, its host and its disks, each with the source of its number.

A profile file is TOML with the tables ``[gpu]``, ``[host]`` and ``[disk]``, any of them; a number
is a table of ``value`` and ``source``. ``load("rtx4090+desktop+gen4x1")`` joins one of each.
``docs/profiles.md`` describes the format, ``docs/cost-model.md`` what each number does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from spillover._errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).resolve().parent / "profiles"
_EXTENDS_DEPTH_MAX = 8


def _number(*, maximum: float, minimum: float = 0.0) -> Any:
    """A field that holds a number; ``minimum`` itself is allowed only where it is not zero."""
    return field(metadata={"minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What the three kinds of part have in common."""

    name: str
    title: str
    #: Where each number comes from, by field.
    sources: Mapping[str, str] = field(repr=False)

    @classmethod
    def numbers(cls) -> tuple[str, ...]:
        """Names of the fields that hold numbers."""
        return tuple(entry.name for entry in fields(cls) if "maximum" in entry.metadata)


@dataclass(frozen=True, kw_only=True)
class GpuProfile(_Part):
    """A card and its link to the host; ``docs/cost-model.md`` defines each number."""

    #: Names of the host and the disk that belong to it where none are named.
    host: str
    disk: str
    memory_gib: float = _number(maximum=1024)
    sm_count: int = _number(maximum=1024)
    clock_mhz: float = _number(maximum=10_000)
    l2_mib: float = _number(maximum=4096)
    l2_bandwidth_gb_s: float = _number(maximum=100_000)
    memory_bandwidth_gb_s: float = _number(maximum=100_000)
    memory_efficiency: float = _number(maximum=1)
    peak_fp64_tflops: float = _number(maximum=100_000)
    peak_fp32_tflops: float = _number(maximum=100_000)
    peak_tf32_tflops: float = _number(maximum=100_000)
    peak_fp16_tflops: float = _number(maximum=100_000)
    peak_bf16_tflops: float = _number(maximum=100_000)
    peak_fp8_tflops: float = _number(maximum=100_000)
    peak_int8_tops: float = _number(maximum=100_000)
    # Above 1 where the card runs at a higher clock than the vendor's boost clock.
    matmul_efficiency: float = _number(maximum=1.25)
    matmul_k_ramp: float = _number(maximum=100_000)
    convolution_efficiency: float = _number(maximum=1.25)
    attention_forward_efficiency: float = _number(maximum=1.25)
    attention_backward_efficiency: float = _number(maximum=1.25)
    attention_key_ramp: float = _number(maximum=100_000)
    attention_head_ramp: float = _number(maximum=100_000)
    sustained_efficiency: float = _number(maximum=1)
    kernel_ramp_us: float = _number(maximum=1e6)
    kernel_gap_us: float = _number(maximum=1e6)
    launch_latency_us: float = _number(maximum=1e6)
    copy_latency_us: float = _number(maximum=1e6)
    pcie_to_device_gb_s: float = _number(maximum=10_000)
    pcie_to_host_gb_s: float = _number(maximum=10_000)
    pcie_duplex_gb_s: float = _number(maximum=20_000)
    peer_gb_s: float = _number(maximum=10_000)
    pageable_to_device_gb_s: float = _number(maximum=10_000)
    pageable_to_host_gb_s: float = _number(maximum=10_000)

    def sustained(self) -> GpuProfile:
        """The card as a long training run sees it: ``sustained_efficiency`` is in the rates."""
        share = self.sustained_efficiency
        rates = {name: getattr(self, name) * share for name in _SUSTAINED}
        return replace(self, **rates, sustained_efficiency=1.0)


#: Every rate of a kernel's work: scaling all of them scales the work's duration.
_SUSTAINED = (
    "l2_bandwidth_gb_s",
    "memory_efficiency",
    "matmul_efficiency",
    "convolution_efficiency",
    "attention_forward_efficiency",
    "attention_backward_efficiency",
)


@dataclass(frozen=True, kw_only=True)
class HostProfile(_Part):
    """The machine around the card."""

    cores: int = _number(maximum=100_000)
    memory_bandwidth_gb_s: float = _number(maximum=100_000)
    optimizer_bandwidth_gb_s: float = _number(maximum=100_000)
    pin_gb_s: float = _number(maximum=100_000)
    operator_us: float = _number(maximum=1e6)
    launch_us: float = _number(maximum=1e6)
    graph_launch_us: float = _number(maximum=1e6)
    event_us: float = _number(maximum=1e6)
    stream_call_us: float = _number(maximum=1e6)
    query_us: float = _number(maximum=1e6)
    wait_us: float = _number(maximum=1e6)
    allocation_us: float = _number(maximum=1e6)
    free_us: float = _number(maximum=1e6)
    mapping_us: float = _number(maximum=1e6)
    function_us: float = _number(maximum=1e6)
    launch_queue_depth: int = _number(maximum=1e6)


@dataclass(frozen=True, kw_only=True)
class DiskProfile(_Part):
    """One disk, or several that are used as one."""

    drives: int = _number(maximum=1024)
    read_gb_s: float = _number(maximum=10_000)
    write_gb_s: float = _number(maximum=10_000)
    read_latency_us: float = _number(maximum=1e9)
    write_latency_us: float = _number(maximum=1e9)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A whole machine."""

    gpu: GpuProfile
    host: HostProfile
    disk: DiskProfile

    @property
    def name(self) -> str:
        """Such as ``"rtx4090+desktop+gen4x1"``."""
        return "+".join(part.name for part in self.parts())

    def parts(self) -> tuple[GpuProfile, HostProfile, DiskProfile]:
        """Card, host and disk."""
        return self.gpu, self.host, self.disk

    def flatten(self) -> str:
        """The profile as lines of ``section.key=value``, for the virtual clock.

        The card is as a training run sees it: ``GpuProfile.sustained``.
        """
        return "".join(f"{key}={value}\n" for key, value in self._flat_items())

    def _flat_items(self) -> Iterator[tuple[str, str]]:
        parts: tuple[_Part, ...] = (self.gpu.sustained(), self.host, self.disk)
        for section, part in zip(_KINDS, parts, strict=True):
            yield f"{section}.name", part.name
            for name in part.numbers():
                yield f"{section}.{name}", repr(getattr(part, name))


_P = TypeVar("_P", bound=_Part)


@dataclass(frozen=True)
class _Kind(Generic[_P]):
    """How a section of a file becomes a part."""

    section: str
    part: type[_P]

    def read(self, path: Path, *, depth: int = 0) -> _P:
        return self.build(self._table(path, depth), where=f"{path} [{self.section}]")

    def _table(self, path: Path, depth: int) -> dict[str, Any]:
        """The section, with what it leaves out taken from the part that it extends."""
        table = _sections(path).get(self.section)
        if table is None:
            raise ConfigError(f"{path} has no [{self.section}] table")
        table = dict(table)
        base = table.pop("extends", None)
        if base is None:
            return table
        if depth >= _EXTENDS_DEPTH_MAX:
            raise ConfigError(f"{path} [{self.section}] extends itself")
        return {**self._table(_find(self.section, str(base)), depth + 1), **table}

    def build(self, table: Mapping[str, Any], *, where: str) -> _P:
        """A part, after every key of the table was checked."""
        numbers = self.part.numbers()
        texts = [
            entry.name for entry in fields(self.part) if entry.name not in (*numbers, "sources")
        ]
        known = {*texts, *numbers}
        unknown, missing = sorted(set(table) - known), sorted(known - set(table))
        if unknown:
            raise ConfigError(
                f"{where}: unknown key {unknown[0]!r}; a [{self.section}] table has "
                f"{', '.join(sorted(known))}"
            )
        if missing:
            raise ConfigError(
                f"{where}: {', '.join(missing)} missing; write them, or "
                f'extends = "NAME" to take them from another profile'
            )
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name in texts:
            if not isinstance(table[name], str) or not table[name].isprintable() or not table[name]:
                raise ConfigError(f"{where}: {name} must be a line of text, not {table[name]!r}")
            values[name] = table[name]
        for entry in fields(self.part):
            if entry.name in numbers:
                values[entry.name] = self._value(entry.name, table[entry.name], entry, where)
                sources[entry.name] = table[entry.name]["source"]
        return self.part(**values, sources=sources)

    def _value(self, name: str, entry: Any, described: Any, where: str) -> int | float:
        form = f'write [{self.section}.{name}] with value = NUMBER and source = "where it is from"'
        if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
            raise ConfigError(f"{where}: {name} is not a number with its source; {form}")
        value, source = entry["value"], entry["source"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {name} must be a number, not {value!r}")
        if not isinstance(source, str) or not source.strip():
            raise ConfigError(f"{where}: {name} has no source; {form}")
        minimum, maximum = described.metadata["minimum"], described.metadata["maximum"]
        if not math.isfinite(value) or not minimum < value <= maximum:
            raise ConfigError(
                f"{where}: {name} must be above {minimum:g} and at most {maximum:g}, not {value}"
            )
        if get_type_hints(self.part)[name] is int:
            if value != int(value):
                raise ConfigError(f"{where}: {name} must be a whole number, not {value}")
            return int(value)
        return float(value)


_GPU = _Kind("gpu", GpuProfile)
_HOST = _Kind("host", HostProfile)
_DISK = _Kind("disk", DiskProfile)
_KINDS: dict[str, _Kind[Any]] = {"gpu": _GPU, "host": _HOST, "disk": _DISK}


def names(section: str) -> list[str]:
    """Names of the profiles that come with the package: of ``"gpu"``, ``"host"`` or ``"disk"``."""
    return sorted(path.stem for path in (_FOLDER / section).glob("*.toml"))


def load(text: str) -> Profile:
    """The profile that ``text`` names.

    Parameters
    ----------
    text
        One to three pieces joined by ``+``, in any order: names of a card, a host and a disk, or
        paths of TOML files (they end in ``.toml``), which give each table that they have. What is
        not named is what the card's file names. A later piece replaces an earlier one of its kind
        only where that one came from a file with several tables.

    Raises
    ------
    ConfigError
        A piece is no name and no file, two pieces are of one kind, no card is among them, or a file
        is not a profile. The message says what would be right.
    """
    pieces = [piece.strip() for piece in text.split("+")]
    found: dict[str, Path] = {}
    named: set[str] = set()
    for piece in pieces:
        for section, path in _locate(piece, text).items():
            if section in named:
                raise ConfigError(f"profile {text!r} names two of {section}; name one")
            found[section] = path
            if not _is_path(piece):
                named.add(section)
    if "gpu" not in found:
        raise ConfigError(
            f"profile {text!r} has no card; begin with one of {', '.join(names('gpu'))}"
        )
    gpu = _GPU.read(found["gpu"])
    host = found.get("host") or _find("host", gpu.host)
    disk = found.get("disk") or _find("disk", gpu.disk)
    return Profile(gpu=gpu, host=_HOST.read(host), disk=_DISK.read(disk))


def load_part(section: str, name: str) -> GpuProfile | HostProfile | DiskProfile:
    """One card, host or disk by name or path."""
    path = Path(name) if _is_path(name) else _find(section, name)
    part: GpuProfile | HostProfile | DiskProfile = _KINDS[section].read(path)
    return part


def absolute(text: str) -> str:
    """``text`` with its paths made independent of the working folder."""
    return "+".join(_absolute(piece.strip()) for piece in text.split("+"))


def _absolute(piece: str) -> str:
    path = str(Path(piece).expanduser().absolute()) if _is_path(piece) else piece
    return piece if "+" in path else path  # which separates pieces


def _is_path(piece: str) -> bool:
    return piece.endswith(".toml")


def _find(section: str, name: str) -> Path:
    if name not in names(section):
        raise ConfigError(
            f"there is no {section} profile {name!r}; there are {', '.join(names(section))}"
        )
    return _FOLDER / section / f"{name}.toml"


def _locate(piece: str, text: str) -> dict[str, Path]:
    """Which sections the piece gives, and where they are."""
    if _is_path(piece):
        path = Path(piece).expanduser()
        sections = _sections(path)
        if not sections:
            raise ConfigError(f"{path} has none of the tables [gpu], [host] and [disk]")
        return {section: path for section in _KINDS if section in sections}
    for section in _KINDS:
        if piece in names(section):
            return {section: _FOLDER / section / f"{piece}.toml"}
    known = "; ".join(f"{section}: {', '.join(names(section))}" for section in _KINDS)
    raise ConfigError(
        f"profile {text!r}: {piece!r} is no profile and no file that ends in .toml. {known}"
    )


def _sections(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path} is not TOML: {error}") from error
    unknown = sorted(set(content) - set(_KINDS))
    if unknown:
        raise ConfigError(f"{path}: unknown table {unknown[0]!r}; there are gpu, host and disk")
    for section, table in content.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} must be a table, [{section}]")
    return content

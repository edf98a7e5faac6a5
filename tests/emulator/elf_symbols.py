"""Reads a shared library's dynamic symbols (64-bit little-endian ELF) without binutils."""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

_DYNSYM, _VERSYM, _VERNEED, _DYNAMIC = 11, 0x6FFFFFFF, 0x6FFFFFFE, 6
_WEAK = 2
_NEEDED_TAG = 1


@dataclass(frozen=True)
class Section:
    """One row of the section table."""

    name: str
    kind: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class Symbol:
    """One dynamic symbol; ``version`` is the library's version node that it needs, or ""."""

    name: str
    is_defined: bool
    is_weak: bool
    version: str


class ElfLibrary:
    """The dynamic symbols, needed libraries and read-only strings of a shared library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
        self._sections = self._read_sections()

    def _read_sections(self) -> list[Section]:
        table_offset = struct.unpack_from("<Q", self._data, 40)[0]
        entry_size, count, names_index = struct.unpack_from("<HHH", self._data, 58)
        rows = [
            struct.unpack_from("<IIQQQQIIQQ", self._data, table_offset + index * entry_size)
            for index in range(count)
        ]
        names_offset = rows[names_index][4]
        return [
            Section(self._text(names_offset + row[0]), row[1], row[4], row[5], row[6])
            for row in rows
        ]

    def _text(self, offset: int) -> str:
        return self._data[offset : self._data.find(b"\0", offset)].decode()

    def _find(self, kind: int) -> Section | None:
        return next((section for section in self._sections if section.kind == kind), None)

    def _versions(self) -> dict[int, str]:
        """Version index of a symbol to the name of the version that it needs."""
        section = self._find(_VERNEED)
        names: dict[int, str] = {}
        if section is None:
            return names
        strings = self._sections[section.link].offset
        entry = section.offset
        while True:
            _, count, _, first, following = struct.unpack_from("<HHIII", self._data, entry)
            item = entry + first
            for _ in range(count):
                _, _, index, name, step = struct.unpack_from("<IHHII", self._data, item)
                names[index] = self._text(strings + name)
                item += step
            if following == 0:
                return names
            entry += following

    def symbols(self, pattern: str) -> list[Symbol]:
        """Dynamic symbols whose whole name matches ``pattern``."""
        section, versions = self._find(_DYNSYM), self._find(_VERSYM)
        if section is None:
            return []
        strings_section = self._sections[section.link]
        strings = self._data[strings_section.offset : strings_section.offset + strings_section.size]
        version_names = self._versions()
        matches = re.compile(pattern.encode()).fullmatch
        found = []
        raw = self._data[section.offset : section.offset + section.size]
        for index, row in enumerate(struct.iter_unpack("<IBBHQQ", raw)):
            name = strings[row[0] : strings.index(b"\0", row[0])]
            if not matches(name):
                continue
            version = 0
            if versions is not None:
                version = struct.unpack_from("<H", self._data, versions.offset + 2 * index)[0]
            found.append(
                Symbol(
                    name.decode(),
                    is_defined=row[3] != 0,
                    is_weak=row[1] >> 4 == _WEAK,
                    version=version_names.get(version & 0x7FFF, ""),
                )
            )
        return found

    def needed(self) -> list[str]:
        """SONAMEs of the libraries that this one needs."""
        section = self._find(_DYNAMIC)
        if section is None:
            return []
        strings = self._sections[section.link].offset
        raw = self._data[section.offset : section.offset + section.size]
        return [
            self._text(strings + value)
            for tag, value in struct.iter_unpack("<QQ", raw)
            if tag == _NEEDED_TAG
        ]

    def read_only_strings(self, pattern: str) -> set[str]:
        """Whole constants of the program's read-only data that match, as looked up with dlsym."""
        expression = re.compile(rb"\0(" + pattern.encode() + rb")(?=\0)")
        found: set[str] = set()
        for section in self._sections:
            if section.name.startswith(".rodata"):
                raw = self._data[section.offset : section.offset + section.size]
                found.update(match.group(1).decode() for match in expression.finditer(raw))
        return found

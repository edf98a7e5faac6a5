"""Where a command writes, checked before it begins."""

from __future__ import annotations

from pathlib import Path

from spillover._errors import ConfigError


def require_file_place(path: Path) -> None:
    """Refuse a path where no file can be made, before hours of work end at it.

    Raises
    ------
    ConfigError
        There is no such folder, or the path is a folder itself.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r} to write to")
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder; give the name of a file in it")

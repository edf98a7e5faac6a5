"""The folder of compiled parts: private to its user, locked, and filled by renaming.

What lies there is loaded into the process, so the folder must be one that nobody else can write to.
A part has a folder of its own whose name holds a hash of all that went into it. A folder under its
final name is complete: it was filled under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from spillover._errors import BuildError, ConfigError
from spillover._settings import logger

_TEMPORARY = ".building-"
_LOCK = ".lock-"
_ENTRY_MARK = "-torch"


def cache_folder() -> Path:
    """Folder of the compiled parts, made on the first call.

    ``$SPILLOVER_CACHE_DIR``, else ``$XDG_CACHE_HOME/spillover``, else ``~/.cache/spillover``.

    Raises
    ------
    ConfigError
        The folder belongs to someone else, or others may write to it.
    BuildError
        It cannot be made.
    """
    folder = _configured_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be used: {error.strerror}; "
            "set SPILLOVER_CACHE_DIR to a folder that this user can write to"
        ) from error
    _require_private(folder, facts)
    return folder


def _configured_folder() -> Path:
    own = os.environ.get("SPILLOVER_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    if base and os.path.isabs(base):
        return Path(base) / "spillover"
    try:
        return Path.home() / ".cache" / "spillover"
    except RuntimeError as error:
        raise BuildError(
            "this user has no home folder; set SPILLOVER_CACHE_DIR to a folder for compiled parts"
        ) from error


def _require_private(folder: Path, facts: os.stat_result) -> None:
    if facts.st_uid != os.geteuid():
        raise ConfigError(
            f"the cache folder {folder} belongs to user {facts.st_uid}, not to this one "
            f"({os.geteuid()}); code from it would run in this process, so it is not used: "
            "set SPILLOVER_CACHE_DIR to a folder of your own"
        )
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"the cache folder {folder} is writable by others (mode "
            f"{stat.S_IMODE(facts.st_mode):04o}); code from it would run in this process, so it "
            f"is not used: run 'chmod 700 {folder}'"
        )


def entry_name(part: str, torch_version: str, key: str, compiler_key: str) -> str:
    """Name of the folder of one compiled part."""
    return f"{part}{_ENTRY_MARK}{torch_version}-{key}-{compiler_key}"


def find(entry: str, file_name: str) -> Path | None:
    """The compiled file of an entry, None where it has not been built.

    ``entry`` may hold wildcards; of several that fit, any serves.
    """
    for path in cache_folder().glob(f"{entry}/{file_name}"):
        if path.is_file():
            return path
    return None


def find_or_build(entry: str, file_name: str, build: Callable[[Path], None]) -> Path:
    """The compiled file of an entry; ``build`` fills a temporary folder if there is none yet.

    Several processes may call this at once: one builds, the others wait for it.
    """
    found = find(entry, file_name)
    if found is not None:
        return found
    with _locked(entry):
        found = find(entry, file_name)
        if found is not None:
            return found
        folder = cache_folder()
        _remove_leftovers(folder, entry)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{entry}-", dir=folder))
        try:
            build(temporary)
            if not (temporary / file_name).is_file():
                raise BuildError(f"building {entry} has not made {file_name}")
            final = folder / entry
            # A folder without its file is one that somebody emptied by hand.
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final / file_name


@contextlib.contextmanager
def _locked(entry: str) -> Iterator[None]:
    path = cache_folder() / f"{_LOCK}{entry}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that builds %s", entry)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # The file stays: removing it would let two processes lock two files of one name.
        os.close(descriptor)


def _remove_leftovers(folder: Path, entry: str) -> None:
    """Remove what a killed process left of this entry; the caller holds the entry's lock."""
    for path in folder.glob(f"{_TEMPORARY}{entry}-*"):
        shutil.rmtree(path, ignore_errors=True)


def clean() -> list[Path]:
    """Remove every compiled part from the cache and return the folders removed.

    A part that another process is building at this moment is left to it.
    """
    removed = []
    folder = cache_folder()
    for path in sorted(folder.glob(f"*{_ENTRY_MARK}*")):
        if path.name.startswith(".") or not path.is_dir():
            continue
        with _locked(path.name):
            shutil.rmtree(path, ignore_errors=True)
            _remove_leftovers(folder, path.name)
        removed.append(path)
    return removed

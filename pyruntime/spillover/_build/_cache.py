"""The folder of compiled parts: private to its user, locked, and filled by renaming.

What lies there is loaded into the process, so the folder must be one that nobody else can write to,
and that nobody else can put another folder in the place of.
A part has a folder of its own whose name holds a hash of all that went into it. A folder under its
final name is complete: it was filled under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
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
        The folder belongs to someone else, others may write to it or to one above it, or its name
        is malformed.
    BuildError
        It cannot be made.
    """
    folder = _configured_folder()
    with _usable(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Without symbolic links: what is checked here is what is used.
        folder = folder.resolve(strict=True)
        facts = folder.stat()
        above = [(parent, parent.stat()) for parent in folder.parents]
    _require_private(folder, facts)
    for parent, parent_facts in above:
        _require_unexchangeable(folder, parent, parent_facts)
    return folder


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn a failure of the file system into an error that says what to set."""
    try:
        yield
    except OSError as error:
        at = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        raise BuildError(
            f"the cache folder {folder} cannot be used: {error.strerror or error}{at}; "
            "set SPILLOVER_CACHE_DIR to a folder that this user can write to"
        ) from error


def _configured_folder() -> Path:
    own = os.environ.get("SPILLOVER_CACHE_DIR")
    if own:
        try:
            return Path(own).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(
                f"SPILLOVER_CACHE_DIR={own!r} names the home folder of a user that does not exist; "
                "set it to a folder that this user can write to"
            ) from error
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


def _require_unexchangeable(folder: Path, parent: Path, facts: os.stat_result) -> None:
    """Whoever may write to a folder above may rename this one and put another in its place."""
    if facts.st_uid not in (0, os.geteuid()) and not _is_unmapped(facts.st_uid):
        raise ConfigError(
            f"{parent}, which holds the cache folder {folder}, belongs to user {facts.st_uid}, who "
            "could exchange it; code from it would run in this process, so it is not used: set "
            "SPILLOVER_CACHE_DIR to a folder below your own"
        )
    by_others = facts.st_mode & stat.S_IWOTH
    by_group = facts.st_mode & stat.S_IWGRP and not _is_own_group(facts.st_gid)
    # In a sticky folder such as /tmp only its owner may rename an entry.
    if (by_others or by_group) and not facts.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"{parent}, which holds the cache folder {folder}, is writable by others (mode "
            f"{stat.S_IMODE(facts.st_mode):04o}), who could exchange it; code from it would run in "
            f"this process, so it is not used: run 'chmod go-w {parent}', or set "
            "SPILLOVER_CACHE_DIR to a folder elsewhere"
        )


def _is_own_group(group: int) -> bool:
    """Whether a group has no member but this user or root: many systems give each user one."""
    if group == 0:
        return True
    try:
        user = pwd.getpwuid(os.geteuid())
        entry = grp.getgrgid(group)
    except KeyError:
        return False
    is_private = user.pw_gid == group and entry.gr_name == user.pw_name
    return is_private and all(member == user.pw_name for member in entry.gr_mem)


def _is_unmapped(user: int) -> bool:
    """Whether a user is one from outside a container, where the machine's own folders belong to."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        count = int(Path("/proc/self/uid_map").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return False
    return user == overflow and count < 2**32 - 1


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
    folder = cache_folder()
    with _usable(folder), _locked(entry):
        found = find(entry, file_name)
        if found is not None:
            return found
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
    if path.is_symlink():
        raise BuildError(f"the lock file {path} is a symbolic link; remove it")
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
        with _usable(folder), _locked(path.name):
            shutil.rmtree(path, ignore_errors=True)
            _remove_leftovers(folder, path.name)
        removed.append(path)
    return removed

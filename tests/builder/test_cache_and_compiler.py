"""The builder's cache folder and compiler: what is refused, and in which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spillover import BuildError, ConfigError
from spillover._build import _cache, _compiler


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "above" / "cache"
    monkeypatch.setenv("SPILLOVER_CACHE_DIR", str(path))
    return path


def fill(folder: Path) -> None:
    (folder / "part.so").write_text("compiled")


def fill_twice(_: Path) -> None:
    raise AssertionError("what is in the cache was built again")


def test_an_entry_is_made_once_and_found_again(folder: Path) -> None:
    made = _cache.find_or_build("adapter-torch1", "part.so", fill)
    assert made == folder / "adapter-torch1" / "part.so"
    assert _cache.find_or_build("adapter-torch1", "part.so", fill_twice) == made
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _cache.clean() == [folder / "adapter-torch1"]


def test_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER_CACHE_DIR", "~nosuchuser/cache")
    with pytest.raises(ConfigError, match=r"SPILLOVER_CACHE_DIR='~nosuchuser/cache' names .* set"):
        _cache.cache_folder()


def test_a_lock_that_is_a_symbolic_link(folder: Path, tmp_path: Path) -> None:
    (_cache.cache_folder() / ".lock-adapter-torch1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="is a symbolic link; remove it"):
        _cache.find_or_build("adapter-torch1", "part.so", fill)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_takes_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that takes none even from root, to whom modes do not apply.
    monkeypatch.setenv("SPILLOVER_CACHE_DIR", f"/proc/{os.getpid()}/task")
    with pytest.raises(BuildError, match=r"cannot be used: .*set SPILLOVER_CACHE_DIR"):
        _cache.find_or_build("adapter-torch1", "part.so", fill)


def test_a_file_in_the_place_of_the_folder(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("")
    with pytest.raises(BuildError, match="cannot be used: "):
        _cache.cache_folder()


@pytest.mark.parametrize("mode", [0o707, 0o770, 0o777])
def test_a_folder_that_others_may_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.setattr(_cache, "_is_own_group", lambda _: False)
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=f"is writable by others .*{mode:04o}.*chmod 700"):
        _cache.cache_folder()
    folder.chmod(0o700)
    folder.parent.chmod(mode)
    with pytest.raises(ConfigError, match=f"above, which holds .*{mode:04o}.*'chmod go-w"):
        _cache.cache_folder()
    # As in /tmp, nobody may rename what is somebody else's there.
    folder.parent.chmod(mode | 0o1000)
    assert _cache.cache_folder() == folder


def test_a_group_of_ones_own_is_nobody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "_is_own_group", lambda _: True)
    folder.mkdir(parents=True)
    folder.parent.chmod(0o775)
    assert _cache.cache_folder() == folder


def test_a_link_to_the_folder_is_followed_and_its_target_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "open" / "target"
    target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    monkeypatch.setenv("SPILLOVER_CACHE_DIR", str(tmp_path / "link"))
    target.chmod(0o700)
    assert _cache.cache_folder() == target
    target.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="open, which holds the cache folder"):
        _cache.cache_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_folder_above_that_belongs_to_another_user(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder.parent, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345, who could exchange it"):
        _cache.cache_folder()


def test_a_compiler_command_without_its_closing_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-m64")
    with pytest.raises(ConfigError, match=r"CXX=.* is not a command \(No closing quotation\)"):
        _compiler.find_compiler()


def test_the_compiler_behind_a_launcher_is_asked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo launcher; else "$@"; fi\n')
    launcher.chmod(0o755)
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "compiler 7 $*"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} {compiler} -m64")
    found = _compiler.find_compiler()
    assert found.command == (str(launcher), str(compiler), "-m64")
    assert found.identity == "compiler 7 -m64 --version"
    compiler.unlink()
    with pytest.raises(BuildError, match=r"launcher .*compiler -m64 does not run: .*exit code 127"):
        _compiler.find_compiler()

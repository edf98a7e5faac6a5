"""The builder of torch-bound parts: its cache, its lock and what it says when it cannot build.

A part of one tiny source file stands for the real ones, and the facts about torch are given, so
that nothing here waits for a long compilation or loads torch.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spillover import BuildError, ConfigError, _build, _paths
from spillover._build import _cache, _parts, _torch

FACTS = _torch.TorchFacts(
    version="2.14.1+cu130",
    git_version="abc",
    cuda_version="13.0",
    cxx11_abi=True,
    root=Path("/nonexistent/torch"),
)

#: Sets the tiny part up in a process of its own; FOLDER is replaced.
SETUP = """
from dataclasses import replace
from pathlib import Path
from spillover import _build, _paths
from spillover._build import _parts, _torch
sources = Path({sources!r})
facts = _torch.TorchFacts("2.14.1+cu130", "abc", "13.0", True, Path("/nonexistent/torch"))
_torch.torch_facts = lambda: facts
_paths.source_path = lambda *parts: sources.joinpath(*parts)
_parts._RECIPES["adapter"] = replace(
    _parts._RECIPES["adapter"], torch_libraries=(), own_libraries=(), is_python_module=False
)
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    (folder / "torch_adapter").mkdir(parents=True)
    (folder / "allocator").mkdir()
    (folder / "allocator" / "c_api.h").write_text("#define ANSWER 42\n")
    (folder / "torch_adapter" / "answer.hpp").write_text("int answer();\n")
    (folder / "torch_adapter" / "answer.cpp").write_text(
        '#include "allocator/c_api.h"\n#include "torch_adapter/answer.hpp"\n'
        "int answer() { return ANSWER; }\n"
    )
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPILLOVER_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def compiler_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a compiler in place that notes each file it is asked to compile."""
    log = tmp_path / "compiler.log"
    wrapper = tmp_path / "counting-c++"
    wrapper.write_text(
        '#!/bin/sh\ncase " $* " in *" -c "*) echo compile >>' + str(log) + " ; sleep 0.3 ;; esac\n"
        'exec c++ "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    log.touch()
    return log


@pytest.fixture
def tiny_part(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Builds the tiny part as if it were the adapter."""
    monkeypatch.setattr(_torch, "torch_facts", lambda: FACTS)
    monkeypatch.setattr(_paths, "source_path", lambda *parts: sources.joinpath(*parts))
    recipe = replace(
        _parts._RECIPES["adapter"], torch_libraries=(), own_libraries=(), is_python_module=False
    )
    monkeypatch.setitem(_parts._RECIPES, "adapter", recipe)
    return lambda: _build.build("adapter")


def compilations(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_builds_once(
    tiny_part: Callable[[], Path],
    cache: Path,
    compiler_log: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = tiny_part()
    assert first.is_file()
    assert cache in first.parents
    assert "compiling" in capfd.readouterr().err
    assert tiny_part() == first
    assert compilations(compiler_log) == 1
    assert capfd.readouterr().err == ""
    # Objects and temporary folders are gone.
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert not list(cache.glob(".building-*"))


def test_cache_folder_is_private(cache: Path) -> None:
    assert _build.cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPILLOVER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _build.cache_folder() == tmp_path / "xdg" / "spillover"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _build.cache_folder() == tmp_path / "home" / ".cache" / "spillover"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_refuses_a_folder_that_others_may_write(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(ConfigError, match="writable by others"):
        _build.cache_folder()


def test_refuses_a_folder_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to user"):
        _build.cache_folder()


def test_unusable_folder_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPILLOVER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="SPILLOVER_CACHE_DIR"):
        _build.cache_folder()


def test_what_goes_in_decides_the_entry(
    tiny_part: Callable[[], Path],
    sources: Path,
    compiler_log: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {tiny_part()}
    (sources / "allocator" / "c_api.h").write_text("#define ANSWER 43\n")
    seen.add(tiny_part())
    with (sources / "torch_adapter" / "answer.cpp").open("a") as file:
        file.write("int another() { return 1; }\n")
    seen.add(tiny_part())
    monkeypatch.setattr(_torch, "torch_facts", lambda: replace(FACTS, version="2.13.0+cu130"))
    seen.add(tiny_part())
    monkeypatch.setattr(_torch, "torch_facts", lambda: replace(FACTS, cxx11_abi=False))
    seen.add(tiny_part())
    monkeypatch.setenv("CXX", "c++")
    seen.add(tiny_part())
    assert len(seen) == 6
    assert compilations(compiler_log) == 5


def test_two_processes_build_once(sources: Path, cache: Path, compiler_log: Path) -> None:
    code = SETUP.format(sources=str(sources)) + "print(_build.build('adapter'))\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert compilations(compiler_log) == 1
    assert sum("compiling" in err for _, err in results) == 1


def test_leftovers_of_a_killed_build_are_removed(
    tiny_part: Callable[[], Path], cache: Path, compiler_log: Path
) -> None:
    entry = tiny_part().parent
    leftover = cache / f".building-{entry.name}-killed"
    leftover.mkdir()
    (leftover / "answer.o").touch()
    for path in entry.iterdir():
        path.unlink()
    assert tiny_part().is_file()
    assert not leftover.exists()


def test_compiler_error_is_shown(tiny_part: Callable[[], Path], sources: Path, cache: Path) -> None:
    (sources / "torch_adapter" / "answer.cpp").write_text("int answer() { return missing_name; }\n")
    with pytest.raises(BuildError) as caught:
        tiny_part()
    message = str(caught.value)
    assert "missing_name" in message
    assert "answer.cpp" in message
    assert "2.14.1+cu130" in message
    assert not list(cache.glob(".building-*"))
    assert not list(cache.glob("adapter-*"))


def test_missing_compiler_says_what_to_install(
    tiny_part: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(BuildError, match=r"apt install g\+\+"):
        tiny_part()


def test_broken_compiler_is_named(
    tiny_part: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'licence expired' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="licence expired"):
        tiny_part()


def test_what_was_built_earlier_serves_without_a_compiler(
    tiny_part: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny_part()
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert tiny_part() == built


def test_clean_removes_every_entry(tiny_part: Callable[[], Path], cache: Path) -> None:
    built = tiny_part()
    other = cache / "something-else"
    other.mkdir()
    assert _build.clean() == [built.parent]
    assert not built.exists()
    assert other.exists()
    assert tiny_part() == built


FAKE_TORCH = """
import sys, types
torch = types.ModuleType("torch")
torch.__version__ = "2.14.1+cpu"
torch.version = types.SimpleNamespace(cuda=None, hip=None, git_version="abc")
sys.modules["torch"] = torch
"""
NO_TORCH = "import sys\nsys.modules['torch'] = None\n"


@pytest.mark.parametrize(
    ("setup", "words"),
    [(FAKE_TORCH, "CUDA build of torch"), (NO_TORCH, "not installed")],
    ids=["cpu-only", "absent"],
)
@pytest.mark.parametrize(
    "call",
    [
        "from spillover import _build; _build.build('adapter')",
        "import spillover; spillover.allocator.install()",
    ],
    ids=["build", "install"],
)
def test_without_a_cuda_build_of_torch(setup: str, words: str, call: str) -> None:
    code = setup + textwrap.dedent(
        f"""
        import spillover
        try:
            {call}
        except spillover.ConfigError as error:
            print(error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1


@pytest.mark.parametrize("version", ["2.10.0+cu128", "2.15.0+cu130", "3.0.0"])
def test_untested_torch_warns(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="spillover"):
        _torch._warn_if_untested(version)
    assert version in caplog.text


@pytest.mark.parametrize("version", ["2.11.0+cu128", "2.12.1", "2.14.1+cu130"])
def test_tested_torch_does_not_warn(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="spillover"):
        _torch._warn_if_untested(version)
    assert caplog.text == ""


def test_cuda_headers_are_complete() -> None:
    folders = _torch.cuda_include_folders("13.0")
    assert any((folder / "cuda_runtime_api.h").is_file() for folder in folders)
    assert any((folder / "crt" / "host_defines.h").is_file() for folder in folders)


def test_missing_cuda_headers_say_what_to_install() -> None:
    with pytest.raises(BuildError, match="nvidia-cuda-crt"):
        _torch.cuda_include_folders("99.0")


def test_lock_is_per_entry(cache: Path) -> None:
    with _cache._locked("one"), _cache._locked("two"):
        pass

"""The torch-bound parts: their sources, their flags and the key of their cache entry."""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spillover import _paths
from spillover._build import _cache, _compiler, _torch
from spillover._errors import BuildError
from spillover._settings import logger

Part = Literal["adapter", "emulator", "replay"]

_PARTS: tuple[Part, ...] = ("adapter", "emulator", "replay")
_COMPILE_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-Wall")
_LINK_FLAGS = ("-Wl,--no-as-needed",)


@dataclass(frozen=True)
class _Recipe:
    """How one part is made. Paths are relative to the folder of sources."""

    description: str
    file_name: str
    source_folder: tuple[str, ...]
    shared_headers: tuple[tuple[str, ...], ...]
    torch_libraries: tuple[str, ...]
    #: Libraries of ours, by folder and file name. They are loaded before the part is, so their
    #: SONAMEs are enough to find them and no search path is written into it.
    own_libraries: tuple[tuple[tuple[str, ...], str], ...]
    compile_flags: tuple[str, ...]
    is_python_module: bool


_RECIPES: dict[Part, _Recipe] = {
    "adapter": _Recipe(
        description="allocator for PyTorch",
        file_name="spillover_torch_adapter.so",
        source_folder=("torch_adapter",),
        shared_headers=(("allocator", "c_api.h"),),
        torch_libraries=("c10", "c10_cuda", "torch_cpu", "torch_cuda"),
        own_libraries=(((), "libspillover.so"),),
        compile_flags=("-fvisibility=hidden",),
        is_python_module=True,
    ),
    "emulator": _Recipe(
        description="emulated operators for PyTorch",
        file_name="libspillover_emulator_aten.so",
        source_folder=("emulator", "aten"),
        shared_headers=(
            ("emulator", "core", "c_api.h"),
            ("emulator", "core", "clock_api.h"),
            ("emulator", "core", "dry_api.h"),
        ),
        torch_libraries=("c10", "c10_cuda", "torch_cpu", "torch_cuda"),
        own_libraries=((("emulator",), "libcuda.so.1"),),
        compile_flags=(),
        is_python_module=False,
    ),
    "replay": _Recipe(
        description="trace recorder for PyTorch",
        file_name="libspillover_torch_replay.so",
        source_folder=("torch_replay",),
        shared_headers=(("replay", "c_api.h"), ("replay", "timed_threads.hpp")),
        torch_libraries=("c10", "c10_cuda"),
        own_libraries=(),
        compile_flags=(),
        is_python_module=False,
    ),
}


def build(part: Part) -> Path:
    """Path of a part compiled for the installed torch; compiles it on the first call.

    Blocks for about a minute the first time, and tells so in one line on stderr. Later calls,
    and other processes, find it in the cache.

    Raises
    ------
    BuildError
        There is no compiler, or it failed.
    ConfigError
        There is no CUDA build of torch, the cache folder is not private, or ``$CXX`` or
        ``$SPILLOVER_CACHE_DIR`` is malformed.
    """
    found = find(part)
    if found is not None:
        return found
    recipe = _RECIPES[part]
    facts = _torch.torch_facts()
    sources = _sources(recipe)
    compiler = _compiler.find_compiler()
    return _cache.find_or_build(
        _entry(part, facts, compiler),
        recipe.file_name,
        lambda folder: _compile(recipe, facts, compiler, sources, folder / recipe.file_name),
    )


def find(part: Part) -> Path | None:
    """Path of a part that was compiled before; None where ``build()`` would compile it.

    Raises as ``build()``.
    """
    recipe = _RECIPES[part]
    facts = _torch.torch_facts()
    _sources(recipe)
    try:
        compiler = _compiler.find_compiler()
    except BuildError:
        # What another compiler made earlier, perhaps while an image was built, serves as well.
        entry = _cache.entry_name(part, facts.version, _key(recipe, facts), "*")
        found = _cache.find(entry, recipe.file_name)
        if found is None:
            raise
        return found
    return _cache.find(_entry(part, facts, compiler), recipe.file_name)


def _entry(part: Part, facts: _torch.TorchFacts, compiler: _compiler.Compiler) -> str:
    key = _key(_RECIPES[part], facts)
    return _cache.entry_name(part, facts.version, key, _hash(*compiler.command, compiler.identity))


def build_all() -> list[Path]:
    """Compile every part that is not in the cache; raises as ``build()``."""
    return [build(part) for part in _PARTS]


def _source_folder(recipe: _Recipe) -> Path:
    return _paths.source_path(*recipe.source_folder)


def _sources(recipe: _Recipe) -> list[Path]:
    # The largest files first: they take longest.
    found = sorted(
        _source_folder(recipe).glob("*.cpp"), key=lambda path: (-path.stat().st_size, path.name)
    )
    if not found:
        raise BuildError(
            f"this installation of spillover has no sources in {_source_folder(recipe)}; "
            "reinstall it with 'pip install .'"
        )
    return found


def _compile_flags(recipe: _Recipe, facts: _torch.TorchFacts) -> list[str]:
    """The flags without folders: those differ between machines whose results are the same."""
    return [
        *_COMPILE_FLAGS,
        *recipe.compile_flags,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(facts.cxx11_abi)}",
    ]


def _include_flags(recipe: _Recipe, facts: _torch.TorchFacts) -> list[str]:
    system = [*facts.include_folders, *_torch.cuda_include_folders(facts.cuda_version)]
    if recipe.is_python_module:
        system.append(Path(sysconfig.get_paths()["include"]))
    flags = [f"-I{_paths.source_path()}"]
    for folder in system:
        flags += ["-isystem", str(folder)]
    return flags


def _link_flags(recipe: _Recipe, facts: _torch.TorchFacts) -> list[str]:
    flags = [*_LINK_FLAGS, f"-L{facts.library_folder}"]
    flags += [f"-l{name}" for name in recipe.torch_libraries]
    for folder, file_name in recipe.own_libraries:
        flags += [f"-L{_paths.library_path('').joinpath(*folder)}", f"-l:{file_name}"]
    # What torch's libraries need in their turn is resolved when they are loaded.
    return [*flags, "-Wl,--allow-shlib-undefined"]


def _key(recipe: _Recipe, facts: _torch.TorchFacts) -> str:
    """Hash of everything that the result depends on, save the compiler."""
    folder = _source_folder(recipe)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".cpp", ".hpp", ".h")]
    files += [_paths.source_path(*header) for header in recipe.shared_headers]
    texts = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    texts += _compile_flags(recipe, facts)
    texts += [*_LINK_FLAGS, facts.identity, platform.machine()]
    if recipe.is_python_module:
        texts.append(str(sysconfig.get_config_var("SOABI")))
    return _hash(*texts)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _compile(
    recipe: _Recipe,
    facts: _torch.TorchFacts,
    compiler: _compiler.Compiler,
    sources: list[Path],
    output: Path,
) -> None:
    message = (
        f"compiling its {recipe.description} {facts.version}, once (about a minute) "
        f"into {_cache.cache_folder()}"
    )
    logger.info(message)
    # Whoever waits for half a minute wants to know why, also where logging is not configured.
    print(f"spillover: {message} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        _compiler.compile_and_link(
            compiler,
            sources,
            output=output,
            compile_flags=[*_compile_flags(recipe, facts), *_include_flags(recipe, facts)],
            link_flags=_link_flags(recipe, facts),
        )
    except BuildError as error:
        raise BuildError(
            f"compiling Spillover's {recipe.description} {facts.version} failed. {error}"
        ) from error
    logger.info("compiled %s in %.0f s", output.name, time.monotonic() - started)

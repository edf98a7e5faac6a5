"""Calls functions right after torch is imported, so that importing spillover does not load it."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_lock = threading.Lock()
_callbacks: list[Callable[[], None]] = []


def after_torch_import(callback: Callable[[], None]) -> None:
    """Call ``callback`` once torch is imported: now, where it is already.

    Callbacks run in the order in which they were given, in the thread that imports torch. What one
    raises ends the import, and the next one tries again.
    """
    with _lock:
        if not _is_imported():
            if not _callbacks:
                # In front: a finder behind the one that finds torch would not be asked.
                sys.meta_path.insert(0, _finder)
            _callbacks.append(callback)
            return
    callback()


def _is_imported() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "cuda")


def _run_callbacks() -> None:
    with _lock:
        callbacks = list(_callbacks)
    for callback in callbacks:
        callback()
    with _lock:
        _callbacks.clear()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch as the other finders do, with a loader that runs the callbacks."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as another loader does, then runs the callbacks."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Afterwards nothing of ours is left on the module.
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _run_callbacks()


_finder = _Finder()

"""Checks calls of CUDA's functions one by one against NVIDIA's documentation.

A suite is a list of areas: functions that call each entry point rightly (``call("cuX", ...)``) and
wrongly (``call.fails(code, "cuX", ...)``). :meth:`Calls.check` then asks for every function of the
library to have been called both ways, and for every error to be one that the documentation of that
function names: the comments of CUDA's own headers are read for it. A call that fails must leave the
device as it was.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cuda_sources import cuda_headers
from driver_ctypes import SUCCESS, converted

#: One documentation comment with the declaration behind it.
_DOCUMENTED = re.compile(
    r"/\*\*(?!<)((?:(?!\*/).)*)\*/((?:(?!/\*)[^;{])*?)\b((?:cu|cuda)[A-Z]\w*)\s*\(", re.DOTALL
)
_ERROR_CODE = re.compile(r"^\s*(CUDA_ERROR_\w+|cudaError\w+)\s*=\s*(\d+)", re.MULTILINE)


@functools.cache
def documented_errors() -> dict[str, set[int]]:
    """The error codes that CUDA's headers name in each function's documentation."""
    folder = cuda_headers()
    names = ("cuda.h", "cuda_runtime_api.h", "driver_types.h")
    text = "\n".join((folder / name).read_text() for name in names)
    codes = {name: int(code) for name, code in _ERROR_CODE.findall(text)}
    found: defaultdict[str, set[int]] = defaultdict(set)
    for comment, _, function in _DOCUMENTED.findall(text):
        named = re.findall(r"::(CUDA_ERROR_\w+|cudaError\w+)", comment)
        found[function] |= {codes[name] for name in named if name in codes}
    return found


class Calls:
    """Calls of one library, with what is expected of them; all that went wrong is told at the end.

    Parameters
    ----------
    find
        The function with a name, to be called with ctypes' values.
    state
        What no failing call may change.
    after
        Called with each failing call's code, for what has to hold after it.
    """

    def __init__(
        self,
        find: Callable[[str], Callable[..., int]],
        *,
        state: Callable[[], object] = lambda: None,
        after: Callable[[int], object] = lambda code: None,
    ) -> None:
        self._find = find
        self._state = state
        self._after = after
        self._succeeded: set[str] = set()
        self._failed: defaultdict[str, set[int]] = defaultdict(set)
        self._wrong: list[str] = []

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function that has to succeed."""
        self._succeeded.add(name)
        self._expect(SUCCESS, name, arguments)

    def fails(self, code: int, name: str, *arguments: Any) -> None:
        """Call a function that has to fail with ``code`` and to change nothing."""
        self._failed[name].add(code)
        before = self._state()
        self._expect(code, name, arguments)
        self._after(code)
        if self._state() != before:
            self._note(f"{name} failed and changed {before} to {self._state()}")

    def _expect(self, code: int, name: str, arguments: tuple[Any, ...]) -> None:
        status = self._find(name)(*map(converted, arguments))
        if status != code:
            self._note(f"{name} returned {status}, not {code}")

    def _note(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ and frame.f_back is not None:
            frame = frame.f_back
        self._wrong.append(f"{frame.f_code.co_name}, line {frame.f_lineno}: {what}")

    def check(
        self,
        functions: Collection[str],
        *,
        cannot_fail: Collection[str] = (),
        cannot_succeed: Collection[str] = (),
        undocumented: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        """Fail with all that was wrong, and with every function that was not called both ways."""
        wrong = list(self._wrong)
        allowed = undocumented or {}
        for name in sorted(set(functions) - self._succeeded - set(cannot_succeed)):
            wrong.append(f"{name} was never called with valid arguments")
        for name in sorted(set(functions) - set(self._failed) - set(cannot_fail)):
            wrong.append(f"{name} was never called with invalid arguments")
        for name, codes in sorted(self._failed.items()):
            known = documented_errors().get(name, set()) | set(allowed.get(name, ()))
            for code in sorted(codes - known):
                wrong.append(f"{name}: its documentation does not name the error {code}")
        assert not wrong, "\n".join(wrong)

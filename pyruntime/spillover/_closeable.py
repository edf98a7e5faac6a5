"""What a ``with`` block closes.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, TypeVar


class _HasClose(Protocol):
    def close(self) -> None: ...


_Self = TypeVar("_Self")


class Closeable:
    """Base of what has a ``close()``: the end of a ``with`` block calls it, however it ends."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self: _HasClose,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

"""What was added and can be taken away again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

_Self = TypeVar("_Self", bound="Handle")


class Handle(ABC):
    """:meth:`remove`, or the end of a ``with`` block, takes it away."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    @abstractmethod
    def remove(self) -> None:
        """Take it away; further calls do nothing."""

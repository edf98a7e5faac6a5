"""Which gradients a step has used, so that one that is repeated after a failure uses none twice.

A gradient is known by identity and version: another backward, clipping or an assignment makes it
another one. Gradients are not held.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Position:
    """How many elements of a parameter had been updated, and with which gradient."""

    gradient: weakref.ref[torch.Tensor]
    version: int
    done: int


def position_of(parameter: torch.Tensor, done: int) -> Position | None:
    """With the gradient that ``parameter`` has now; None where it has none."""
    gradient = parameter.grad
    if gradient is None:
        return None
    return Position(weakref.ref(gradient), gradient._version, done)


class Progress:
    """How far a step that has not come to its end came with each gradient."""

    def __init__(self) -> None:
        self._positions: dict[int, Position] = {}
        #: Whether the step has come to its end after all, so that repeating it does nothing.
        self.is_whole = False

    def done(self, parameter: torch.Tensor) -> int:
        """Elements of ``parameter`` that have been updated with the gradient that it has now."""
        position, gradient = self._positions.get(id(parameter)), parameter.grad
        if position is None or gradient is None or position.gradient() is not gradient:
            return 0
        return position.done if position.version == gradient._version else 0

    def is_done(self, parameter: torch.Tensor) -> bool:
        """Whether all of it has been."""
        return self.done(parameter) == parameter.numel() > 0

    def remember(self, parameter: torch.Tensor, done: int) -> None:
        """So many elements have been updated with the gradient that it has now."""
        position = position_of(parameter, done)
        if position is not None:
            self._positions[id(parameter)] = position
            self.is_whole = False

    def remember_all(self, positions: Mapping[int, Position]) -> None:
        """Of a step that failed and was finished: positions by the identities of parameters."""
        self._positions.update(positions)
        self.is_whole = True

    def __len__(self) -> int:
        return len(self._positions)

    def clear(self) -> None:
        """After a step that came to its end."""
        self._positions.clear()
        self.is_whole = False

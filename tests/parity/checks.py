"""What a check of the parity table is: a function that fails where torch's does not work.

A check runs in a process whose torch has one of the allocators (``column.py``), asserts what a user
of torch's function relies on, and leaves no live tensor behind. The text of its assertions is what
the table says after ``no:``. It asserts nothing that torch leaves open, such as sizes of segments.
"""

from __future__ import annotations

from collections.abc import Callable

MIB = 1 << 20

Check = Callable[[], None]

#: Every check by the names of the torch functions it covers, in the table's order.
CHECKS: dict[str, Check] = {}


class NotApplicableError(Exception):
    """The function has nothing to do in this column; the text says why."""


def check(name: str) -> Callable[[Check], Check]:
    """Make a function the check of torch's function ``name``."""

    def register(function: Check) -> Check:
        assert name not in CHECKS, f"two checks of {name}"
        CHECKS[name] = function
        return function

    return register


def check_each(names: dict[str, Callable[[], object]]) -> Callable[[Callable[..., None]], None]:
    """Make a function that takes torch's function the check of each of several alike ones."""

    def register(function: Callable[..., None]) -> None:
        for name, target in names.items():
            check(name)(lambda target=target: function(target))

    return register

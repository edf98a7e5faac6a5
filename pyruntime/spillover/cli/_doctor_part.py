"""What ``spillover doctor`` says of one part of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Fact = str | int | float | bool | None
State = Literal["works", "limited", "missing", "fails"]


@dataclass(frozen=True)
class Part:
    """One row.

    ``limited``: it works, not at its best. ``missing``: nothing needs it, or something else stands
    in for it. ``facts`` are for programs, sizes in bytes.
    """

    name: str
    state: State
    detail: str
    facts: dict[str, Fact] = field(default_factory=dict)

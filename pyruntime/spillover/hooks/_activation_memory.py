"""What memory the program itself needs in a training step; see Note [Measured budget]."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Measured:
    """Other memory in rounds of one kind: the most of what was seen, in bytes."""

    rounds: int = 0
    base: int = 0  # When they began.
    forward: int = 0
    growth: int = 0  # Of all that is allocated, between two looks in forward.
    backward: list[int] = field(default_factory=list)  # By how many tensors it had.
    passing: int = 0  # Between two looks in backward.

    def add(self, latest: Measured) -> None:
        """Take a round more in."""
        self.rounds += 1
        self.base = max(self.base, latest.base)
        self.forward = max(self.forward, latest.forward)
        self.passing = max(self.passing, latest.passing)
        self.growth = max(self.growth, latest.growth)
        if len(self.backward) == len(latest.backward):
            self.backward = list(map(max, self.backward, latest.backward))
        else:
            most = max(*self.backward, *latest.backward, 0)
            self.backward = [most] * len(latest.backward) if self.backward else latest.backward

"""Remembers in which order blocks run, so that the next one can be fetched ahead.

Forward in training, forward in inference and backward are learned apart. A wrong prediction costs
time only. Used by the thread that uses the WeightStreamer.
"""

from __future__ import annotations

from itertools import pairwise

from spillover.hooks._parameters_block import StreamedBlock

_FORWARD = ("train", "infer")


class BlockOrder:
    """For each block the one that came after it last time; at first the model's own order."""

    def __init__(self, blocks: list[StreamedBlock]) -> None:
        ahead = dict(pairwise(blocks))
        back = dict(pairwise(reversed(blocks)))
        self._next: dict[str, dict[StreamedBlock, StreamedBlock]] = {
            "train": dict(ahead),
            "infer": dict(ahead),
            "backward": back,
        }
        self._previous: dict[str, StreamedBlock | None] = dict.fromkeys(self._next)
        self._pass_open = False
        self.first = blocks[0] if blocks else None

    def new_pass(self) -> None:
        """A forward of the whole model begins."""
        for table in _FORWARD:
            self._previous[table] = None
        self._pass_open = True

    def backward_ended(self) -> None:
        """The next block of a backward follows no other."""
        self._previous["backward"] = None

    def entered(self, block: StreamedBlock, table: str) -> None:
        """``block`` is used now."""
        if self._pass_open and table in _FORWARD:
            self.first = block
            self._pass_open = False
        previous = self._previous[table]
        if previous is not None and previous is not block:
            self._next[table][previous] = block
        self._previous[table] = block

    def following(self, block: StreamedBlock, table: str, count: int) -> list[StreamedBlock]:
        """Up to ``count`` blocks expected after ``block``, nearest first."""
        result: list[StreamedBlock] = []
        while len(result) < count:
            following = self._next[table].get(block)
            if following is None or following is block or following in result:
                break
            result.append(following)
            block = following
        return result

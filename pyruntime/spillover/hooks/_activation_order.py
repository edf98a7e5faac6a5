"""The order in which backward asks for saved tensors, and what is on the device for it.

Backward asks roughly in the reverse order of packing. Within one node it may ask in any order, so a
few positions *above* the present one count as still to come until they were served.

An instance belongs to one engine and is guarded by the transfers' lock.
"""

from __future__ import annotations

import weakref

import torch

from spillover.hooks._saved_storage import SavedCopy, SavedView

# Tensors that one node saves, at most; more cost a reload that is not hidden, nothing else.
_NODE_VIEWS_MAX = 16
# What one look ahead steps over and picks at most, to bound its cost: positions whose tensors are
# gone already or were served, and copies.
_STEPS_MAX = 256
_COPIES_MAX = 64


class BackwardOrder:
    """Positions of saved views, and the copies that were brought back."""

    def __init__(self) -> None:
        self._sequence: list[weakref.ref[SavedView]] = []  # In the order of packing.
        self._resident: list[weakref.ref[SavedCopy]] = []  # May have dropped their bytes since.
        self._last_position = 0
        # One backward over the graph; with retain_graph there can be several.
        self._pass = 1

    def next_position(self) -> int:
        """Position for a view that is about to be added; those of graphs that died are reused."""
        while self._sequence and self._sequence[-1]() is None:
            self._sequence.pop()
        return len(self._sequence)

    def add(self, view: SavedView) -> None:
        """Note a view that has ``next_position()``."""
        reference = weakref.ref(view)
        self._sequence.append(reference)
        view.copy.views.append(reference)

    def serve(self, view: SavedView) -> None:
        """Note that backward has this view now."""
        if view.position > self._last_position + _NODE_VIEWS_MAX:
            self._pass += 1
        self._last_position = view.position
        view.served_in = self._pass

    def came_back(self, copy: SavedCopy) -> None:
        """Note that the bytes of ``copy`` are on the device again."""
        self._resident = [ref for ref in self._resident if _has_bytes(ref())]
        self._resident.append(weakref.ref(copy))

    def upcoming(self, position: int, budget_bytes: int) -> list[SavedCopy]:
        """Copies that backward needs next, nearest first, as far as the byte budget reaches."""
        soon: dict[int, SavedCopy] = {}
        if budget_bytes == 0:
            return []  # Any other budget reaches for the first one.
        start = min(position + _NODE_VIEWS_MAX, len(self._sequence) - 1)
        for index in range(start, max(start - _STEPS_MAX, -1), -1):
            view = self._sequence[index]()
            if view is None or view.served_in == self._pass or id(view.copy) in soon:
                continue
            budget_bytes -= view.copy.extent.size_bytes
            if (budget_bytes < 0 and soon) or len(soon) == _COPIES_MAX:
                break
            soon[id(view.copy)] = view.copy
        return list(soon.values())

    def _next_use(self, copy: SavedCopy, position: int) -> int:
        """Position of the view of ``copy`` that comes next; -1 when none does."""
        copy.views = [ref for ref in copy.views if ref() is not None]
        limit = position + _NODE_VIEWS_MAX
        uses = [
            view.position
            for view in (ref() for ref in copy.views)
            if view is not None and view.served_in != self._pass and view.position <= limit
        ]
        return max(uses, default=-1)

    def _present(self, device: torch.device | None) -> list[SavedCopy]:
        """Copies that came back to the device, or to any."""
        copies = (reference() for reference in self._resident)
        return [
            copy
            for copy in copies
            if copy is not None and copy.flat is not None and device in (None, copy.device)
        ]

    def resident_bytes(self, device: torch.device | None = None) -> int:
        """Bytes on the device, or on any, of copies that came back."""
        return sum(copy.extent.size_bytes for copy in self._present(device))

    def drop_all(self, *, but: SavedCopy | None = None, device: torch.device | None = None) -> None:
        """Drop from the device whatever came back, except for one; it can come back again."""
        for copy in self._present(device):
            if copy is not but:
                copy.drop_flat()

    def evict(self, position: int, soon: list[SavedCopy], budget_bytes: int) -> None:
        """Drop from the device what is not needed again, or not soon and beyond the budget."""
        held: list[tuple[int, SavedCopy]] = []
        needed = {id(copy) for copy in soon}
        for reference in self._resident:
            copy = reference()
            if copy is None or copy.flat is None or id(copy) in needed:
                continue
            use = self._next_use(copy, position)
            if use < 0:
                copy.drop_flat()
            else:
                held.append((use, copy))
        held.sort(key=lambda item: item[0], reverse=True)
        total_bytes = 0
        for _, copy in held:
            total_bytes += copy.extent.size_bytes
            if total_bytes > budget_bytes:
                copy.drop_flat()


def _has_bytes(copy: SavedCopy | None) -> bool:
    return copy is not None and copy.flat is not None

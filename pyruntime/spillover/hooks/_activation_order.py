"""The order of a training step's saved tensors, learnt from steps before, and what it tells.

A *round* is one forward and its backward. What was saved has a number in it, its index; a round
that is over leaves a *plan*: which sizes were saved, and in which order backward asked for them. A
round that begins as an earlier one did follows that one's plan until it deviates: from then on
backward is expected to ask in the reverse order of saving. Within one node it may ask in any order,
so that a few indices *above* the present one count as still to come until they were served.

All of it belongs to one engine and is guarded by the activations' lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import accumulate

from spillover.hooks._activation_memory import Measured
from spillover.hooks._saved_storage import SavedCopy, SavedView

#: Tensors that one node saves, at most; more cost a reload that is not hidden, nothing else.
_NODE_VIEWS_MAX = 16
#: What one look ahead steps over at most, to bound its cost.
_STEPS_MAX = 256
#: Of so many saved tensors, or twice that, it is seen whether a graph is gone.
_SAMPLES = 16
#: Beyond so many views a round ends as soon as nearly all of them are gone, so that it does not
#: grow for ever where one of them stays.
_VIEWS_MANY = 1 << 12
#: Different steps that are remembered: a training loop may have several kinds in turn.
_PLANS_MAX = 8
#: Next uses of a round are below those of the next.
_ROUND_USES = 1 << 32


class Plan:
    """What one round did.

    Attributes
    ----------
    sizes
        By index: bytes that began with it, 0 for an alias of what was there.
    rank
        By index: when backward asked for it first, counted from 0.
    order
        The indices by rank.
    measured
        The memory of rounds that did this.
    """

    def __init__(self, sizes: list[int], owners: list[int], served: list[int]) -> None:
        self.sizes = sizes
        self.measured = Measured()
        self._owners = owners
        count = len(sizes)
        known = set(served)
        # What nobody asked for comes last, the first saved at the very end.
        self.order = served + [index for index in range(count - 1, -1, -1) if index not in known]
        self.rank = [0] * count
        for place, index in enumerate(self.order):
            self.rank[index] = place
        # A copy is wanted when the first of its views is.
        self._copy_ranks = list(self.rank)
        for index, owner in enumerate(owners):
            self._copy_ranks[owner] = min(self._copy_ranks[owner], self.rank[index])
        #: Bytes of copies by rank of their first use, and the bytes up to each rank.
        self.bytes_by_rank = [0] * count
        for index, size_bytes in enumerate(sizes):
            self.bytes_by_rank[self._copy_ranks[index]] += size_bytes
        self.bytes_up_to = list(accumulate(self.bytes_by_rank))

    @property
    def total_bytes(self) -> int:
        """Bytes of all copies."""
        return self.bytes_up_to[-1] if self.bytes_up_to else 0

    def copy_rank(self, index: int) -> int:
        """When the copy that began at ``index`` is asked for first."""
        return self._copy_ranks[index]

    def ranks_within(self, size_bytes: int) -> int:
        """How many ranks, from the first, need no more than so many bytes."""
        low, high = 0, len(self.bytes_up_to)
        while low < high:
            middle = (low + high) // 2
            if self.bytes_up_to[middle] <= size_bytes:
                low = middle + 1
            else:
                high = middle
        return low


class Round:
    """One forward and its backward, while its tensors live."""

    __slots__ = (
        "_last",
        "_many",
        "_tail",
        "ahead",
        "base",
        "owners",
        "plan",
        "served",
        "sizes",
        "stays",
        "turn",
        "views",
    )

    def __init__(self, number: int) -> None:
        self.base = number * _ROUND_USES
        self.plan: Plan | None = None
        #: Ranks below it stay on the device, where there is a plan.
        self.stays = 0
        self.views: list[weakref.ref[SavedView]] = []
        self.sizes: list[int] = []
        self.owners: list[int] = []
        self.served: list[int] = []  # In the order of the first asking.
        self.turn = 1  # Of backward: with retain_graph there can be several.
        self._last = 0
        self._tail = 0
        self._many = _VIEWS_MANY
        #: Places before it were looked at in this turn, see :meth:`upcoming`.
        self.ahead = 0

    def is_over(self) -> bool:
        """Whether backward asked for something, and what was saved is gone: all of it, or nearly
        all of very much.
        """
        if not self.served:
            return False
        while self._tail > 0 and self.views[self._tail - 1]() is None:
            self._tail -= 1
        if self._tail > 0 and len(self.views) > self._many:
            self._many = 2 * len(self.views)
            return sum(reference() is not None for reference in self._sample()) <= 1
        return self._tail == 0

    def _sample(self) -> list[weakref.ref[SavedView]]:
        return self.views[:: max(1, len(self.views) // _SAMPLES)]

    def has_ended(self) -> bool:
        """Whether backward asked for something, or half of what was saved is gone without that."""
        if self.served:
            return True
        sample = self._sample()
        dead = sum(reference() is None for reference in sample)
        return 0 < len(sample) <= 2 * dead

    def add(self, view: SavedView, size_bytes: int) -> None:
        """Note what is saved; 0 bytes for an alias of a copy that is there."""
        index = view.index = len(self.views)
        reference = weakref.ref(view)
        self.views.append(reference)
        self._tail = index + 1
        copy = view.copy
        self.sizes.append(size_bytes)
        self.owners.append(index if size_bytes else self._owner(copy, index))
        copy.add_view(reference)

    def _owner(self, copy: SavedCopy, index: int) -> int:
        for view in copy.views():
            if view.round is self:
                return view.index
        return index

    def _place(self, view: SavedView) -> int:
        """Grows as backward goes on, if it goes as expected."""
        return -view.index if self.plan is None else self.plan.rank[view.index]

    def serve(self, view: SavedView) -> None:
        """Note that backward has this view now."""
        place = self._place(view)
        if place < self._last - _NODE_VIEWS_MAX:
            self.turn += 1
            self.ahead = 0
        self._last = place
        if view.served_in == 0:
            self.served.append(view.index)
        view.served_in = self.turn

    def is_wanted(self, copy: SavedCopy) -> bool:
        """Whether this turn of backward is still to ask for ``copy``."""
        for view in copy.views():
            if view.round is not self or view.served_in == self.turn:
                continue
            if self.plan is not None or view.index <= _NODE_VIEWS_MAX - self._last:
                return True
        return False

    def upcoming(self, view: SavedView) -> Iterator[SavedCopy]:
        """Copies that backward asks for next, nearest first; each may come several times.

        Goes on where the last call's iteration was stopped: the copy at which it was is the next
        one's first. :meth:`look_again` makes it begin at ``view``.
        """
        views, turn, plan = self.views, self.turn, self.plan
        count = len(views)
        if plan is not None:
            order = plan.order
            first = max(plan.rank[view.index] + 1, self.ahead)
            last = min(len(order), first + _STEPS_MAX)
        else:
            # Places count from the last that was saved.
            first = max(count - 1 - view.index - _NODE_VIEWS_MAX, self.ahead)
            last = min(count, first + _STEPS_MAX)
        for place in range(first, last):
            self.ahead = place
            index = order[place] if plan is not None else count - 1 - place
            if index < count:  # A plan may know more than was saved so far.
                found = views[index]()
                if found is not None and found.served_in != turn:
                    yield found.copy
        self.ahead = max(last, self.ahead)

    def look_again(self) -> None:
        """Copies that had been brought were dropped, so that they are upcoming again."""
        self.ahead = 0


class Plans:
    """The plans of rounds before; those that were of use last come first."""

    def __init__(self) -> None:
        self._plans: list[Plan] = []

    def learn(self, round_: Round) -> Plan | None:
        """The plan of a round that is over; None where backward asked for nothing."""
        if not round_.served:
            return None
        plan = Plan(round_.sizes, round_.owners, round_.served)
        for each in self._plans:
            if each.sizes == plan.sizes:
                plan.measured = each.measured
        self._plans = [each for each in self._plans if each.sizes != plan.sizes][: _PLANS_MAX - 1]
        self._plans.insert(0, plan)
        return plan

    def find(self, sizes: list[int]) -> Plan | None:
        """The latest plan that begins with ``sizes``."""
        count = len(sizes)
        for plan in self._plans:
            if plan.sizes[:count] == sizes:
                return plan
        return None

"""How much of a step's saved tensors may be on the device.

Note [Measured budget]
----------------------
What the program itself needs, *other* memory, is what is allocated less what of saved tensors is on
the device in our care. It is measured at each save and each reload of the first rounds of a kind (a
round is one forward and its backward), in which all that is saved leaves: in forward its maximum,
in backward by how far that has come, since what backward uses up makes room for the gradients that
it makes. Between two looks more may have been allocated and freed. Our allocator tells the most
that was; torch's own tells its peak since the program began, so that what passed where that rose is
taken to pass everywhere, as elsewhere it would not have shown.

From then on the tensors that backward asks for first stay on the device, as many as leave room for
other memory at each point of backward; the rest leaves as soon as it is saved, and is brought back
as early as there is room. If all fits, nothing leaves. A round that begins with more memory in use
than any before, as when the optimizer has made its state, gets so much less, and measures again.
One that saves other sizes than any before is measured like the first. The prediction may fail: with
Spillover's allocator an allocation that would fail then takes from what stays (``_reclaim``), and
the budget shrinks; torch's own allocator asks nobody, so that a larger part is left free there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from spillover import allocator
from spillover.allocator import _pool
from spillover.hooks._activation_memory import Measured
from spillover.hooks._activation_order import Plan

#: Default budgets; a small device gets less, since they are what offloading itself costs there.
_PREFETCH_BYTES = 128 << 20
_IN_FLIGHT_BYTES = 256 << 20
_DEVICE_SHARE = 16
#: Rounds of a kind that are measured before their figures are used.
_ROUNDS_MEASURED = 2
#: One part in so many of the device is left free: with our allocator, and with torch's own, which
#: fragments; there, so many times the largest saved tensor besides.
_FREE_SHARE = 64
_FREE_SHARE_NATIVE = 12
_FREE_TENSORS_NATIVE = 4
#: By one part in so many of the device the budget shrinks in a round, at most.
_GIVEN_SHARE = 16


class DeviceBudget:
    """Budgets in bytes of one engine on one device; guarded by the activations' lock.

    Parameters
    ----------
    device
        The device.
    keep, in_flight, prefetch
        What the user asked for; None: measured for ``keep``, and what that leaves for the others.
    """

    def __init__(
        self, device: torch.device, *, keep: int | None, in_flight: int | None, prefetch: int | None
    ) -> None:
        share = memory_bytes(device) // _DEVICE_SHARE
        self._device = device
        self._keep = keep
        self._in_flight, self._prefetch = in_flight, prefetch
        self._least_in_flight = min(_IN_FLIGHT_BYTES, share) if in_flight is None else in_flight
        self._least_prefetch = min(_PREFETCH_BYTES, share) if prefetch is None else prefetch
        self._given_back = self._given_back_before = 0
        # Of the present round.
        self._latest: Measured | None = None  # While it is measured.
        self._last_peak = self._last_saved = self._last_other = self._last_allocated = 0
        self._unseen_peak = 0  # Of intervals that `look` has not seen.
        self._measured: Measured | None = None  # Of its kind, where enough is known.
        self._usable = 0
        #: What of the round may stay on the device.
        self.keep_bytes = keep or 0

    def end_round(self, plan: Plan | None) -> None:
        """The round before is over; ``plan``: what it did, if that is known."""
        latest, self._latest = self._latest, None
        if latest is not None and plan is not None and latest.backward:
            plan.measured.add(latest)

    def begin_round(self, saved_bytes: int, plan: Plan | None) -> None:
        """To be called before the first save of a round.

        ``saved_bytes``: of saved tensors on the device, as in :meth:`look`; ``plan``: the round's,
        if one is known.
        """
        if self._keep is not None:
            return
        self._measured, self.keep_bytes = None, 0
        figures = self._figures()
        if figures is None:
            return  # Nothing stays, as nobody knows how much could.
        allocated, reserved, self._last_peak = figures
        self._last_allocated, self._unseen_peak = allocated, 0
        base = self._last_other = allocated - saved_bytes
        self._last_saved = saved_bytes
        # If nobody asks again, the budget comes back.
        self._given_back -= self._given_back // _GIVEN_SHARE
        self._given_back_before = self._given_back
        known = None if plan is None else plan.measured
        grown = 0 if known is None else max(0, base - known.base)
        if plan is None or known is None or known.rounds < _ROUNDS_MEASURED or grown > 0:
            self._latest = Measured(base=base)
        if plan is None or known is None or known.rounds < _ROUNDS_MEASURED:
            return
        self._measured = known
        self._usable = self._most_usable(reserved, plan) - grown - self._given_back
        self.keep_bytes = self._most_that_stays(known, plan)

    def lose_plan(self, saved_bytes: int) -> None:
        """The present round does what none before did: it is measured, and nothing more stays."""
        if self._keep is None:
            self._measured, self.keep_bytes = None, 0
            if self._latest is None and (figures := self._figures()) is not None:
                self._latest = Measured(base=figures[0] - saved_bytes)
                self._last_allocated, _, self._last_peak = figures
                self._unseen_peak = 0
                self._last_saved, self._last_other = saved_bytes, self._latest.base

    def _most_that_stays(self, known: Measured, plan: Plan) -> int:
        room = self._usable - known.forward
        used = plan.bytes_up_to
        fits_plan = len(used) == len(known.backward)
        for place, other in enumerate(known.backward):
            gone = used[place - 1] if fits_plan and place > 0 else 0
            room = min(room, self._usable - other - known.passing + gone)
        return max(0, room)

    def _most_usable(self, reserved_bytes: int, plan: Plan) -> int:
        """What the allocator could give out in all, less what is left free."""
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        most = min(memory_bytes(self._device), free_bytes + reserved_bytes)
        if allocator.is_installed():
            return int(most - most // _FREE_SHARE)
        return int(most - most // _FREE_SHARE_NATIVE - _FREE_TENSORS_NATIVE * max(plan.sizes))

    # ---- measuring ----

    @property
    def is_measuring(self) -> bool:
        """Whether :meth:`look` is to be called."""
        return self._latest is not None

    def look(self, saved_bytes: int, place: int | None) -> None:
        """Measure; ``place``: how many tensors backward had so far, None in forward.

        ``saved_bytes``: of saved tensors on the device that wait for backward, or leave it.
        """
        latest, figures = self._latest, self._figures()
        if latest is None or figures is None:
            return
        allocated, _, peak = figures
        peak, self._unseen_peak = max(peak, self._unseen_peak), 0
        other = allocated - saved_bytes
        passing = 0
        if peak != self._last_peak or _has_intervals():
            at_peak = peak - min(saved_bytes, self._last_saved)
            passing = max(0, at_peak - max(other, self._last_other))
        self._last_peak, self._last_saved, self._last_other = peak, saved_bytes, other
        grown, self._last_allocated = peak - self._last_allocated, allocated
        if place is None:
            latest.forward = max(latest.forward, other + passing)
            latest.growth = max(latest.growth, grown)
            return
        if _has_intervals():
            other += passing
        else:
            latest.passing = max(latest.passing, passing)
        if len(latest.backward) <= place:
            latest.backward.extend([other] * (place + 1 - len(latest.backward)))
        latest.backward[place] = max(latest.backward[place], other)

    def _figures(self) -> tuple[int, int, int] | None:
        """Bytes allocated, bytes reserved, and the peak of the former: since it was asked last,
        with our allocator.
        """
        if _has_intervals():
            return _pool.take_interval(self._device.index)
        try:
            stats = torch._C._cuda_memoryStats(self._device.index)
        except (AttributeError, RuntimeError):
            return None
        allocated = stats["allocated_bytes"]["all"]
        reserved = stats["reserved_bytes"]["all"]["current"]
        return int(allocated["current"]), int(reserved), int(allocated["peak"])

    # ---- limits ----

    def excess_in_forward(self, waiting_bytes: int, leaving_bytes: int, more_bytes: int) -> int:
        """How much has to leave the device before ``more_bytes`` do, which start to leave now."""
        leaving = leaving_bytes + more_bytes
        limit = self._least_in_flight
        if self._measured is None or leaving <= limit:
            return leaving - limit
        excess = 0 if self._in_flight is None else leaving - self._in_flight
        figures = self._figures() if _has_intervals() else None
        if figures is None:
            room = self._usable - self._measured.forward - waiting_bytes
            return max(excess, leaving - max(room, limit))
        # What leaves and is of use still needs no memory of its own.
        allocated, _, peak = figures
        self._unseen_peak = max(self._unseen_peak, peak)
        return max(excess, min(allocated + self._measured.growth - self._usable, leaving - limit))

    def room_in_backward(
        self, waiting_bytes: int, kept_bytes: int, leaving_bytes: int, place: int, plan: Plan | None
    ) -> Callable[[int], int]:
        """How much may be brought back when backward had ``place`` tensors: by how much of it
        backward has, before it asks for the last of it.

        ``waiting_bytes``: on the device by now; ``kept_bytes``: of them, those that never left.
        """
        ahead = waiting_bytes - kept_bytes + leaving_bytes
        if self._measured is None or plan is None:
            least = self._least_prefetch - ahead
            return lambda until: least
        most = self._usable if self._prefetch is None else self._prefetch - ahead
        room = _Room(
            self._usable - waiting_bytes - leaving_bytes, self._measured, plan.bytes_up_to, place
        )
        return lambda until: min(most, room.until(until))

    @property
    def is_known(self) -> bool:
        """Whether the present round's memory is known."""
        return self._measured is not None

    @property
    def least_in_flight(self) -> int:
        """What may be on its way out in any case."""
        return self._least_in_flight

    @property
    def least_prefetch(self) -> int:
        """What may come ahead of its use in any case."""
        return self._least_prefetch

    def give_back(self, size_bytes: int) -> None:
        """Somebody had to be given so much: the budget was too large."""
        if self._measured is not None:
            most = self._given_back_before + self._usable // _GIVEN_SHARE
            self._given_back = min(self._given_back + size_bytes, most)

    def ran_out(self) -> None:
        """The program had no memory: a quarter of what there was less from now on."""
        if self._measured is not None:
            self._given_back += self._usable // 4

    def shrink_prefetch(self, held_bytes: int) -> None:
        """No memory for what came ahead, where ``held_bytes`` had come: half of it from now on."""
        self._least_prefetch = min(self._least_prefetch, held_bytes) // 2
        self.give_back(held_bytes // 2)


class _Room:
    """Room at each point of backward from ``place`` on, until which what waits is used up."""

    def __init__(self, now_bytes: int, measured: Measured, used: list[int], place: int) -> None:
        self._now = now_bytes - measured.passing
        self._others = measured.backward
        self._used = used
        self._used_before = used[place - 1] if 0 < place <= len(used) else 0
        self._next = place
        self._least = now_bytes

    def until(self, place: int) -> int:
        """The least, from where it began to ``place``."""
        for at in range(self._next, min(place + 1, len(self._others))):
            gone = self._used[min(at, len(self._used)) - 1] - self._used_before if at > 0 else 0
            self._least = min(self._least, self._now - self._others[at] + max(gone, 0))
        self._next = max(self._next, place + 1)
        return self._least


def memory_bytes(device: torch.device) -> int:
    """Device memory that this process may use."""
    total = int(torch.cuda.get_device_properties(device).total_memory)
    fraction = 1.0
    with contextlib.suppress(AttributeError, RuntimeError):  # Old torch; a pluggable allocator.
        fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(total * min(fraction, 1.0)) if fraction > 0 else total


def _has_intervals() -> bool:
    return allocator.is_installed()

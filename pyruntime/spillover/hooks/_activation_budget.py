"""How much of a step's saved tensors may be on the device.

Note [Measured budget]
----------------------
What the program itself needs, *other* memory, is what is allocated less what waits for backward in
our care. It is measured at each save and each reload of the first rounds (a round is one forward
and its backward), in which all that is saved leaves: in forward its maximum, in backward by how far
that has come, since what backward uses up makes room for the gradients that it makes. Between two
looks more may have been allocated and freed: what passed so where the allocator's peak rose is
taken to pass everywhere, as elsewhere it would not have shown.

From then on the tensors that backward asks for first stay on the device, as many as leave room for
other memory at each point of backward; the rest leaves as soon as it is saved, and is brought back
as early as there is room. If all fits, nothing leaves. A round that begins with more memory in use
than any before, as when the optimizer has made its state, gets so much less, and measures again.
The prediction may fail: with Spillover's allocator an allocation that would fail then takes from
what stays (``_reclaim``), and the budget shrinks; torch's own allocator asks nobody, so that a
larger part is left free there.
"""

from __future__ import annotations

import contextlib

import torch

from spillover import allocator
from spillover.hooks._activation_order import Plan

#: Default budgets; a small device gets less, since they are what offloading itself costs there.
_PREFETCH_BYTES = 128 << 20
_IN_FLIGHT_BYTES = 256 << 20
_DEVICE_SHARE = 16
#: Rounds that are measured before their figures are used.
_ROUNDS_MEASURED = 2
#: How far around a point of backward its memory is looked at.
_AHEAD = 64
#: One part in so many of the device is left free: with our allocator, and with torch's own, which
#: fragments.
_FREE_SHARE = 64
_FREE_SHARE_NATIVE = 12
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
        self._is_measuring = False
        self._rounds_measured = 0
        self._last_peak = -1
        self._last_waiting = self._last_other = 0
        # Of the round that is measured, and the greatest so far.
        self._forward_other = self._forward_other_max = 0
        self._backward_other: list[int] = []
        self._backward_other_max: list[int] = []
        self._passing_max = 0  # The most between two looks in backward.
        self._base_max = 0
        self._given_back = self._given_back_before = 0
        # For the present round; None: nothing is known yet.
        self._usable: int | None = None
        #: What of a round may stay on the device.
        self.keep_bytes = keep or 0

    def begin_round(self, waiting_bytes: int, plan: Plan | None) -> None:
        """To be called before the first save of a round.

        ``waiting_bytes``: of saved tensors that are on the device; ``plan``: the round's, if known.
        """
        if self._keep is not None:
            return
        self._end_measuring()
        figures = _figures(self._device)
        if figures is None:
            return  # Nothing stays, as nobody knows how much could.
        allocated, reserved, peak = figures
        base = allocated - waiting_bytes
        grown = max(0, base - self._base_max)
        is_known = self._rounds_measured >= _ROUNDS_MEASURED
        self._is_measuring = not is_known or grown > 0
        self._last_peak, self._last_waiting, self._last_other = peak, waiting_bytes, base
        # If nobody asks again, the budget comes back.
        self._given_back -= self._given_back // _GIVEN_SHARE
        self._given_back_before = self._given_back
        if is_known:
            self._usable = _usable(self._device, reserved) - grown - self._given_back
            self.keep_bytes = self._most_that_stays(self._usable, plan)
        self._base_max = max(self._base_max, base)

    def _most_that_stays(self, usable: int, plan: Plan | None) -> int:
        room = usable - self._forward_other_max
        used = plan.bytes_up_to if plan is not None else []
        fits_plan = len(used) == len(self._backward_other_max)
        for place, other in enumerate(self._backward_other_max):
            gone = used[place - 1] if fits_plan and place > 0 else 0
            room = min(room, usable - other - self._passing_max + gone)
        return max(0, room)

    # ---- measuring ----

    def look(self, waiting_bytes: int, place: int | None) -> None:
        """Measure, in rounds that are; ``place``: what backward had so far, None in forward."""
        if not self._is_measuring:
            return
        figures = _figures(self._device)
        if figures is None:
            return
        allocated, _, peak = figures
        other = allocated - waiting_bytes
        passing = 0
        if peak != self._last_peak:
            at_peak = peak - min(waiting_bytes, self._last_waiting)
            passing = max(0, at_peak - max(other, self._last_other))
        self._last_peak, self._last_waiting, self._last_other = peak, waiting_bytes, other
        if place is None:
            self._forward_other = max(self._forward_other, other + passing)
            return
        self._passing_max = max(self._passing_max, passing)
        if len(self._backward_other) <= place:
            missing = place + 1 - len(self._backward_other)
            self._backward_other.extend([other] * missing)
        self._backward_other[place] = max(self._backward_other[place], other)

    def _end_measuring(self) -> None:
        if not self._is_measuring or not self._backward_other:
            return  # Without a backward a round tells too little.
        self._is_measuring = False
        self._rounds_measured += 1
        self._forward_other_max = max(self._forward_other_max, self._forward_other)
        known, latest = self._backward_other_max, self._backward_other
        if len(known) == len(latest):
            latest = list(map(max, known, latest))
        elif known:
            latest = [max(*known, *latest)] * len(latest)
        self._backward_other_max = latest
        self._forward_other, self._backward_other = 0, []

    # ---- limits ----

    def excess_in_forward(self, waiting_bytes: int, leaving_bytes: int, more_bytes: int) -> int:
        """How much has to leave the device before ``more_bytes`` do, which start to leave now."""
        leaving = leaving_bytes + more_bytes
        limit = self._least_in_flight
        if self._usable is None:
            return leaving - limit
        room = max(self._usable - self._forward_other_max - waiting_bytes, limit)
        if self._in_flight is not None:
            room = min(room, self._in_flight)
        return leaving - room

    def room_in_backward(self, waiting_bytes: int, kept_bytes: int, place: int) -> int:
        """How much may be brought back when backward had ``place`` tensors.

        ``waiting_bytes``: on the device by now; ``kept_bytes``: of them, those that never left.
        """
        arrived = waiting_bytes - kept_bytes
        if self._usable is None:
            return self._least_prefetch - arrived
        others = self._backward_other_max
        other = max(others[place : place + _AHEAD], default=max(others, default=0))
        other += self._passing_max
        room = max(self._usable - other - waiting_bytes, self._least_prefetch - arrived)
        return room if self._prefetch is None else min(room, self._prefetch - arrived)

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
        if self._usable is not None:
            most = self._given_back_before + self._usable // _GIVEN_SHARE
            self._given_back = min(self._given_back + size_bytes, most)

    def shrink_prefetch(self, held_bytes: int) -> None:
        """No memory for what came ahead, where ``held_bytes`` had come: half of it from now on."""
        self._least_prefetch = min(self._least_prefetch, held_bytes) // 2
        self.give_back(held_bytes // 2)


def memory_bytes(device: torch.device) -> int:
    """Device memory that this process may use."""
    total = int(torch.cuda.get_device_properties(device).total_memory)
    fraction = 1.0
    with contextlib.suppress(AttributeError, RuntimeError):  # Old torch; a pluggable allocator.
        fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(total * min(fraction, 1.0)) if fraction > 0 else total


def _figures(device: torch.device) -> tuple[int, int, int] | None:
    """Bytes allocated, bytes reserved, and the peak of the former."""
    try:
        stats = torch._C._cuda_memoryStats(device.index)
    except (AttributeError, RuntimeError):
        return None
    allocated = stats["allocated_bytes"]["all"]
    reserved = stats["reserved_bytes"]["all"]["current"]
    return int(allocated["current"]), int(reserved), int(allocated["peak"])


def _usable(device: torch.device, reserved_bytes: int) -> int:
    """What the allocator could give out in all, less what is left free."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    most = min(memory_bytes(device), free_bytes + reserved_bytes)
    share = _FREE_SHARE if allocator.is_installed() else _FREE_SHARE_NATIVE
    return int(most - most // share)

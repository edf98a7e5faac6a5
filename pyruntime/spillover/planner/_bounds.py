"""Lower bounds of a training step's time, derived in ``docs/bounds.md``.

A bound comes from shapes, rates and limits alone, never from a run of ours: needless copying must
not raise it. Makespan over bound is the overlap figure of this project. All sizes are in bytes and
all times in integer nanoseconds; a rate in GB/s is bytes a nanosecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from spillover._errors import ConfigError
from spillover._units import format_bytes, parse_bytes
from spillover.emulator import Profile

Payload = Literal["activations", "optimizer", "parameters"]
_PAYLOADS: tuple[Payload, ...] = ("activations", "optimizer", "parameters")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What moves bytes, in GB/s: the link each way, the host's update loop, the disk each way."""

    to_device_gb_s: float
    to_host_gb_s: float
    update_gb_s: float = math.inf
    disk_read_gb_s: float = math.inf
    disk_write_gb_s: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} must be above zero, not {value}")

    @classmethod
    def of(cls, profile: Profile) -> Rates:
        """The rates of a hardware profile."""
        return cls(
            to_device_gb_s=profile.gpu.pcie_to_device_gb_s,
            to_host_gb_s=profile.gpu.pcie_to_host_gb_s,
            update_gb_s=profile.host.optimizer_bandwidth_gb_s,
            disk_read_gb_s=profile.disk.read_gb_s,
            disk_write_gb_s=profile.disk.write_gb_s,
        )


def _moves_ns(size_bytes: int, rate_gb_s: float) -> int:
    return math.ceil(size_bytes / rate_gb_s)


def _not_negative(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} must be a whole number, not {value!r}")
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")


def activation_bound(*, forward_ns: int, backward_ns: int, spilled_bytes: int, rates: Rates) -> int:
    """Bound of a step whose activations exceed the memory limit by ``spilled_bytes``.

    ``max(F, X / out) + max(B, X / in)``: what leaves during forward comes back during backward.

    Parameters
    ----------
    forward_ns, backward_ns
        Compute of the plain run, which recomputes nothing.
    spilled_bytes
        Deduplicated activation bytes above the limit: views and aliases count once.
    rates
        Only the link's rates count.
    """
    _not_negative(forward_ns=forward_ns, backward_ns=backward_ns, spilled_bytes=spilled_bytes)
    return max(forward_ns, _moves_ns(spilled_bytes, rates.to_host_gb_s)) + max(
        backward_ns, _moves_ns(spilled_bytes, rates.to_device_gb_s)
    )


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """Compute of one forward and backward."""

    forward_ns: int
    backward_ns: int

    def __post_init__(self) -> None:
        _not_negative(forward_ns=self.forward_ns, backward_ns=self.backward_ns)


def update_ns(
    *,
    update_bytes: int,
    weight_bytes: int,
    disk_read_bytes: int = 0,
    disk_write_bytes: int = 0,
    rates: Rates,
) -> int:
    """U: the longest of the host's update loop, the disk's transfers and the weights' way back.

    A disk serves reads and writes from one resource, so their times add up.
    """
    disk_ns = disk_read_bytes / rates.disk_read_gb_s + disk_write_bytes / rates.disk_write_gb_s
    return max(
        _moves_ns(update_bytes, rates.update_gb_s),
        math.ceil(disk_ns),
        _moves_ns(weight_bytes, rates.to_device_gb_s),
    )


def optimizer_bound(
    *,
    micro_steps: Sequence[MicroStep],
    gradient_bytes: int,
    weight_bytes: int,
    update_bytes: int,
    rates: Rates,
    disk_read_bytes: int = 0,
    disk_write_bytes: int = 0,
    clipping: bool = True,
) -> int:
    """Bound of a step whose optimizer state lives on the host or on disk.

    ``C - F1 + max(F1, U)``: updates run under the next step's first forward, which is the only
    compute that needs no gradient of this step. Every backward is at least its gradients' way to
    the host. Without clipping nothing needs the norm of all gradients, so the last backward may
    overlap with updates too.

    Parameters
    ----------
    micro_steps
        Compute of each micro-step, one without gradient accumulation.
    gradient_bytes
        Gradients that leave in each backward.
    weight_bytes
        Updated low-precision weights that return.
    update_bytes
        What the host's update loop reads and writes.
    disk_read_bytes, disk_write_bytes
        Optimizer state on disk, read and written in each step.
    clipping
        Whether the update needs the norm of all gradients.
    rates
        Link, host update loop and disk.
    """
    if not micro_steps:
        raise ConfigError("micro_steps is empty; a step has at least one micro-step")
    _not_negative(
        gradient_bytes=gradient_bytes,
        weight_bytes=weight_bytes,
        update_bytes=update_bytes,
        disk_read_bytes=disk_read_bytes,
        disk_write_bytes=disk_write_bytes,
    )
    update = update_ns(
        update_bytes=update_bytes,
        weight_bytes=weight_bytes,
        disk_read_bytes=disk_read_bytes,
        disk_write_bytes=disk_write_bytes,
        rates=rates,
    )
    gradients_ns = _moves_ns(gradient_bytes, rates.to_host_gb_s)
    forwards = [step.forward_ns for step in micro_steps]
    backwards = [max(step.backward_ns, gradients_ns) for step in micro_steps]
    return _with_updates(forwards, backwards, update, clipping=clipping)


def _with_updates(
    forwards: Sequence[int], backwards: Sequence[int], update: int, *, clipping: bool
) -> int:
    under = forwards[0] if clipping else forwards[0] + backwards[-1]
    return sum(forwards) + sum(backwards) - under + max(under, update)


def parameter_bound(*, pass_compute_ns: Sequence[int], streamed_bytes: int, rates: Rates) -> int:
    """Bound of passes that each stream ``streamed_bytes`` of weights to the device.

    ``sum of max(compute, bytes / in)``: a forward and a backward are two passes.
    """
    _not_negative(streamed_bytes=streamed_bytes)
    for compute_ns in pass_compute_ns:
        _not_negative(pass_compute_ns=compute_ns)
    streaming = _moves_ns(streamed_bytes, rates.to_device_gb_s)
    return sum(max(compute_ns, streaming) for compute_ns in pass_compute_ns)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A training step from shapes: its compute, and the bytes of each kind of payload.

    Attributes
    ----------
    weight_bytes, gradient_bytes, optimizer_bytes
        Low-precision weights, their gradients, and optimizer state with fp32 masters.
    update_bytes
        What one update reads and writes: state and masters twice, gradients and weights once.
    activation_bytes
        Saved for backward by one micro-step, deduplicated, weights left out.
    """

    micro_steps: tuple[MicroStep, ...]
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    update_bytes: int
    activation_bytes: int

    def __post_init__(self) -> None:
        if not self.micro_steps:
            raise ConfigError("micro_steps is empty; a step has at least one micro-step")
        sizes = {name: value for name, value in vars(self).items() if name.endswith("_bytes")}
        _not_negative(**sizes)

    @property
    def compute_ns(self) -> int:
        """C: compute of all micro-steps."""
        return sum(step.forward_ns + step.backward_ns for step in self.micro_steps)

    @property
    def device_bytes(self) -> int:
        """What the device holds at the step's peak if nothing leaves."""
        return (
            self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        )


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A step's bound, and what has to move for it.

    Attributes
    ----------
    step_ns
        The bound.
    compute_ns
        Compute alone; ``step_ns`` is this when everything fits.
    spilled_bytes
        Activations that leave in each micro-step.
    streamed_bytes
        Weights that are streamed in each pass.
    update_ns
        Time of the update when the optimizer's state is away, else 0.
    """

    step_ns: int
    compute_ns: int
    spilled_bytes: int
    streamed_bytes: int
    update_ns: int


def step_bound(
    work: StepWork,
    profile: Profile,
    memory_limit: int | str,
    *,
    offload: Collection[Payload] = _PAYLOADS,
    optimizer_on: Literal["host", "disk"] = "host",
    clipping: bool = True,
) -> Bound:
    """Bound of a whole step under a memory limit.

    When the step exceeds the limit, the optimizer's state and the gradients leave first if they
    may; the rest of the excess is divided between activations and weights in the way that makes
    the bound least. In each phase copies of one direction share the link.

    Raises
    ------
    ConfigError
        The step does not fit even with all of ``offload`` away, or an argument is wrong.
    """
    limit = parse_bytes(memory_limit, name="memory_limit")
    unknown = sorted(set(offload) - set(_PAYLOADS))
    if unknown:
        raise ConfigError(f"offload has {unknown[0]!r}; it takes {', '.join(_PAYLOADS)}")
    if optimizer_on not in ("host", "disk"):
        raise ConfigError(f"optimizer_on must be 'host' or 'disk', not {optimizer_on!r}")
    excess = work.device_bytes - limit
    away = excess > 0 and "optimizer" in offload
    if away:
        excess -= work.optimizer_bytes + work.gradient_bytes
    excess = max(excess, 0)
    spill_max = work.activation_bytes if "activations" in offload else 0
    stream_max = work.weight_bytes if "parameters" in offload else 0
    if excess > spill_max + stream_max:
        short = excess - spill_max - stream_max
        raise ConfigError(
            f"the step exceeds memory_limit={format_bytes(limit)} by {format_bytes(short)} with "
            f"{', '.join(offload) or 'nothing'} offloaded; raise the limit or offload more"
        )
    rates = Rates.of(profile)
    update = 0
    if away:
        on_disk = work.optimizer_bytes if optimizer_on == "disk" else 0
        update = update_ns(
            update_bytes=work.update_bytes,
            weight_bytes=0,
            disk_read_bytes=on_disk,
            disk_write_bytes=on_disk,
            rates=rates,
        )

    def total(spilled: int) -> int:
        return _step_ns(
            work,
            rates,
            spilled_bytes=spilled,
            streamed_bytes=excess - spilled,
            update=update,
            optimizer_away=away,
            clipping=clipping,
        )

    spilled = _least(total, max(0, excess - stream_max), min(excess, spill_max))
    return Bound(
        step_ns=total(spilled),
        compute_ns=work.compute_ns,
        spilled_bytes=spilled,
        streamed_bytes=excess - spilled,
        update_ns=update,
    )


def _step_ns(
    work: StepWork,
    rates: Rates,
    *,
    spilled_bytes: int,
    streamed_bytes: int,
    update: int,
    optimizer_away: bool,
    clipping: bool,
) -> int:
    """The bound for one division of the excess."""
    gradients = work.gradient_bytes if optimizer_away else 0
    # Weights that are streamed anyway bring their update along; the others return on their own.
    returning = work.weight_bytes - streamed_bytes if optimizer_away else 0
    leaving = _moves_ns(spilled_bytes, rates.to_host_gb_s)
    streaming = _moves_ns(streamed_bytes, rates.to_device_gb_s)
    forwards = [max(step.forward_ns, leaving, streaming) for step in work.micro_steps]
    arriving = _moves_ns(spilled_bytes + streamed_bytes, rates.to_device_gb_s)
    gradients_ns = _moves_ns(gradients, rates.to_host_gb_s)
    backwards = [max(step.backward_ns, arriving, gradients_ns) for step in work.micro_steps]
    under_bytes = streamed_bytes + returning
    if not clipping:
        under_bytes += spilled_bytes + streamed_bytes
    link_ns = _moves_ns(under_bytes, rates.to_device_gb_s) if optimizer_away else 0
    return _with_updates(forwards, backwards, max(update, link_ns), clipping=clipping)


def _least(function: Callable[[int], int], low: int, high: int) -> int:
    """Where the convex ``function`` is least between ``low`` and ``high``, both included."""
    # Rounding up keeps a convex function convex but for steps of a nanosecond; the ends and the
    # search's last few points are compared directly.
    first, last = low, high
    while high - low > 8:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        if function(left) <= function(right):
            high = right
        else:
            low = left
    points: list[int] = [*range(low, high + 1), first, last]
    least: int = min(points, key=function)
    return least

"""Bounds: the definitions by hand, and what must hold whatever the sizes and rates."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillover import ConfigError
from spillover.emulator import load_profile
from spillover.planner import (
    MicroStep,
    Rates,
    StepWork,
    activation_bound,
    optimizer_bound,
    parameter_bound,
    step_bound,
)

PROFILE = load_profile("rtx4090")
RATES = Rates(to_device_gb_s=25.0, to_host_gb_s=20.0, update_gb_s=50.0)
GIB = 1 << 30

sizes = st.integers(min_value=0, max_value=200 * GIB)
times = st.integers(min_value=0, max_value=10**12)
rate = st.floats(min_value=0.1, max_value=1000.0)
all_rates = st.builds(
    Rates,
    to_device_gb_s=rate,
    to_host_gb_s=rate,
    update_gb_s=rate,
    disk_read_gb_s=rate,
    disk_write_gb_s=rate,
)
micro = st.builds(MicroStep, forward_ns=times, backward_ns=times)
works = st.builds(
    StepWork,
    micro_steps=st.lists(micro, min_size=1, max_size=3).map(tuple),
    weight_bytes=sizes,
    gradient_bytes=sizes,
    optimizer_bytes=sizes,
    update_bytes=sizes,
    activation_bytes=sizes,
)


def faster(rates: Rates) -> Rates:
    return Rates(**{name: value * 1.5 for name, value in vars(rates).items()})


def test_activation_bound_by_hand() -> None:
    # 10 GB leave at 20 GB/s in 0.5 s, under 0.3 s of forward; come back at 25 in 0.4 under 0.6.
    bound = activation_bound(
        forward_ns=300_000_000, backward_ns=600_000_000, spilled_bytes=10**10, rates=RATES
    )
    assert bound == 500_000_000 + 600_000_000


def test_optimizer_bound_by_hand() -> None:
    # U: 28 GB at 50 GB/s is 0.56 s, the weights' way back 0.08 s. Gradients need 0.1 s.
    step = {
        "gradient_bytes": 2 * 10**9,
        "weight_bytes": 2 * 10**9,
        "update_bytes": 28 * 10**9,
        "rates": RATES,
    }
    one = MicroStep(forward_ns=100_000_000, backward_ns=200_000_000)
    assert optimizer_bound(micro_steps=[one], **step) == 200_000_000 + 560_000_000
    assert optimizer_bound(micro_steps=[one], clipping=False, **step) == 560_000_000
    assert optimizer_bound(micro_steps=[one, one], **step) == 500_000_000 + 560_000_000
    short = MicroStep(forward_ns=100_000_000, backward_ns=50_000_000)
    assert optimizer_bound(micro_steps=[short], **step) == 100_000_000 + 560_000_000


def test_optimizer_on_disk_adds_reads_and_writes() -> None:
    rates = dataclasses.replace(RATES, disk_read_gb_s=5.0, disk_write_gb_s=4.0)
    bound = optimizer_bound(
        micro_steps=[MicroStep(forward_ns=0, backward_ns=0)],
        gradient_bytes=0,
        weight_bytes=0,
        update_bytes=0,
        disk_read_bytes=10**10,
        disk_write_bytes=10**10,
        rates=rates,
    )
    assert bound == 2_000_000_000 + 2_500_000_000


def test_parameter_bound_by_hand() -> None:
    passes = [100_000_000, 300_000_000]
    assert parameter_bound(pass_compute_ns=passes, streamed_bytes=5 * 10**9, rates=RATES) == (
        200_000_000 + 300_000_000
    )


@given(forward=times, backward=times, spilled=sizes, more=sizes, rates=all_rates)
def test_activation_bound_grows_with_bytes_and_falls_with_rates(
    forward: int, backward: int, spilled: int, more: int, rates: Rates
) -> None:
    def bound(size_bytes: int, rates: Rates) -> int:
        return activation_bound(
            forward_ns=forward, backward_ns=backward, spilled_bytes=size_bytes, rates=rates
        )

    assert bound(0, rates) == forward + backward
    assert bound(spilled, rates) <= bound(spilled + more, rates)
    assert bound(spilled, faster(rates)) <= bound(spilled, rates)


@given(steps=st.lists(micro, min_size=1, max_size=4), moved=sizes, rates=all_rates)
def test_optimizer_bound_is_compute_when_nothing_moves(
    steps: list[MicroStep], moved: int, rates: Rates
) -> None:
    compute = sum(step.forward_ns + step.backward_ns for step in steps)

    def bound(size_bytes: int, *, clipping: bool = True, rates: Rates = rates) -> int:
        return optimizer_bound(
            micro_steps=steps,
            gradient_bytes=size_bytes,
            weight_bytes=size_bytes,
            update_bytes=14 * size_bytes,
            rates=rates,
            clipping=clipping,
        )

    assert bound(0) == bound(0, clipping=False) == compute
    assert compute <= bound(moved, clipping=False) <= bound(moved)
    assert bound(moved, rates=faster(rates)) <= bound(moved)


@given(work=works)
def test_step_that_fits_is_bound_by_compute(work: StepWork) -> None:
    bound = step_bound(work, PROFILE, work.device_bytes)
    assert bound.step_ns == bound.compute_ns == work.compute_ns
    assert (bound.spilled_bytes, bound.streamed_bytes, bound.update_ns) == (0, 0, 0)


@given(work=works, limit=sizes, more=sizes, clipping=st.booleans())
def test_step_bound_falls_as_the_limit_rises(
    work: StepWork, limit: int, more: int, clipping: bool
) -> None:
    tight = step_bound(work, PROFILE, limit, clipping=clipping)
    loose = step_bound(work, PROFILE, limit + more, clipping=clipping)
    # Each phase is rounded up to a nanosecond by itself.
    assert work.compute_ns <= loose.step_ns <= tight.step_ns + 8 * len(work.micro_steps)


@given(work=works, share=st.floats(min_value=0, max_value=1))
def test_no_division_of_the_excess_is_better(work: StepWork, share: float) -> None:
    """The chosen mix of spilled and streamed bytes is at least as good as any other."""
    from spillover.planner import _bounds

    work = dataclasses.replace(work, gradient_bytes=0, optimizer_bytes=0)
    limit = work.device_bytes // 2
    chosen = step_bound(work, PROFILE, limit, offload=("activations", "parameters"))
    excess = chosen.spilled_bytes + chosen.streamed_bytes
    low, high = max(0, excess - work.weight_bytes), min(excess, work.activation_bytes)
    if low > high:
        return
    spilled = low + round(share * (high - low))
    other = _bounds._step_ns(
        work,
        Rates.of(PROFILE),
        spilled_bytes=spilled,
        streamed_bytes=excess - spilled,
        update=0,
        optimizer_away=False,
        clipping=True,
    )
    assert chosen.step_ns <= other + 8 * len(work.micro_steps)


@given(work=works)
def test_step_bound_of_one_payload_is_its_own_bound(work: StepWork) -> None:
    rates = Rates.of(PROFILE)
    step = work.micro_steps[0]
    work = dataclasses.replace(work, micro_steps=(step,))
    only = dataclasses.replace(work, weight_bytes=0, gradient_bytes=0, optimizer_bytes=0)
    half = only.activation_bytes // 2
    assert step_bound(only, PROFILE, half, offload=("activations",)).step_ns == activation_bound(
        forward_ns=step.forward_ns,
        backward_ns=step.backward_ns,
        spilled_bytes=only.activation_bytes - half,
        rates=rates,
    )
    state = dataclasses.replace(work, activation_bytes=0)
    if state.device_bytes == state.weight_bytes:
        return
    bound = step_bound(state, PROFILE, state.weight_bytes, offload=("optimizer",))
    assert bound.step_ns == optimizer_bound(
        micro_steps=[step],
        gradient_bytes=state.gradient_bytes,
        weight_bytes=state.weight_bytes,
        update_bytes=state.update_bytes,
        rates=rates,
    )


def test_wrong_input_is_named() -> None:
    work = StepWork(
        micro_steps=(MicroStep(forward_ns=1, backward_ns=1),),
        weight_bytes=GIB,
        gradient_bytes=GIB,
        optimizer_bytes=6 * GIB,
        update_bytes=14 * GIB,
        activation_bytes=4 * GIB,
    )
    with pytest.raises(ConfigError, match=r"exceeds memory_limit=2\.00 GiB by 6\.00 GiB"):
        step_bound(work, PROFILE, "2GiB", offload=("activations",))
    with pytest.raises(ConfigError, match="offload has 'weights'"):
        step_bound(work, PROFILE, "2GiB", offload=("weights",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="optimizer_on must be"):
        step_bound(work, PROFILE, "2GiB", optimizer_on="tape")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="forward_ns must not be negative"):
        MicroStep(forward_ns=-1, backward_ns=0)
    with pytest.raises(ConfigError, match="to_host_gb_s must be above zero"):
        Rates(to_device_gb_s=1.0, to_host_gb_s=0.0)
    with pytest.raises(ConfigError, match="to_device_gb_s must be above zero"):
        Rates(to_device_gb_s=math.nan, to_host_gb_s=1.0)
    with pytest.raises(ConfigError, match="at least one micro-step"):
        dataclasses.replace(work, micro_steps=())

"""The optimizer's kernels beside torch in float64, and beside themselves in other ways to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CASES,
    Case,
    Reference,
    State,
    gradient_of,
    make_state,
    values_of,
)

from spillover import _core
from spillover._core import BLOCK_ELEMENTS
from spillover.optim import _kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("float32", "bfloat16", "blockwise8")


@pytest.fixture(params=_core._instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core._instruction_set()
    _core._set_instruction_set(request.param)
    yield request.param
    _core._set_instruction_set(before)


@pytest.fixture
def every_instruction_set() -> Iterator[None]:
    """Put back the one that a test began with."""
    before = _core._instruction_set()
    yield
    _core._set_instruction_set(before)


def run(
    case: Case,
    state: State,
    gradient: torch.Tensor,
    step: int,
    *,
    cuts: tuple[int, ...] = (),
    threads: int = 1,
    scale: float = 1.0,
) -> None:
    """One step, of the parts between ``cuts``."""
    ends = [*cuts, gradient.numel()]
    starts = [0, *cuts]
    ranges = [
        state.range(gradient, step, start, end - start)
        for start, end in zip(starts, ends, strict=True)
    ]
    case.kernel(ranges, **case.options, gradient_scale=scale, threads=threads)


def assert_same(ours: State, other: State) -> None:
    """Bit for bit; NaNs are equal whatever their bits."""
    others = other.tensors()
    for name, tensor in ours.tensors().items():
        expected = others[name]
        if tensor.is_floating_point():
            assert torch.equal(tensor.isnan(), expected.isnan()), name
            tensor, expected = tensor.nan_to_num(), expected.nan_to_num()
            bits = torch.int32 if tensor.itemsize == 4 else torch.int16
            tensor, expected = tensor.view(bits), expected.view(bits)
        assert torch.equal(tensor, expected), name


# ---- against torch ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_those_of_torch_in_float64(
    case: Case, dtype: torch.dtype, instruction_set: str
) -> None:
    count, scale = 1003, 0.37
    state = make_state(case, count)
    reference = Reference(case, state.weight)
    for step in range(1, 8):
        gradient = gradient_of(count, dtype, step)
        run(case, state, gradient, step, scale=scale)
        reference.step(gradient, scale)
    moved = (reference.values - make_state(case, count).weight).abs()
    error = (state.weight - reference.values).abs()
    if case.kernel is _kernels.lion:
        # Where the mean is close to zero its sign is anybody's guess.
        assert (error > 3e-6).float().mean() < 0.01
    else:
        assert (error <= 8 * 2**-24 * reference.values.abs() + 2e-6 * moved + 1e-9).all()
    for name, moment in state.moments.items():
        wanted = reference.moment(name)
        assert torch.allclose(moment.double(), wanted, rtol=3e-6, atol=1e-7 * wanted.abs().max())


@pytest.mark.parametrize(
    "case", [each for each in CASES if each.kernel is not _kernels.lion], ids=str
)
def test_two_hundred_steps_stay_at_float64(case: Case) -> None:
    """1 - lr * decay and beta2 rounded to fp32 would be further off, as torch's own step is."""
    count = 2048
    state = make_state(case, count)
    reference = Reference(case, state.weight)
    for step in range(1, 201):
        gradient = gradient_of(count, torch.float32, step)
        run(case, state, gradient, step)
        reference.step(gradient, 1.0)
    error = (state.weight - reference.values).norm() / reference.values.norm()
    assert error < 1e-6


def is_cancelled_by_decay(case: Case, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Where decay that is added to the gradient leaves so little of it that roundings show.

    What is left may be wrong by 2^-24 of what there was, and Adam's step does not depend on how
    large it is.
    """
    if case.options.get("decoupled"):
        return torch.zeros_like(weight, dtype=torch.bool)
    decay = case.options.get("weight_decay", 0.0) * weight
    gradient = -gradient if case.options.get("maximize") else gradient
    return (gradient + decay).abs() < (gradient.abs() + decay.abs()) / 16


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_steps_are_those_of_torch(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from([each for each in CASES if each.kernel is not _kernels.lion]))
    count = data.draw(st.integers(1, 3000))
    dtype = data.draw(st.sampled_from(FLOATS))
    scale = data.draw(st.sampled_from([1.0, 2.0**-10, 3.0]))
    seed = data.draw(st.integers(0, 2**20))
    offset = data.draw(st.integers(0, 5))
    state = make_state(case, count, low=torch.bfloat16, seed=seed)
    before = state.weight.clone()
    reference = Reference(case, state.weight)
    cancels = torch.zeros(count, dtype=torch.bool)
    for step in range(1, data.draw(st.integers(1, 4)) + 1):
        # A view that is aligned to nothing but its elements.
        gradient = torch.zeros(count + offset, dtype=dtype)[offset:]
        gradient.copy_(gradient_of(count, dtype, seed + step))
        cancels |= is_cancelled_by_decay(case, gradient.double() * scale, reference.values)
        run(case, state, gradient, step, scale=scale)
        reference.step(gradient, scale)
    moved = (reference.values - before).abs()
    error = (state.weight - reference.values).abs()
    bound = 8 * 2**-24 * reference.values.abs() + 3e-6 * moved + 1e-9
    assert (error <= torch.where(cancels, bound + 1e-2 * case.options["lr"], bound)).all()
    assert state.low_weight is not None
    assert torch.equal(state.low_weight, state.weight.bfloat16())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_special_values_end_where_torch_has_them(case: Case, instruction_set: str) -> None:
    specials = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.0, 3e38]
    )
    gradient = specials.repeat(10)
    weight = specials.repeat_interleave(10)
    state = make_state(case, 100, low=torch.float16)
    state.weight.copy_(weight)
    optimizer_weight = torch.nn.Parameter(weight.clone())
    optimizer = case.reference([optimizer_weight], **case.reference_options)
    for step in (1, 2):
        run(case, state, gradient, step)
        optimizer_weight.grad = gradient.clone()
        optimizer.step()
    wanted = optimizer_weight.detach()
    known = torch.ones(100, dtype=torch.bool)
    if case.kernel is _kernels.lion:
        # A mean that is NaN has no sign; torch's is zero, which hides it.
        known = ~state.moments["first"].isnan()
    assert torch.equal(state.weight.isfinite()[known], wanted.isfinite()[known])
    assert torch.equal(state.weight.isnan()[known], wanted.isnan()[known])
    finite = wanted.isfinite() & known
    assert torch.allclose(state.weight[finite], wanted[finite], rtol=1e-5, atol=1e-24)
    assert state.low_weight is not None
    half = state.weight.half()
    assert torch.equal(state.low_weight.isnan(), half.isnan())
    assert torch.equal(state.low_weight.nan_to_num(), half.nan_to_num())


# ---- one result, however it is computed ----


def assert_ways_agree(
    case: Case, state: State, dtype: torch.dtype, cuts: tuple[int, ...], threads: int
) -> None:
    gradient = gradient_of(state.weight.numel(), dtype, 3)
    gradient[1:4] = torch.tensor([float("nan"), float("inf"), -0.0])
    results = []
    for name in _core._instruction_sets():
        _core._set_instruction_set(name)
        for these_cuts, these_threads in (((), 1), (cuts, threads)):
            ours = state.clone()
            for step in (1, 2, 3):
                run(case, ours, gradient, step, cuts=these_cuts, threads=these_threads, scale=0.7)
            results.append(ours)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("moment_format", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets_cuts_and_threads_give_the_same_bits(
    case: Case, moment_format: str, every_instruction_set: None
) -> None:
    count = 5 * BLOCK_ELEMENTS + 37
    cuts = (BLOCK_ELEMENTS, 4 * BLOCK_ELEMENTS)
    if moment_format != "blockwise8":
        cuts = (7, 300, 1000)
    for dtype, low, split in (
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, True),
    ):
        state = make_state(case, count, moment_format=moment_format, low=low, split=split)
        assert_ways_agree(case, state, dtype, cuts, threads=2)


def test_many_elements_on_threads_give_the_same_bits(instruction_set: str) -> None:
    case = CASES[0]
    count = 300_001
    gradient = gradient_of(count, torch.bfloat16, 5)
    alone = make_state(case, count, moment_format="bfloat16", low=torch.bfloat16)
    for threads in (2, 3, 7):
        together = make_state(case, count, moment_format="bfloat16", low=torch.bfloat16)
        run(case, together, gradient, 1, threads=threads)
        if threads == 2:
            run(case, alone, gradient, 1)
        assert_same(alone, together)


def test_weights_past_the_caches_are_the_same() -> None:
    """Above a million elements low weights are streamed, from places of any alignment."""
    case = CASES[4]
    count = (1 << 20) + 77
    gradient = torch.ones(count)
    for dtype in (torch.bfloat16, torch.float16):
        for offset in (0, 1, 31):
            state = make_state(case, count)
            memory = torch.full((count + offset + 40,), 7.0, dtype=dtype)
            state.low_weight = memory[offset : offset + count]
            run(case, state, gradient, 1, threads=2)
            assert torch.equal(state.low_weight, state.weight.to(dtype))
            assert (memory[:offset] == 7).all()
            assert (memory[offset + count :] == 7).all()


def test_flushing_of_denormals_changes_nothing() -> None:
    case = CASES[4]
    gradient = torch.full((100,), 1e-39)
    state = make_state(case, 100)
    state.weight.fill_(1e-40)
    flushed = state.clone()
    run(case, state, gradient, 1)
    assert torch.set_flush_denormal(True)
    try:
        run(case, flushed, gradient, 1)
        is_flushing = (torch.full((16,), 1e-40) * 0.5 == 0).all()
    finally:
        torch.set_flush_denormal(False)
    assert is_flushing  # The caller's setting is as it was.
    assert_same(state, flushed)
    assert (state.weight != 0).all()


# ---- formats ----


def test_masters_with_remainders_follow_fp32_masters(instruction_set: str) -> None:
    case = CASES[0]
    plain = make_state(case, 1000)
    split = make_state(case, 1000, split=True)
    for step in range(1, 6):
        gradient = gradient_of(1000, torch.bfloat16, step)
        run(case, plain, gradient, step)
        run(case, split, gradient, step)
        assert torch.equal(split.master(), plain.weight)
    assert split.low_weight is not None
    error = (split.low_weight.double() - plain.weight.double()).abs()
    assert (error <= 2**-8 * plain.weight.abs()).all()


def test_splitting_rounds_ties_away_and_keeps_every_value(instruction_set: str) -> None:
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 1, 0x8000, 0x7FFFFFFF]
    ).repeat(3)
    weights = torch.cat([bits, bits | 0x80000000]).to(torch.uint32).view(torch.float32)
    low = torch.empty(weights.numel(), dtype=torch.bfloat16)
    remainder = torch.empty(weights.numel(), dtype=torch.int16)
    _kernels.split_weights(weights, low, remainder)
    joined = torch.empty_like(weights)
    _kernels.join_weights(low, remainder, joined)
    assert torch.equal(joined.isnan(), weights.isnan())
    assert torch.equal(low.isnan(), weights.isnan())
    number = ~weights.isnan()
    assert torch.equal(joined[number].view(torch.int32), weights[number].view(torch.int32))
    assert low[:3].view(torch.int16).tolist() == [0x3F81, 0x3F82, 0x3F80]


def test_bf16_moments_are_right_on_average(instruction_set: str) -> None:
    """Rounded to nearest, a second moment would stay where it is for ever."""
    case = CASES[0]
    count = 40_000
    state = make_state(case, count, moment_format="bfloat16")
    second = state.moments["second"]
    assert isinstance(second, torch.Tensor)
    second.fill_(1.0)
    gradient = torch.full((count,), 0.5)
    for step in range(1, 301):
        run(case, state, gradient, step)
    wanted = 0.25 + 0.75 * 0.999**300
    assert abs(second.double().mean() - wanted) < 2e-3
    # Neighbours are rounded independently of each other.
    deviation = second.double() - second.double().mean()
    assert abs((deviation[1:] * deviation[:-1]).mean() / deviation.square().mean()) < 0.05


def test_bf16_moments_depend_on_where_a_range_is_and_on_the_step() -> None:
    case = CASES[0]
    gradient = gradient_of(1000, torch.float32, 1)
    first, second = (make_state(case, 1000, moment_format="bfloat16") for _ in range(2))
    run(case, first, gradient, 1)
    _kernels.adam(
        [
            _kernels.make_range(
                gradient=gradient, weight=second.weight, first_index=1000, **second.moments
            )
        ],
        **case.options,
    )
    assert not torch.equal(first.moments["first"], second.moments["first"])
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("signed", [True, False])
def test_blockwise_moments_keep_their_error(signed: bool, instruction_set: str) -> None:
    count = 40 * BLOCK_ELEMENTS + 13
    values = torch.randn(count) * torch.logspace(-12, 3, count)
    values[::BLOCK_ELEMENTS] *= 50
    values[5] = 0
    if not signed:
        values = values.square()
    moment = _kernels.Blockwise(
        torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // BLOCK_ELEMENTS))
    )
    _kernels.encode_blockwise(values, signed=signed, into=moment)
    decoded = values_of(moment, signed=signed)
    scale = moment.scales.repeat_interleave(BLOCK_ELEMENTS)[:count]
    padded = torch.zeros(len(moment.scales) * BLOCK_ELEMENTS)
    padded[:count] = values.abs()
    assert torch.equal(moment.scales, padded.view(-1, BLOCK_ELEMENTS).amax(1))
    part = values.abs() / scale
    error = (decoded - values).abs() / scale
    top = 6 if signed else 7
    slack = 1.0001
    assert (error <= slack * 0.9 / 2**top).all()
    for decade in range(top + 1):
        begin = 10.0 ** (decade - top - 1)
        inside = (part >= begin) & (part < (begin * 10 if decade < top else 0.98))
        half_cell = 0.45 * begin * 10 / 2**decade
        assert (error[inside] <= slack * half_cell).all(), decade
    assert (decoded[values.abs() == scale].abs() == scale[values.abs() == scale]).all()
    if signed:
        assert (decoded[part < 1e-7] == 0).all()
        assert torch.equal(decoded.sign()[decoded != 0], values.sign()[decoded != 0])
    else:
        assert (decoded[values > 0] > 0).all()
    assert decoded[5] == 0
    again = _kernels.Blockwise(torch.empty_like(moment.codes), torch.empty_like(moment.scales))
    _kernels.encode_blockwise(decoded, signed=signed, into=again)
    assert torch.equal(again.codes, moment.codes)
    assert torch.equal(again.scales, moment.scales)


def test_blockwise_moments_of_special_values(instruction_set: str) -> None:
    values = torch.ones(4 * BLOCK_ELEMENTS)
    values[3] = float("nan")
    values[BLOCK_ELEMENTS + 3] = -float("inf")
    values[2 * BLOCK_ELEMENTS : 3 * BLOCK_ELEMENTS] = 1e-40
    moment = _kernels.Blockwise(torch.empty(len(values), dtype=torch.uint8), torch.empty(4))
    _kernels.encode_blockwise(values, signed=True, into=moment)
    decoded = values_of(moment, signed=True).view(4, -1)
    assert decoded[:2].isnan().all()
    assert (decoded[2] == 0).all()
    assert (decoded[3] == 1).all()


@pytest.mark.parametrize("moment_format", ["bfloat16", "blockwise8"])
def test_training_with_small_moments_stays_close(moment_format: str) -> None:
    """A quadratic bowl: the weights end where those with fp32 moments do."""
    case = CASES[0]
    case = dataclasses.replace(case, options={**case.options, "lr": 1e-2, "weight_decay": 0.0})
    count = 2048
    exact = make_state(case, count)
    small = make_state(case, count, moment_format=moment_format)
    target = torch.randn(count, generator=torch.Generator().manual_seed(8))
    for step in range(1, 1501):
        for state in (exact, small):
            noise = gradient_of(count, torch.float32, step) * 0.1
            run(case, state, state.weight - target + noise, step)
    assert (exact.weight - target).abs().mean() < 0.1
    assert (small.weight - exact.weight).abs().mean() < 0.02

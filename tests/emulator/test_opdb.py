"""PyTorch's own operator samples on the emulated device, against the CPU, with the checker on.

``make test`` compares a seeded sample of the operators; ``make soak`` compares all.
``benchmarks/_opdb`` says what is compared and lists the exceptions.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from benchmarks import _opdb

from spillover import emulator

SEED = 3
#: The exceptions are those of the newest torch; older ones lack some of its operators.
IS_NEWEST_TORCH = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)
#: What fits the time that ``make test`` has.
SAMPLED = {"float32": 15, "bfloat16": 10, "accesses": 30}
SOAK_MINIMUM = {"float32": 665, "bfloat16": 560, "sparse": 35, "accesses": 690}
#: The operators that are most unlike the others: own kernels, sparse results, random numbers.
ALWAYS = (
    "nn_functional_scaled_dot_product_attention",
    "torch_ops_aten__efficient_attention_forward",
    "torch_ops_aten__flash_attention_forward",
    "nn_functional_dropout",
    "to_sparse",
    "sparse_sampled_addmm",
)


def unexpected_failures(report: _opdb.Report) -> dict[str, str]:
    known = _opdb.exceptions()["fail"]
    return {n: d for n, d in report.named("fail").items() if report.mode not in known.get(n, {})}


def test_every_exception_has_a_reason_and_names_an_operator() -> None:
    names = set(_opdb.all_names())
    for kind, entries in _opdb.exceptions().items():
        unknown = entries.keys() - names
        assert not unknown or not IS_NEWEST_TORCH, f"{kind}: {unknown} are not in op_db"
        for name, reason in entries.items():
            texts = (
                [reason]
                if isinstance(reason, str)
                else [text for text in reason.values() if isinstance(text, str)]
            )
            assert any(len(text) > 20 for text in texts), f"{kind}: {name} has no reason"


@pytest.mark.parametrize("mode", SAMPLED)
def test_a_sample_of_the_operators_agrees_with_the_cpu(mode: _opdb.Mode) -> None:
    chosen = set(_opdb.draw(SEED, SAMPLED[mode])) | set(ALWAYS)
    report = _opdb.run(mode, names=sorted(chosen), workers=1)
    assert unexpected_failures(report) == {}
    assert report.count("pass") > len(chosen) / 2


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", get_args(_opdb.Mode))
def test_all_operators_agree_with_the_cpu(mode: _opdb.Mode) -> None:
    report = _opdb.run(mode)
    assert unexpected_failures(report) == {}
    assert report.count("pass") >= SOAK_MINIMUM[mode]
    stale = {
        name
        for name, modes in _opdb.exceptions()["fail"].items()
        if mode in modes and name not in report.named("fail")
    }
    assert not stale, f"these agree by now: {stale}"


def test_an_operator_that_differs_is_found() -> None:
    """The comparison itself: a wrong value, a wrong device and a wrong gradient are refused."""
    import torch
    from benchmarks._opdb import _compare

    right = torch.arange(4.0)
    _compare.check_equal([right.cuda()], [right])
    with pytest.raises(AssertionError, match="not close"):
        _compare.check_equal([(right + 1e-3).cuda()], [right])
    with pytest.raises(AssertionError, match="is on cpu"):
        _compare.check_equal([right], [right])
    with pytest.raises(AssertionError, match=r"not close|NaN"):
        _compare.check_equal([torch.full((4,), float("nan"), device="cuda")], [right])


def test_random_operators_are_told_apart_by_their_distribution() -> None:
    import torch
    from benchmarks._opdb import _compare, _distribution

    def draw_with(shift: float):
        def draw(device: str, seed: int) -> _compare.Outcome:
            torch.manual_seed(seed)
            values = torch.rand(500, device=device)
            return _compare.Outcome(values + (shift if device == "cuda" else 0.0), [], None)

        return draw

    _distribution.check(draw_with(0.0))
    with pytest.raises(AssertionError, match="another distribution"):
        _distribution.check(draw_with(0.2))


@pytest.mark.parametrize("capacity", [0, 128])
def test_results_that_the_kernel_sized_are_writes(capacity: int) -> None:
    """The kernel resizes an empty out=: its bytes are known only then."""
    source = torch.randn(64, device="cuda")
    result = torch.empty(capacity, device="cuda").resize_(0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    torch.abs(source, out=result)
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="hazard"):
        result.sum()
    torch.cuda.synchronize()
    emulator.clear_hazards()

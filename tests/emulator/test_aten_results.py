"""Results that CUDA's operators return and the CPU's do not, or not as wide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import result_cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@pytest.mark.parametrize("name", result_cases.CASES)
def test_results_are_those_of_the_card(name: str) -> None:
    function, expected = result_cases.CASES[name]
    assert result_cases.describe(function()) == expected


def gradients(
    device: str, build: Callable[[], nn.Module], inputs: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(1)
    model = build().to(device=device, dtype=dtype)
    values = inputs.to(device=device, dtype=dtype).requires_grad_()
    output = model(values)
    (output.float() * torch.arange(output.shape[-1], device=device)).sum().backward()
    assert values.grad is not None
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output, values.grad, *found, *model.buffers()]


def random_norm(build: Callable[[], nn.Module]) -> nn.Module:
    """A norm whose parameters say something."""
    norm = build()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LayerNorm(24),
        lambda: nn.LayerNorm(24, bias=False),
        lambda: nn.LayerNorm(24, elementwise_affine=False),
        lambda: nn.BatchNorm1d(6),
        lambda: nn.BatchNorm1d(6, affine=False),
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        lambda: nn.BatchNorm1d(6).eval(),
    ],
)
def test_norms_compute_what_the_cpu_computes(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    inputs = torch.randn(5, 6, 24, generator=torch.Generator().manual_seed(2))
    actual, expected = (
        gradients(device, lambda: random_norm(build), inputs, dtype) for device in ("cuda", "cpu")
    )
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        # The CPU rounds statistics to the parameters' type, CUDA does not.
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            one.cpu().float(), other.float(), rtol=tolerance, atol=tolerance * 8
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_bags_have_the_cpus_gradients(mode: str, padding: int | None) -> None:
    def run(device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        weight = torch.randn(9, 5, generator=generator).to(device).requires_grad_()
        rows = torch.randint(0, 9, (20,), generator=generator).to(device)
        starts = torch.tensor([0, 4, 4, 11, 20], device=device)
        output = F.embedding_bag(
            rows, weight, starts, mode=mode, include_last_offset=True, padding_idx=padding
        )
        output.square().sum().backward()
        assert weight.grad is not None
        return [output, weight.grad]

    for actual, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_half_precision_softmax_into_single_precision(name: str) -> None:
    scores = torch.randn(6, 40, device="cuda").half().requires_grad_()
    wide = scores.detach().float().requires_grad_()
    actual = getattr(torch, name)(scores, 1, dtype=torch.float32)
    expected = getattr(torch, name)(wide, 1)
    torch.testing.assert_close(actual, expected)
    for result in (actual, expected):
        result.square().sum().backward()
    assert scores.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(scores.grad, wide.grad.half())


@pytest.mark.parametrize("maximum", [7, 8])
def test_histograms_of_whole_numbers(maximum: int) -> None:
    """Routers count experts so; the CPU has histograms of floats alone."""
    chosen = torch.randint(0, 8, (500,), dtype=torch.int32)
    counts = torch.histc(chosen.cuda(), bins=8, min=0, max=maximum)
    assert counts.dtype == torch.int32
    assert counts.tolist() == torch.bincount(chosen, minlength=8).tolist()

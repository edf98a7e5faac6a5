"""Layers and compilers whose CUDA path is not the CPU's: recurrent, channels-last, compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

RECURRENT: list[Callable[..., nn.RNNBase]] = [nn.LSTM, nn.GRU, nn.RNN]


def cells_of(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("layer", RECURRENT)
def test_packed_sequences_in_recurrent_layers(layer: Callable[..., nn.RNNBase]) -> None:
    def run(device: str) -> list[Tensor]:
        torch.manual_seed(3)
        model = layer(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        inputs = torch.randn(3, 5, 4)
        model, inputs = model.to(device), inputs.to(device).requires_grad_()
        packed = rnn.pack_padded_sequence(
            inputs, torch.tensor([3, 5, 1]), batch_first=True, enforce_sorted=False
        )
        output, state = model(packed)
        padded, lengths = rnn.pad_packed_sequence(output, batch_first=True)
        (padded.square().sum() + sum(s.sum() for s in cells_of(state))).backward()
        assert lengths.tolist() == [3, 5, 1]
        assert inputs.grad is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [padded, *cells_of(state), inputs.grad, *gradients]

    for actual, expected in zip(run("cuda"), run("cpu"), strict=True):
        assert actual.is_cuda
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", RECURRENT)
def test_dropout_between_recurrent_layers_follows_the_seed(
    layer: Callable[..., nn.RNNBase],
) -> None:
    torch.manual_seed(1)
    model = layer(4, 6, num_layers=2, dropout=0.5).cuda()
    inputs = torch.randn(5, 2, 4, device="cuda")

    def draw(seed: int) -> Tensor:
        torch.cuda.manual_seed(seed)
        return model(inputs)[0].detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_keep_channels_last(dtype: torch.dtype) -> None:
    """CUDA's convolutions answer in the inputs' memory format, forward and backward."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 8, 9, 9)
    weight = torch.randn(16, 8, 3, 3)
    format_ = {"memory_format": torch.channels_last}
    on_device = inputs.to("cuda", dtype).to(**format_).requires_grad_()
    weight_on_device = weight.to("cuda", dtype).to(**format_).requires_grad_()
    output = F.conv2d(on_device, weight_on_device, padding=1)
    assert output.is_contiguous(**format_)
    output.float().square().sum().backward()
    assert on_device.grad is not None
    assert on_device.grad.is_contiguous(**format_)

    # Later layers keep it too.
    pooled = F.max_pool2d(F.relu(output), 2)
    assert pooled.is_contiguous(**format_)
    normalized = nn.BatchNorm2d(16).cuda()(pooled.float())
    assert normalized.is_contiguous(**format_)

    expected = F.conv2d(inputs.to(dtype), weight.to(dtype), padding=1)
    torch.testing.assert_close(output.detach().cpu(), expected)


def test_contiguous_convolutions_stay_contiguous() -> None:
    output = F.conv2d(torch.randn(2, 8, 9, 9, device="cuda"), torch.randn(16, 8, 3, 3).cuda())
    assert output.is_contiguous()


@pytest.mark.parametrize("capturable", [False, True])
def test_fused_adamw_equals_the_cpu(capturable: bool) -> None:
    def train(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(7, 5).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.1, fused=True, capturable=capturable and device == "cuda"
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 7, device=device)).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for actual, expected in zip(train("cuda"), train("cpu"), strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


def test_a_model_compiled_to_aten_operators() -> None:
    def run(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 3))
        model = model.to(device)
        compiled = torch.compile(model, backend="aot_eager")
        output = compiled(torch.ones(4, 6, device=device))
        output.square().sum().backward()
        return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for actual, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


def test_the_jiterator_is_refused_by_name() -> None:
    twice = torch.cuda.jiterator._create_jit_fn(
        "template <typename T> T twice(T x) { return x + x; }"
    )
    with pytest.raises(NotImplementedError, match="jiterator's function twice is not emulated"):
        twice(torch.ones(3, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_the_cpu_lacks(dtype: torch.dtype) -> None:
    """Rounded results of single precision, as CUDA's kernels give."""
    torch.manual_seed(0)
    volume = torch.randn(1, 2, 4, 4, 4).to(dtype)
    on_device = volume.cuda().requires_grad_()
    output = F.avg_pool3d(on_device, 2)
    assert output.dtype == dtype
    torch.testing.assert_close(output.cpu(), F.avg_pool3d(volume.float(), 2).to(dtype))
    output.sum().backward()
    assert on_device.grad is not None
    assert on_device.grad.dtype == dtype

    if dtype == torch.bfloat16 and not hasattr(torch, "bcomplex32"):
        return  # This version has no type for the spectrum.
    signal = torch.randn(16).to(dtype)
    spectrum = torch.fft.rfft(signal.cuda()).to(torch.complex64)
    torch.testing.assert_close(spectrum.cpu(), torch.fft.rfft(signal.float()), rtol=2e-2, atol=2e-2)

"""Dropout inside fused attention: one mask for forward and backward, CUDA's rules for seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPE = (2, 3, 12, 8)


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    return tuple(t.to("cuda", dtype).requires_grad_() for t in draws)


BACKENDS = [
    (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
]


def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, dropout: float = 0.5) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_backward_uses_the_mask_of_the_forward(backend: SDPBackend, dtype: torch.dtype) -> None:
    """With v the identity the output is the dropped weights, and so is v's gradient's matrix."""
    q, k, _ = inputs(dtype)
    size = SHAPE[-2]
    q, k = (F.pad(t.detach(), (0, size - SHAPE[-1])) for t in (q, k))
    v = torch.eye(size, device="cuda", dtype=dtype).expand(2, 3, size, size).clone()
    v.requires_grad_()
    torch.cuda.manual_seed(4)
    weights = attend(q, k, v, backend)
    # Random numbers drawn in between must not matter.
    torch.rand(100, device="cuda")
    cotangent = torch.eye(size, device="cuda", dtype=dtype).expand_as(weights)
    (gradient,) = torch.autograd.grad(weights, v, cotangent)
    torch.testing.assert_close(gradient, weights.detach().mT)
    dropped = (weights == 0).float().mean().item()
    assert 0.35 < dropped < 0.65


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_seed_decides(backend: SDPBackend, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)

    def draw(seed: int) -> Tensor:
        torch.cuda.manual_seed(seed)
        return attend(q, k, v, backend).detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    first = draw(1)
    state = torch.cuda.get_rng_state()
    second = attend(q, k, v, backend).detach()
    assert not torch.equal(first, second), "the generator's offset did not move"
    torch.cuda.set_rng_state(state)
    assert torch.equal(attend(q, k, v, backend).detach(), second)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_without_dropout_the_generator_stays(backend: SDPBackend, dtype: torch.dtype) -> None:
    before = torch.cuda.get_rng_state()
    attend(*inputs(dtype), backend, dropout=0.0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def packed_flash(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **options: Any) -> Tensor:
    output: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, 7, 7, options.pop("dropout_p", 0.0), False, False, **options
    )[0]
    return output


def packed_efficient(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **options: Any) -> Tensor:
    batch = [t.unsqueeze(0) for t in (q, k, v)]
    output: Tensor = torch.ops.aten._efficient_attention_forward(
        *batch, None, offsets, offsets, 7, 7, options.pop("dropout_p", 0.0), 0, True, **options
    )[0]
    return output.squeeze(0)


@pytest.mark.parametrize("packed", [packed_flash, packed_efficient])
def test_packed_sequences_attend_to_themselves(packed: Callable[..., Tensor]) -> None:
    lengths = [5, 7, 1]
    offsets = torch.tensor([0, 5, 12, 13], dtype=torch.int32, device="cuda")
    generator = torch.Generator().manual_seed(8)
    q, k, v = (
        torch.randn(13, 2, 8, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    output = packed(q, k, v, offsets)
    gradients = torch.autograd.grad(output.float().square().sum(), (q, k, v))

    host = [t.detach().cpu().float().requires_grad_() for t in (q, k, v)]
    parts = []
    for rows in zip(*(t.split(lengths) for t in host), strict=True):
        heads_first = [t.transpose(0, 1) for t in rows]
        parts.append(F.scaled_dot_product_attention(*heads_first).transpose(0, 1))
    expected = torch.cat(parts)
    expected_gradients = torch.autograd.grad(expected.square().sum(), host)
    torch.testing.assert_close(output.cpu().float(), expected, rtol=2e-2, atol=2e-2)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.cpu().float(), wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("packed", [packed_flash, packed_efficient])
def test_packed_sequences_with_dropout(packed: Callable[..., Tensor]) -> None:
    """With v the identity, row by row, the output shows each sequence's mask."""
    length = 8
    offsets = torch.tensor([0, 8, 16], dtype=torch.int32, device="cuda")
    q = torch.zeros(16, 1, length, device="cuda", dtype=torch.bfloat16)
    v = torch.eye(length, device="cuda", dtype=torch.bfloat16).repeat(2, 1).unsqueeze(1)
    v.requires_grad_()
    torch.cuda.manual_seed(1)
    output = packed(q, q, v, offsets, dropout_p=0.5)
    first, second = output.detach().squeeze(1).split(length)
    assert not torch.equal(first, second), "two sequences share a mask"
    (gradient,) = torch.autograd.grad(output, v, v.detach())
    torch.testing.assert_close(gradient.squeeze(1), torch.cat([first.mT, second.mT]))


def test_a_window_limits_what_a_query_sees() -> None:
    generator = torch.Generator().manual_seed(9)
    q, k, v = (
        torch.randn(1, 10, 2, 8, generator=generator).to("cuda", torch.bfloat16) for _ in range(3)
    )
    output = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, 10, 10, 0.0, True, False, window_size_left=2, window_size_right=0
    )[0]
    row, column = torch.arange(10)[:, None], torch.arange(10)[None]
    visible = (column <= row) & (column >= row - 2)
    host = [t.cpu().float().transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*host, attn_mask=visible).transpose(1, 2)
    torch.testing.assert_close(output.cpu().float(), expected, rtol=2e-2, atol=2e-2)

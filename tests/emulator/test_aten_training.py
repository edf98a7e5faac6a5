"""Whole models on the emulated device: what they learn equals the CPU's result to the last bit."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A transformer block with both of torch's attention paths."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        n = self.norm_1(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """A small language model."""

    def __init__(self, vocabulary: int = 61, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, length) token numbers to (batch, length, vocabulary) logits."""
        x = self.tokens(tokens)
        x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (4, 17), generator=generator) for _ in range(8)]


def train(
    device: str, model: nn.Module, batches: list[Tensor], *, amp: bool = False, **options: Any
) -> tuple[list[float], nn.Module]:
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    losses = []
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(
    "options",
    [{}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}],
    ids=["default", "foreach", "fused", "for-loop"],
)
def test_transformer_training_equals_cpu(
    model: nn.Module, batches: list[Tensor], options: dict[str, bool]
) -> None:
    expected_losses, expected = train("cpu", model, batches, **options)
    losses, actual = train("cuda", model, batches, **options)
    assert losses == expected_losses
    for a, e in zip(actual.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a.cpu(), e)


def test_bfloat16_autocast_is_close_to_cpu(model: nn.Module, batches: list[Tensor]) -> None:
    # CPU and CUDA autocast differ in which operators they run in bfloat16.
    expected, _ = train("cpu", model, batches, amp=True)
    actual, _ = train("cuda", model, batches, amp=True)
    assert actual == pytest.approx(expected, abs=0.01)
    assert torch.is_autocast_enabled("cuda") is False


def test_grad_scaler_skips_steps_with_infinite_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).cuda()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = layer(torch.randn(2, 4, device="cuda")).sum()
    assert loss.dtype in (torch.float16, torch.float32)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10

    before = layer.weight.clone()
    optimizer.zero_grad()
    scaler.scale(layer(torch.full((1, 4), float("inf"), device="cuda")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    assert scaler.get_scale() == 2.0**9


def test_checkpoint_replays_dropout() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.GELU(), nn.Linear(64, 8)).cuda()
    x = torch.randn(16, 32, device="cuda", requires_grad=True)
    torch.manual_seed(1)
    layers(x).sum().backward()
    expected, x.grad = x.grad.clone(), None
    torch.manual_seed(1)
    checkpoint(layers, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


def test_save_on_cpu_changes_nothing() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
    x = torch.randn(16, 32, device="cuda", requires_grad=True)
    layers(x).sum().backward()
    expected, x.grad = x.grad.clone(), None
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        y = layers(x).sum()
    y.backward()
    assert torch.equal(x.grad, expected)


def test_convolutional_network_equals_cpu() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.GroupNorm(2, 4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    device = copy.deepcopy(host).cuda()
    x = torch.randn(2, 3, 12, 12)
    for _ in range(2):
        expected, actual = host(x), device(x.cuda())
        assert torch.equal(actual.cpu(), expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
    for a, e in zip(device.parameters(), host.parameters(), strict=True):
        assert torch.equal(a.grad.cpu(), e.grad)
    for a, e in zip(device.buffers(), host.buffers(), strict=True):
        assert torch.equal(a.cpu(), e)


def test_channels_last_survives_the_device() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_data_loader_with_pinned_memory() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(64.0).view(16, 4))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, pin_memory=True)
    sums = []
    for (batch,) in loader:
        assert batch.is_pinned()
        sums.append(batch.to("cuda", non_blocking=True).sum().item())
    assert sums == [496.0, 1520.0]


def attention_inputs(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 4, 24, 16)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    return [t.to(device).requires_grad_() for t in tensors]


def attend(
    device: str, dtype: torch.dtype, backend: SDPBackend | None, **options: Any
) -> list[Tensor]:
    inputs = attention_inputs(dtype, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    if backend is None:
        output = F.scaled_dot_product_attention(*inputs, **options)
    else:
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(*inputs, **options)
    output.backward(torch.ones_like(output) * 0.3)
    return [output, *(i.grad for i in inputs)]


BIAS = torch.randn(24, 24, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (None, torch.float32),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16),
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.FLASH_ATTENTION, torch.float16),
    ],
)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": BIAS}])
def test_fused_attention_equals_cpu(
    backend: SDPBackend | None, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if "attn_mask" in options:
        if backend is SDPBackend.FLASH_ATTENTION:
            pytest.skip("flash attention takes no mask")
        options = {"attn_mask": BIAS.to(dtype)}
    expected = attend("cpu", dtype, None, **options)
    actual = attend("cuda", dtype, backend, **options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.detach().cpu(), e.detach())


def test_math_attention_is_close_to_fused() -> None:
    expected = attend("cpu", torch.float32, None, is_causal=True)
    actual = attend("cuda", torch.float32, SDPBackend.MATH, is_causal=True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu(), e.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    ],
)
def test_attention_dropout_is_the_same_mask_in_both_directions(
    backend: SDPBackend, dtype: torch.dtype
) -> None:
    # The output is linear in the value, so the value's gradient times the value must give the
    # output's sum back, if both directions drop the same weights.
    torch.manual_seed(0)
    inputs = attention_inputs(dtype, "cuda")
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(*inputs, dropout_p=0.4)
        plain = F.scaled_dot_product_attention(*inputs)
    assert not torch.equal(output, plain)
    output.float().sum().backward()
    inner = (inputs[2].grad.float() * inputs[2].float()).sum()
    torch.testing.assert_close(inner, output.float().sum(), rtol=2e-2, atol=0.5)
    torch.manual_seed(0)
    with sdpa_kernel(backend):
        again = F.scaled_dot_product_attention(*inputs, dropout_p=0.4)
    assert torch.equal(again, output)


def test_attention_dropout_gradients_match_autograd_of_the_formula() -> None:
    torch.manual_seed(0)
    inputs = attention_inputs(torch.float32, "cuda")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        output = F.scaled_dot_product_attention(*inputs, dropout_p=0.3)
        values = torch.eye(24, device="cuda").expand(2, 4, 24, 24)
        torch.manual_seed(0)
        weights = F.scaled_dot_product_attention(inputs[0], inputs[1], values, dropout_p=0.3)
    keep = (weights.detach() != 0) / 0.7
    output.square().sum().backward()
    actual = [i.grad.clone() for i in inputs]
    for i in inputs:
        i.grad = None
    scores = inputs[0] @ inputs[1].transpose(-2, -1) / 4.0
    (scores.softmax(-1) * keep @ inputs[2]).square().sum().backward()
    for a, i in zip(actual, inputs, strict=True):
        torch.testing.assert_close(a, i.grad, rtol=1e-3, atol=1e-4)


def test_attention_bias_gradient() -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        inputs = attention_inputs(torch.float32, device)
        bias = BIAS.to(device, copy=True).requires_grad_()
        F.scaled_dot_product_attention(*inputs, attn_mask=bias).square().sum().backward()
        gradients.append(bias.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_grouped_query_attention() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 8, 24, 16, generator=generator).bfloat16()
    key, value = torch.randn(2, 2, 2, 24, 16, generator=generator).bfloat16()
    gradients = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device, copy=True).requires_grad_() for t in (query, key, value)]
        F.scaled_dot_product_attention(*inputs, enable_gqa=True).float().sum().backward()
        gradients.append([i.grad.cpu() for i in inputs])
    for a, e in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(a, e, rtol=3e-2, atol=3e-2)


def test_rms_norm_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 5, 16, generator=generator)
    gradients = []
    for device in ("cpu", "cuda"):
        layer = nn.RMSNorm(16).to(device)
        inputs = x.to(device, copy=True).requires_grad_()
        layer(inputs).square().sum().backward()
        gradients.append((inputs.grad.cpu(), layer.weight.grad.cpu()))
    for a, e in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_compile_with_an_eager_backend() -> None:
    compiled = torch.compile(lambda x: (x * 2 + 1).relu(), backend="aot_eager")
    assert compiled(torch.ones(3, device="cuda")).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_equal_separate_ones(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    packed = [torch.randn(24, 4, 16, generator=generator).bfloat16().cuda() for _ in range(3)]
    packed = [p.requires_grad_() for p in packed]
    offsets = [0, 5, 5, 16, 24]
    cumulative = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    output = torch.ops.aten._flash_attention_forward(
        *packed, cumulative, cumulative, 11, 11, 0.0, is_causal, False
    )[0]
    output.float().square().sum().backward()
    actual = [p.grad.cpu() for p in packed]

    host = [p.detach().cpu().requires_grad_() for p in packed]
    parts = []
    for start, end in itertools.pairwise(offsets):
        if start == end:
            continue
        q, k, v = (h[start:end].transpose(0, 1)[None] for h in host)
        part = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        parts.append(part[0].transpose(0, 1))
    expected = torch.cat(parts)
    assert torch.equal(output.detach().cpu(), expected.detach())
    expected.float().square().sum().backward()
    for a, h in zip(actual, host, strict=True):
        torch.testing.assert_close(a, h.grad, rtol=2e-2, atol=2e-2)

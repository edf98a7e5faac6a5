"""A step's compute and bytes from a module on the meta device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spillover import ConfigError
from spillover.emulator import costs, load_profile
from spillover.planner import measure, step_bound

PROFILE = load_profile("a100-sxm")


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def on_meta(build: type[nn.Module], *arguments: int) -> nn.Module:
    with torch.device("meta"):
        return build(*arguments).to(torch.bfloat16)


def test_linear_is_three_products_and_its_bytes() -> None:
    module = on_meta(nn.Linear, 1024, 4096)
    x = torch.empty(512, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True)
    work = measure(module, [x], PROFILE)
    gpu = PROFILE.gpu
    forward = costs.matmul_ns(gpu, costs.MatmulShape(m=512, n=4096, k=1024), "bf16")
    assert work.micro_steps[0].forward_ns == forward
    products = [
        costs.matmul_ns(gpu, costs.MatmulShape(m=512, n=1024, k=4096), "bf16"),
        costs.matmul_ns(gpu, costs.MatmulShape(m=4096, n=1024, k=512), "bf16"),
    ]
    bias = costs.bytes_bound_ns(gpu, 2 * (512 * 4096 + 4096))
    assert work.micro_steps[0].backward_ns == sum(products) + bias
    elements = 1024 * 4096 + 4096
    assert work.weight_bytes == work.gradient_bytes == 2 * elements
    assert work.optimizer_bytes == 12 * elements
    assert work.update_bytes == 28 * elements
    assert work.activation_bytes == x.numel() * 2


def test_aliases_of_one_activation_count_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            return y * y.view(-1, 64).view_as(y)

    x = torch.empty(64, 64, device="meta", requires_grad=True)
    assert measure(Twice(), [x], PROFILE).activation_bytes == 64 * 64 * 4


def test_attention_is_the_fused_kernel() -> None:
    module = on_meta(Attention, 1024, 8)
    x = torch.empty(4, 2048, 1024, dtype=torch.bfloat16, device="meta")
    work = measure(module, [x], PROFILE)
    shape = costs.AttentionShape(
        batch=4, heads=8, kv_heads=8, queries=2048, keys=2048, head_dim=128, causal=True
    )
    projection = costs.matmul_ns(PROFILE.gpu, costs.MatmulShape(m=8192, n=3072, k=1024), "bf16")
    attention = costs.attention_ns(PROFILE.gpu, shape, "forward", "bf16")
    assert work.micro_steps[0].forward_ns == projection + attention
    # No scores are saved: the input, q, k and v in one storage, the output, the row sums.
    tokens = 4 * 2048
    assert work.activation_bytes == tokens * 1024 * 2 * 5 + tokens * 8 * 4


def test_convolutions_and_micro_steps() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False))
        x = torch.empty(8, 64, 56, 56)
    work = measure(module, [x], PROFILE, micro_steps=2)
    shape = costs.ConvolutionShape(
        n=8, channels=64, height=56, width=56, filters=128, kernel=(3, 3), stride=(2, 2),
        padding=(1, 1),
    )  # fmt: skip
    forward = costs.convolution_ns(PROFILE.gpu, shape, "forward", "fp32")
    backward = costs.convolution_ns(PROFILE.gpu, shape, "weight_gradient", "fp32")
    assert [(s.forward_ns, s.backward_ns) for s in work.micro_steps] == [(forward, backward)] * 2


def test_a_transformer_is_slower_under_a_tighter_limit() -> None:
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Embedding(1000, 512),
            *[
                nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
                for _ in range(2)
            ],
        ).to(torch.bfloat16)
        tokens = torch.randint(1000, (16, 512))
    work = measure(module, [tokens], PROFILE)
    bounds = [
        step_bound(work, PROFILE, int(work.device_bytes * share)).step_ns
        for share in (1.0, 0.6, 0.3, 0.1)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] == work.compute_ns < bounds[-1]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_wrong_input_is_named() -> None:
    with pytest.raises(ConfigError, match="on the meta device"):
        measure(nn.Linear(2, 2), [torch.empty(2, 2)], PROFILE)
    module = on_meta(nn.Linear, 2, 2)
    x = torch.empty(2, 2, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ConfigError, match="micro_steps must be at least 1"):
        measure(module, [x], PROFILE, micro_steps=0)
    with torch.device("meta"):
        volume = nn.Conv3d(1, 1, 1)
    with pytest.raises(ConfigError, match="2-d convolutions only"):
        measure(volume, [torch.empty(1, 1, 2, 2, 2, device="meta")], PROFILE)

"""The cost model: durations by hand, and what must hold for all shapes."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillover.emulator import costs, load_profile

PROFILE = load_profile("a100-sxm")
#: Round numbers, so that durations can be worked out by hand.
GPU = dataclasses.replace(
    PROFILE.gpu,
    sm_count=100,
    peak_bf16_tflops=100.0,
    matmul_efficiency=1.0,
    convolution_efficiency=0.5,
    matmul_k_ramp=64.0,
    attention_forward_efficiency=1.0,
    attention_backward_efficiency=0.5,
    attention_key_ramp=128.0,
    attention_head_ramp=64.0,
    memory_bandwidth_gb_s=1000.0,
    memory_efficiency=0.8,
    l2_mib=32.0,
    l2_bandwidth_gb_s=3200.0,
    sustained_efficiency=1.0,
    kernel_ramp_us=2.0,
    copy_latency_us=10.0,
    pcie_to_device_gb_s=25.0,
    pcie_to_host_gb_s=20.0,
    pcie_duplex_gb_s=36.0,
)

sizes = st.integers(min_value=1, max_value=20_000)
cards = st.sampled_from([load_profile(name).gpu for name in ("rtx3060", "rtx4090", "h100-sxm")])


def test_bytes_bound_by_hand() -> None:
    # Half of the cache is 16 MiB; beyond it 800 GB/s.
    assert costs.bytes_bound_ns(GPU, 16 << 20) == 2000 + math.ceil((16 << 20) / 3200)
    assert costs.bytes_bound_ns(GPU, 800_000_000) == 2000 + 1_000_000
    slow = dataclasses.replace(GPU, sustained_efficiency=0.5)
    assert costs.bytes_bound_ns(slow, 800_000_000) == 2000 + 2_000_000


def test_matmul_by_hand() -> None:
    # 100 blocks of 256 x 128 are one wave: 100 x 2 x 256 x 128 x (4096 + 64) flop at 100 TFLOP/s.
    shape = costs.MatmulShape(m=2560, n=1280, k=4096)
    assert shape.flop == 2 * 2560 * 1280 * 4096
    work = 100 * (2 * 256 * 128 * 4160) / (1000 * 100.0)
    assert costs.matmul_ns(GPU, shape, "bf16") == math.ceil(2000 + work)
    # One row more is a second wave of the large tile; smaller tiles do better.
    taller = costs.matmul_ns(GPU, dataclasses.replace(shape, m=2561), "bf16")
    assert math.ceil(2000 + work) < taller < math.ceil(2000 + 2 * work)


def test_thin_matmul_is_bound_by_memory() -> None:
    shape = costs.MatmulShape(m=1, n=16384, k=16384)
    size_bytes = 2 * (16384 + 16384**2 + 16384)
    assert costs.matmul_ns(GPU, shape, "bf16") == math.ceil(2000 + size_bytes / 800)


def test_a_long_k_is_split() -> None:
    # One tile of 128 x 128 alone would leave 99 of 100 multiprocessors idle.
    shape = costs.MatmulShape(m=128, n=128, k=1 << 16)
    alone = 100 * 2 * 128 * 128 * ((1 << 16) + 64) / (1000 * 100.0 * 0.94)
    assert costs.matmul_ns(GPU, shape, "bf16") < (2000 + alone) / 8


def test_convolution_is_an_implicit_product() -> None:
    shape = costs.ConvolutionShape(
        n=32, channels=64, height=56, width=56, filters=128, kernel=(3, 3), stride=(2, 2),
        padding=(1, 1),
    )  # fmt: skip
    assert (shape.out_height, shape.out_width) == (28, 28)
    outputs, inputs = 32 * 28 * 28, 32 * 56 * 56
    assert shape.product("forward") == costs.MatmulShape(m=outputs, n=128, k=576)
    assert shape.product("input_gradient") == costs.MatmulShape(m=inputs, n=64, k=288)
    assert shape.product("weight_gradient") == costs.MatmulShape(m=128, n=576, k=outputs)
    depthwise = dataclasses.replace(shape, filters=64, groups=64)
    moved = 2 * sum(depthwise.elements)
    assert costs.convolution_ns(GPU, depthwise, "forward", "bf16") == costs.bytes_bound_ns(
        GPU, moved
    )


def test_attention_by_hand() -> None:
    shape = costs.AttentionShape(
        batch=4, heads=25, kv_heads=25, queries=1024, keys=1024, head_dim=64
    )
    # 800 blocks over 100 multiprocessors, half of the peak for heads of 64.
    block = 4 * 128 * 64 * (1024 + 128)
    forward = 800 * block / (1000 * 100.0 * 0.5)
    assert costs.attention_ns(GPU, shape, "forward", "bf16") == math.ceil(2000 + forward)
    assert costs.attention_ns(GPU, shape, "backward", "bf16") == math.ceil(2000 + 5 * forward)
    causal = dataclasses.replace(shape, causal=True)
    half = forward * (512 + 64 + 128) / (1024 + 128)
    assert costs.attention_ns(GPU, causal, "forward", "bf16") == pytest.approx(2000 + half, abs=1)


def test_copies_host_and_disk_by_hand() -> None:
    size_bytes = 10**9
    assert costs.copy_ns(GPU, size_bytes, "to_device") == 10_000 + 40_000_000
    assert costs.copy_ns(GPU, size_bytes, "to_host") == 10_000 + 50_000_000
    assert costs.copy_ns(GPU, size_bytes, "to_host", pinned=False) > 100_000_000
    assert costs.duplex_rate_gb_s(GPU, "to_device") == pytest.approx(20.0)
    assert costs.duplex_rate_gb_s(GPU, "to_host") == pytest.approx(16.0)
    host = dataclasses.replace(
        PROFILE.host, pin_gb_s=4.0, memory_bandwidth_gb_s=50.0, optimizer_bandwidth_gb_s=40.0
    )
    assert costs.pin_ns(host, size_bytes) == 250_000_000
    assert costs.host_loop_ns(host, size_bytes) == 20_000_000
    assert costs.host_optimizer_ns(host, size_bytes) == 25_000_000
    disk = dataclasses.replace(
        PROFILE.disk, read_gb_s=5.0, write_gb_s=4.0, read_latency_us=100.0, write_latency_us=20.0
    )
    assert costs.disk_ns(disk, size_bytes, "read") == 100_000 + 200_000_000
    assert costs.disk_ns(disk, size_bytes, "write") == 20_000 + 250_000_000


@given(gpu=cards, m=sizes, n=sizes, k=sizes)
def test_sustained_rates_give_the_same_durations(
    gpu: costs.GpuProfile, m: int, n: int, k: int
) -> None:
    """Dividing the work by the efficiency is the same as multiplying it into every rate."""
    other = gpu.sustained()
    shape = costs.MatmulShape(m=m, n=n, k=k)
    attention = costs.AttentionShape(
        batch=1, heads=8, kv_heads=8, queries=m, keys=max(m, k), head_dim=64, causal=True
    )
    for duration in (
        lambda card: costs.matmul_ns(card, shape, "bf16"),
        lambda card: costs.bytes_bound_ns(card, m * n),
        lambda card: costs.attention_ns(card, attention, "backward", "bf16"),
    ):
        # Two orders of arithmetic may round up to neighbouring nanoseconds.
        assert abs(duration(gpu) - duration(other)) <= 1


@given(gpu=cards, m=sizes, n=sizes, k=sizes, more=sizes)
def test_matmul_never_beats_its_roofline_and_grows_with_k(
    gpu: costs.GpuProfile, m: int, n: int, k: int, more: int
) -> None:
    shape = costs.MatmulShape(m=m, n=n, k=k)
    duration = costs.matmul_ns(gpu, shape, "bf16")
    assert duration >= shape.flop / (1000 * gpu.peak_bf16_tflops * gpu.matmul_efficiency)
    assert duration >= 2 * (m * k + k * n + m * n) / max(
        gpu.l2_bandwidth_gb_s, gpu.memory_bandwidth_gb_s
    )
    assert duration <= costs.matmul_ns(gpu, shape, "fp32")
    larger = costs.matmul_ns(gpu, dataclasses.replace(shape, k=k + more), "bf16")
    # A longer k may be split where the shorter one may not, which is at most a bit faster.
    assert larger >= 0.5 * duration


@given(gpu=cards, queries=sizes, keys=sizes, causal=st.booleans())
def test_attention_never_beats_its_roofline(
    gpu: costs.GpuProfile, queries: int, keys: int, causal: bool
) -> None:
    keys = max(keys, queries)
    shape = costs.AttentionShape(
        batch=1, heads=8, kv_heads=2, queries=queries, keys=keys, head_dim=128, causal=causal
    )
    forward = costs.attention_ns(gpu, shape, "forward", "bf16")
    needed = keys - queries / 2 if causal else keys
    assert forward >= 4 * 8 * queries * needed * 128 / (1000 * gpu.peak_bf16_tflops)
    assert costs.attention_ns(gpu, shape, "backward", "bf16") >= 2 * forward - 4000

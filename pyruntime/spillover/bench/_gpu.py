"""Rates of the current CUDA device and its link, measured through torch's ordinary interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spillover._errors import DriverError
from spillover.bench._timing import fastest_seconds

if TYPE_CHECKING:
    import torch

_ATTENTION_HEAD_DIM = 128


def measure(*, size_bytes: int, matmul_size: int, rounds: int) -> dict[str, float]:
    """Numbers of a ``[gpu]`` table.

    Rates of products and memory are what was reached, so that the efficiencies, the shares of a
    vendor's figure, are 1.
    """
    import torch

    properties = torch.cuda.get_device_properties()
    found: dict[str, float] = {
        "memory_gib": properties.total_memory / 2**30,
        "sm_count": properties.multi_processor_count,
        "memory_bandwidth_gb_s": memory_bandwidth(size_bytes=size_bytes, rounds=rounds),
        "memory_efficiency": 1.0,
        "matmul_efficiency": 1.0,
        **launches(rounds=rounds),
        **copies(size_bytes=size_bytes, rounds=rounds),
    }
    found.update(products(size=matmul_size, rounds=rounds))
    found.update(attention(queries=matmul_size, peak=found["peak_bf16_tflops"], rounds=rounds))
    clock_khz, cache_bytes = (getattr(properties, n, 0) for n in ("clock_rate", "L2_cache_size"))
    if clock_khz:
        found["clock_mhz"] = clock_khz / 1000
    if cache_bytes:
        found["l2_mib"] = cache_bytes / 2**20
    return found


def host_side(*, size_bytes: int, rounds: int) -> dict[str, float]:
    """Numbers of a ``[host]`` table that need a device: an operator's cost, and registration."""
    import torch

    a = torch.ones(16, device="cuda", requires_grad=True)
    calls = 200
    operator = fastest_seconds(lambda: a * 1.5, rounds=rounds, calls=calls, finish=lambda: None)
    torch.cuda.synchronize()
    return {"operator_us": operator * 1e6, "pin_gb_s": pin_rate(size_bytes=size_bytes)}


def pin_rate(*, size_bytes: int) -> float:
    """GB/s of registering memory that was touched."""
    import torch

    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    memory = torch.ones(size_bytes, dtype=torch.uint8)

    def register() -> None:
        code = runtime.cudaHostRegister(memory.data_ptr(), size_bytes, 0)
        if int(code):
            raise DriverError(f"cudaHostRegister of {size_bytes} bytes failed with {int(code)}")

    # The first registration is measured: a second one finds pages that the driver knows.
    seconds = _once(register)
    runtime.cudaHostUnregister(memory.data_ptr())
    return size_bytes / seconds / 1e9


def _once(work: Any) -> float:
    import time

    start = time.perf_counter_ns()
    work()
    return max((time.perf_counter_ns() - start) / 1e9, 1e-9)


def memory_bandwidth(*, size_bytes: int, rounds: int) -> float:
    """GB/s of ``b = 2 a`` on the device, reads and writes together."""
    import torch

    a = torch.ones(size_bytes // 4, device="cuda")
    b = torch.empty_like(a)
    seconds = _device_seconds(lambda: torch.mul(a, 2.0, out=b), rounds=rounds, calls=4)
    return 2 * size_bytes / seconds / 1e9


def _device_seconds(work: Any, *, rounds: int, calls: int = 1) -> float:
    import torch

    return fastest_seconds(work, rounds=rounds, calls=calls, finish=torch.cuda.synchronize)


def launches(*, rounds: int) -> dict[str, float]:
    """Time of a small kernel in a full queue, and of one on an idle device."""
    import torch

    a = torch.ones(16, device="cuda")
    queued = _device_seconds(lambda: a.add_(1.0), rounds=rounds, calls=500) * 1e6
    alone = _device_seconds(lambda: a.add_(1.0), rounds=5 * rounds) * 1e6
    # What one kernel costs in a queue is shared between its own ramp and the gap before it.
    return {
        "kernel_ramp_us": 0.6 * queued,
        "kernel_gap_us": 0.4 * queued,
        "launch_latency_us": max(alone - queued, 0.1),
    }


def copies(*, size_bytes: int, rounds: int) -> dict[str, float]:
    """Rates of copies: pinned and pageable, each direction alone, and both pinned at once."""
    import torch

    device = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)
    pageable = torch.ones(size_bytes, dtype=torch.uint8)
    pinned, back = (torch.ones(size_bytes, dtype=torch.uint8).pin_memory() for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            device.copy_(pinned, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            back.copy_(other, non_blocking=True)

    work: dict[str, tuple[Any, int]] = {
        "pcie_to_device_gb_s": (lambda: device.copy_(pinned, non_blocking=True), 1),
        "pcie_to_host_gb_s": (lambda: pinned.copy_(device, non_blocking=True), 1),
        "pageable_to_device_gb_s": (lambda: device.copy_(pageable), 1),
        "pageable_to_host_gb_s": (lambda: pageable.copy_(device), 1),
        "pcie_duplex_gb_s": (both, 2),
    }
    rates = {
        name: times * size_bytes / _device_seconds(run, rounds=rounds) / 1e9
        for name, (run, times) in work.items()
    }
    small = torch.ones(16, dtype=torch.uint8).pin_memory()
    target = device[:16]
    latency = _device_seconds(lambda: target.copy_(small, non_blocking=True), rounds=5 * rounds)
    return {**rates, "copy_latency_us": latency * 1e6}


def products(*, size: int, rounds: int) -> dict[str, float]:
    """TFLOP/s of square products in each type, what an output tile costs, and convolutions."""
    import torch

    types: dict[str, tuple[torch.dtype, bool]] = {
        "fp64": (torch.float64, False),
        "fp32": (torch.float32, False),
        "tf32": (torch.float32, True),
        "fp16": (torch.float16, False),
        "bf16": (torch.bfloat16, False),
    }
    found = {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, (dtype, tf32) in types.items():
            torch.backends.cuda.matmul.allow_tf32 = tf32
            seconds = _product_seconds(size, size, dtype, rounds=rounds)
            found[f"peak_{name}_tflops"] = 2 * size**3 / seconds / 1e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    # T(k) is proportional to k + r: two lengths give r.
    short, long = size // 8, size
    fast, slow = (_product_seconds(size, k, torch.bfloat16, rounds=rounds) for k in (short, long))
    ramp = (long * fast - short * slow) / (slow - fast) if slow > fast else 1.0
    found["matmul_k_ramp"] = min(max(ramp, 1.0), 10_000.0)
    rate = _convolution_tflops(size=size, rounds=rounds) / found["peak_bf16_tflops"]
    found["convolution_efficiency"] = min(rate, 1.25)
    return found


def _product_seconds(size: int, k: int, dtype: torch.dtype, *, rounds: int) -> float:
    import torch

    a = torch.ones(size, k, dtype=dtype, device="cuda")
    b = torch.ones(k, size, dtype=dtype, device="cuda")
    out = torch.empty(size, size, dtype=dtype, device="cuda")
    return _device_seconds(lambda: torch.mm(a, b, out=out), rounds=rounds, calls=2)


def _convolution_tflops(*, size: int, rounds: int) -> float:
    import torch
    import torch.nn.functional as F

    n, channels, side = max(size // 128, 1), 256, 28
    x = torch.ones(n, channels, side, side, dtype=torch.bfloat16, device="cuda")
    w = torch.ones(channels, channels, 3, 3, dtype=torch.bfloat16, device="cuda")
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    with torch.no_grad():
        seconds = _device_seconds(lambda: F.conv2d(x, w, padding=1), rounds=rounds)
    return 2 * n * side * side * channels * channels * 9 / seconds / 1e12


def attention(*, queries: int, peak: float, rounds: int) -> dict[str, float]:
    """Efficiencies of fused attention, both passes, with the ramps of the profile's base."""
    import torch
    import torch.nn.functional as F

    from spillover.emulator import load_profile

    gpu = load_profile("a100-sxm").gpu
    q, k, v = (
        torch.ones(
            1, 16, queries, _ATTENTION_HEAD_DIM, dtype=torch.bfloat16, device="cuda"
        ).requires_grad_()
        for _ in range(3)
    )
    with torch.no_grad():
        forward = _device_seconds(lambda: F.scaled_dot_product_attention(q, k, v), rounds=rounds)
    out = F.scaled_dot_product_attention(q, k, v)
    gradient = torch.ones_like(out)
    backward = _device_seconds(
        lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), rounds=rounds
    )
    flop = 16 * queries * _ATTENTION_HEAD_DIM * (queries + gpu.attention_key_ramp)
    head = _ATTENTION_HEAD_DIM / (_ATTENTION_HEAD_DIM + gpu.attention_head_ramp)
    return {
        "attention_forward_efficiency": min(4 * flop / forward / 1e12 / peak / head, 1.25),
        "attention_backward_efficiency": min(10 * flop / backward / 1e12 / peak / head, 1.25),
    }

"""How long operators take on a card: the formulas of ``docs/cost-model.md``, in pure Python.

The virtual clock computes the same durations in C++. Arithmetic is in doubles, in the order that
the document writes it, and each duration is rounded up to whole nanoseconds once, at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spillover.emulator._profiles import DiskProfile, GpuProfile, HostProfile

DType = Literal["fp64", "fp32", "tf32", "fp16", "bf16"]
Pass = Literal["forward", "backward"]
ConvolutionPass = Literal["forward", "input_gradient", "weight_gradient"]

SIZE_BYTES: dict[DType, int] = {"fp64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
#: Output tiles: rows, columns, relative efficiency.
_TILES = (
    (256, 128, 1.0),
    (128, 256, 1.0),
    (128, 128, 0.94),
    (128, 64, 0.8),
    (64, 128, 0.8),
    (64, 64, 0.65),
)
_K_SPLITS = (1, 2, 4, 8, 16)
_K_SPLIT_MIN = 256
_QUERY_BLOCK = 128
#: Share of the cache that a working set may have and be taken to be there already.
_CACHE_SHARE = 2


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _nanoseconds(value: float) -> int:
    return math.ceil(value)


def _kernel_ns(gpu: GpuProfile, work_ns: float) -> int:
    """Duration of a kernel whose work alone would take ``work_ns``."""
    return _nanoseconds(gpu.kernel_ramp_us * 1000 + work_ns / gpu.sustained_efficiency)


def peak_tflops(gpu: GpuProfile, dtype: DType) -> float:
    """Dense peak for elements of ``dtype``."""
    peak: float = getattr(gpu, f"peak_{dtype}_tflops")
    return peak


def memory_rate_gb_s(gpu: GpuProfile, size_bytes: int) -> float:
    """Rate at which an operator that moves ``size_bytes`` moves them: bytes a nanosecond."""
    if size_bytes <= gpu.l2_mib * 2**20 / _CACHE_SHARE:
        return gpu.l2_bandwidth_gb_s
    return gpu.memory_bandwidth_gb_s * gpu.memory_efficiency


def bytes_bound_ns(gpu: GpuProfile, size_bytes: int) -> int:
    """An operator that only moves ``size_bytes``, reads and writes together."""
    return _kernel_ns(gpu, size_bytes / memory_rate_gb_s(gpu, size_bytes))


@dataclass(frozen=True, kw_only=True)
class MatmulShape:
    """``batch`` products of an m × k by a k × n matrix."""

    m: int
    n: int
    k: int
    batch: int = 1

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.n * self.k


def matmul_ns(gpu: GpuProfile, shape: MatmulShape, dtype: DType) -> int:
    """A (batched) matrix product."""
    moved = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
    return _product_ns(
        gpu,
        shape,
        rate_tflops=peak_tflops(gpu, dtype) * gpu.matmul_efficiency,
        size_bytes=shape.batch * moved * SIZE_BYTES[dtype],
    )


def _product_ns(gpu: GpuProfile, shape: MatmulShape, *, rate_tflops: float, size_bytes: int) -> int:
    """The fastest tile and split of k for ``shape``, which moves ``size_bytes`` without a split."""
    best = math.inf
    for tile_m, tile_n, tile_efficiency in _TILES:
        for split in _K_SPLITS:
            if split > 1 and shape.k < split * _K_SPLIT_MIN:
                continue
            blocks = shape.batch * _ceil_div(shape.m, tile_m) * _ceil_div(shape.n, tile_n) * split
            waves = _ceil_div(blocks, gpu.sm_count)
            k_block = _ceil_div(shape.k, split) + gpu.matmul_k_ramp
            math_ns = (
                waves
                * gpu.sm_count
                * (2 * tile_m * tile_n * k_block)
                / (1000 * rate_tflops * tile_efficiency)
            )
            partial = 0 if split == 1 else 2 * split * shape.batch * shape.m * shape.n * 4
            moved = size_bytes + partial
            best = min(best, max(math_ns, moved / memory_rate_gb_s(gpu, moved)))
    return _kernel_ns(gpu, best)


@dataclass(frozen=True, kw_only=True)
class ConvolutionShape:
    """A 2-d convolution: n images of ``channels`` × ``height`` × ``width``."""

    n: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return (self.height + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return (self.width + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1

    @property
    def elements(self) -> tuple[int, int, int]:
        """Elements of input, weight and output."""
        taps = self.kernel[0] * self.kernel[1]
        return (
            self.n * self.channels * self.height * self.width,
            self.filters * self.channels // self.groups * taps,
            self.n * self.filters * self.out_height * self.out_width,
        )

    def product(self, which: ConvolutionPass) -> MatmulShape:
        """The implicit matrix product."""
        taps = self.kernel[0] * self.kernel[1]
        filters, channels = self.filters // self.groups, self.channels // self.groups
        outputs = self.n * self.out_height * self.out_width
        if which == "forward":
            return MatmulShape(m=outputs, n=filters, k=channels * taps, batch=self.groups)
        if which == "input_gradient":
            k = _ceil_div(filters * taps, self.stride[0] * self.stride[1])
            inputs = self.n * self.height * self.width
            return MatmulShape(m=inputs, n=channels, k=k, batch=self.groups)
        return MatmulShape(m=filters, n=channels * taps, k=outputs, batch=self.groups)


def convolution_ns(
    gpu: GpuProfile, shape: ConvolutionShape, which: ConvolutionPass, dtype: DType
) -> int:
    """One pass of a convolution."""
    size_bytes = sum(shape.elements) * SIZE_BYTES[dtype]
    if shape.channels == shape.groups and shape.groups > 1:
        return bytes_bound_ns(gpu, size_bytes)
    return _product_ns(
        gpu,
        shape.product(which),
        rate_tflops=peak_tflops(gpu, dtype) * gpu.convolution_efficiency,
        size_bytes=size_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Fused attention of ``queries`` positions to ``keys`` positions."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    kv_heads: int
    causal: bool = False


def attention_ns(gpu: GpuProfile, shape: AttentionShape, which: Pass, dtype: DType) -> int:
    """One pass of fused (flash) attention."""
    keys: float = shape.keys
    if shape.causal:
        keys = (shape.keys - shape.queries) + shape.queries / 2 + _QUERY_BLOCK / 2
    blocks = shape.batch * shape.heads * _ceil_div(shape.queries, _QUERY_BLOCK)
    waves: float = _ceil_div(blocks, gpu.sm_count)
    if blocks >= 2 * gpu.sm_count:
        waves = blocks / gpu.sm_count
    if which == "forward":
        efficiency, products, passes = gpu.attention_forward_efficiency, 4, 1
    else:
        efficiency, products, passes = gpu.attention_backward_efficiency, 10, 2
    efficiency = efficiency * shape.head_dim / (shape.head_dim + gpu.attention_head_ramp)
    flop = products * _QUERY_BLOCK * shape.head_dim * (keys + gpu.attention_key_ramp)
    math_ns = waves * gpu.sm_count * flop / (1000 * peak_tflops(gpu, dtype) * efficiency)
    q = shape.batch * shape.heads * shape.queries * shape.head_dim
    kv = 2 * shape.batch * shape.kv_heads * shape.keys * shape.head_dim
    size_bytes = passes * (2 * q + kv) * SIZE_BYTES[dtype]
    memory_ns = size_bytes / memory_rate_gb_s(gpu, size_bytes)
    return _kernel_ns(gpu, max(math_ns, memory_ns))


CopyDirection = Literal["to_device", "to_host"]


def copy_ns(
    gpu: GpuProfile, size_bytes: int, direction: CopyDirection, *, pinned: bool = True
) -> int:
    """A copy across the link, alone on it."""
    rate: float = getattr(gpu, f"{'pcie' if pinned else 'pageable'}_{direction}_gb_s")
    return _nanoseconds(gpu.copy_latency_us * 1000 + size_bytes / rate)


def duplex_rate_gb_s(gpu: GpuProfile, direction: CopyDirection) -> float:
    """Rate of a pinned copy while another runs in the other direction."""
    own: float = getattr(gpu, f"pcie_{direction}_gb_s")
    both = gpu.pcie_to_device_gb_s + gpu.pcie_to_host_gb_s
    return min(own, own * gpu.pcie_duplex_gb_s / both)


def pin_ns(host: HostProfile, size_bytes: int) -> int:
    """Registering host memory with the driver."""
    return _nanoseconds(size_bytes / host.pin_gb_s)


def host_loop_ns(host: HostProfile, size_bytes: int) -> int:
    """A streaming loop on all cores that reads and writes ``size_bytes`` together."""
    return _nanoseconds(size_bytes / host.memory_bandwidth_gb_s)


def host_optimizer_ns(host: HostProfile, size_bytes: int) -> int:
    """A fused CPU optimizer step that reads and writes ``size_bytes`` together."""
    return _nanoseconds(size_bytes / host.optimizer_bandwidth_gb_s)


def disk_ns(disk: DiskProfile, size_bytes: int, which: Literal["read", "write"]) -> int:
    """One sequential transfer of ``size_bytes``."""
    latency: float = getattr(disk, f"{which}_latency_us")
    rate: float = getattr(disk, f"{which}_gb_s")
    return _nanoseconds(latency * 1000 + size_bytes / rate)

"""What operators of CUDA return besides their output, where the CPU's return something else.

From PyTorch's CUDA sources (layer_norm_kernel.cu, Normalization.cu, group_norm.cpp, WeightNorm.cu,
SoftMax.cu, EmbeddingBag.cu). Computed runs and dry runs are both compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Described = list[tuple[torch.dtype, tuple[int, ...]]]
HALF, FLOAT, LONG = torch.float16, torch.float32, torch.int64
NARROW = (torch.float16, torch.bfloat16)
aten = torch.ops.aten


def device(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def describe(results: Tensor | tuple[Tensor, ...]) -> Described:
    found = results if isinstance(results, tuple) else (results,)
    return [(tensor.dtype, tuple(tensor.shape)) for tensor in found]


def layer_norm(dtype: torch.dtype, affine: bool) -> Tensor | tuple[Tensor, ...]:
    weight = torch.ones(256, device="cuda", dtype=dtype) if affine else None
    return aten.native_layer_norm(device(600, 256, dtype=dtype), [256], weight, weight, 1e-5)


def batch_norm(dtype: torch.dtype, training: bool) -> Tensor | tuple[Tensor, ...]:
    ones = torch.ones(64, device="cuda", dtype=dtype)
    mean, variance = torch.zeros_like(ones), torch.ones_like(ones)
    return aten.native_batch_norm(
        device(16, 64, 32, 32, dtype=dtype), ones, ones, mean, variance, training, 0.1, 1e-5
    )


def group_norm(dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    ones = torch.ones(64, device="cuda", dtype=dtype)
    images = device(16, 64, 32, 32, dtype=dtype)
    return aten.native_group_norm(images, ones, ones, 16, 64, 1024, 8, 1e-5)


def embedding_bag(mode: int) -> Tensor | tuple[Tensor, ...]:
    rows = torch.randint(0, 5000, (20000,), device="cuda")
    starts = torch.arange(0, 20000, 10, device="cuda")
    return aten._embedding_bag(device(5000, 64), rows, starts, False, mode)


def half_softmax(name: str) -> Tensor:
    scores = device(128, 300, dtype=HALF).requires_grad_()
    return getattr(torch, name)(scores, 1, dtype=FLOAT)


def half_softmax_gradient(name: str) -> Tensor:
    scores = device(128, 300, dtype=HALF).requires_grad_()
    getattr(torch, name)(scores, 1, dtype=FLOAT).sum().backward()
    assert scores.grad is not None
    return scores.grad


CASES: dict[str, tuple[Callable[[], Tensor | tuple[Tensor, ...]], Described]] = {}
for _dtype in (*NARROW, FLOAT):
    for _flag in (True, False):
        CASES[f"layer norm {_dtype} {_flag}"] = (
            lambda dtype=_dtype, flag=_flag: layer_norm(dtype, flag),
            [(_dtype, (600, 256)), (FLOAT, (600, 1)), (FLOAT, (600, 1))],
        )
        CASES[f"batch norm {_dtype} {_flag}"] = (
            lambda dtype=_dtype, flag=_flag: batch_norm(dtype, flag),
            [(_dtype, (16, 64, 32, 32)), (FLOAT, (64,)), (FLOAT, (64,))],
        )
    CASES[f"group norm {_dtype}"] = (
        lambda dtype=_dtype: group_norm(dtype),
        [(_dtype, (16, 64, 32, 32)), (_dtype, (16, 8)), (_dtype, (16, 8))],
    )
    CASES[f"RMS norm {_dtype}"] = (
        lambda dtype=_dtype: aten._fused_rms_norm(device(600, 256, dtype=dtype), [256], None, None),
        [(_dtype, (600, 256)), (FLOAT, (600, 1))],
    )
    CASES[f"weight norm {_dtype}"] = (
        lambda dtype=_dtype: aten._weight_norm_interface(
            device(512, 256, dtype=dtype), device(512, 1, dtype=dtype), 0
        ),
        [(_dtype, (512, 256)), (FLOAT, (512, 1))],
    )
for _mode in range(3):
    CASES[f"embedding bag {_mode}"] = (
        lambda mode=_mode: embedding_bag(mode),
        [
            (FLOAT, (2000, 64)),
            (LONG, (20000,)),
            (LONG, (2000,)),
            (LONG, (2000, 64) if _mode == 2 else (0,)),
        ],
    )
for _name in ("softmax", "log_softmax"):
    CASES[f"half {_name}"] = (lambda name=_name: half_softmax(name), [(FLOAT, (128, 300))])
    CASES[f"half {_name} gradient"] = (
        lambda name=_name: half_softmax_gradient(name),
        [(HALF, (128, 300))],
    )

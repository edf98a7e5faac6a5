"""About a hundred common operators on the emulated device, against the CPU.

The emulated device runs the CPU's kernels on the same bytes, so results and gradients must be equal
to the last bit. The few cases where CUDA takes other operators to its result carry a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES_SEED = 20


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def unit(*shape: int) -> Tensor:
    return torch.rand(shape) * 1.8 - 0.9


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.5


def spd(size: int) -> Tensor:
    root = torch.randn(size, size)
    return root @ root.T + size * torch.eye(size)


@dataclass(frozen=True)
class Case:
    """One operator: `function(*inputs())` is compared between the devices."""

    name: str
    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    backward: bool = True
    tolerance: float = 0.0


def unary(name: str, make: Callable[..., Tensor] = floats, backward: bool = True) -> Case:
    return Case(name, getattr(torch, name), lambda: (make(5, 7),), backward)


def binary(name: str, make: Callable[..., Tensor] = positive, backward: bool = True) -> Case:
    return Case(name, getattr(torch, name), lambda: (make(5, 7), make(7)), backward)


SMOOTH_OR_STEPPED = [
    "abs",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "atan",
    "asinh",
    "exp",
    "exp2",
    "expm1",
    "erf",
    "erfc",
    "sigmoid",
    "square",
    "neg",
    "sign",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "sum",
    "mean",
    "std",
    "var",
    "prod",
    "norm",
]

CASES = [
    *[unary(name) for name in SMOOTH_OR_STEPPED],
    *[
        unary(name, positive)
        for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "lgamma")
    ],
    *[unary(name, unit) for name in ("asin", "acos", "atanh", "erfinv")],
    *[
        unary(name, backward=False)
        for name in ("isnan", "isfinite", "signbit", "argmax", "nonzero")
    ],
    *[binary(name) for name in ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "atan2")],
    *[binary(name) for name in ("fmod", "remainder", "hypot", "logaddexp", "copysign")],
    *[binary(name, backward=False) for name in ("eq", "lt", "ge", "logical_and", "floor_divide")],
    Case("add_alpha", lambda a, b: torch.add(a, b, alpha=0.3), lambda: (floats(4, 4), floats(4))),
    Case("add_promotion", lambda a, b: a + b, lambda: (floats(4), integers(9, 4))),
    Case("add_scalar_on_cpu", lambda a: a + torch.tensor(2.5), lambda: (floats(4),)),
    Case(
        "bitwise", lambda a, b: (a & b) | (a ^ 3) << 1, lambda: (integers(99, 9), integers(99, 9))
    ),
    Case("addcmul", torch.addcmul, lambda: (floats(4, 5), floats(4, 5), floats(5))),
    Case("addcdiv", torch.addcdiv, lambda: (floats(4, 5), floats(4, 5), positive(5))),
    Case("lerp", lambda a, b: torch.lerp(a, b, 0.3), lambda: (floats(6), floats(6))),
    Case("clamp", lambda a: a.clamp(-0.5, 0.5), lambda: (floats(40),)),
    Case("where", torch.where, lambda: (mask(5, 6), floats(5, 6), floats(6))),
    Case("masked_fill", lambda a, m: a.masked_fill(m, -1.0), lambda: (floats(5, 6), mask(5, 6))),
    Case("masked_select", torch.masked_select, lambda: (floats(5, 6), mask(5, 6))),
    Case("masked_scatter", torch.masked_scatter, lambda: (floats(4, 4), mask(4, 4), floats(16))),
    Case("sum_dim", lambda a: a.sum((0, 2), keepdim=True), lambda: (floats(3, 4, 5),)),
    Case("mean_dim", lambda a: a.mean(-1), lambda: (floats(3, 4, 5),)),
    Case("amax", lambda a: a.amax(1), lambda: (floats(3, 4, 5),)),
    Case("max_dim", lambda a: torch.max(a, 1), lambda: (floats(3, 8),)),
    Case("min_dim", lambda a: torch.min(a, 1), lambda: (floats(3, 8),)),
    Case("median", lambda a: torch.median(a, 1), lambda: (floats(3, 9),)),
    Case("var_mean", lambda a: torch.var_mean(a, 1), lambda: (floats(3, 9),)),
    Case("vector_norm", lambda a: torch.linalg.vector_norm(a, 3.0), lambda: (floats(3, 9),)),
    Case("logsumexp", lambda a: torch.logsumexp(a, 1), lambda: (floats(3, 9),)),
    Case("cumsum", lambda a: a.cumsum(1), lambda: (floats(3, 9),)),
    Case("cumprod", lambda a: a.cumprod(1), lambda: (floats(3, 9),)),
    Case("cummax", lambda a: torch.cummax(a, 1), lambda: (floats(3, 9),)),
    Case("sort", lambda a: torch.sort(a, descending=True), lambda: (floats(4, 9),)),
    Case("topk", lambda a: torch.topk(a, 3), lambda: (floats(4, 9),)),
    Case("kthvalue", lambda a: torch.kthvalue(a, 3), lambda: (floats(4, 9),)),
    Case(
        "unique", lambda a: torch.unique(a, return_counts=True), lambda: (integers(5, 30),), False
    ),
    Case("bincount", torch.bincount, lambda: (integers(9, 50),), False),
    Case("histc", lambda a: torch.histc(a, 8, -2, 2), lambda: (floats(99),), False),
    Case("searchsorted", torch.searchsorted, lambda: (floats(9).sort()[0], floats(5)), False),
    Case("cat", lambda a, b: torch.cat([a, b], 1), lambda: (floats(3, 4), floats(3, 2))),
    Case("stack", lambda a, b: torch.stack([a, b]), lambda: (floats(3, 4), floats(3, 4))),
    Case("split", lambda a: torch.split(a, [1, 3], 1), lambda: (floats(3, 4),)),
    Case("pad", lambda a: F.pad(a, (1, 2), value=0.5), lambda: (floats(3, 4),)),
    Case("reflection_pad", lambda a: F.pad(a, (1, 2), "reflect"), lambda: (floats(2, 3, 5),)),
    Case("repeat", lambda a: a.repeat(2, 3), lambda: (floats(3, 4),)),
    Case(
        "repeat_interleave",
        lambda a, n: a.repeat_interleave(n),
        lambda: (floats(4), integers(3, 4)),
    ),
    Case("roll", lambda a: a.roll((1, 2), (0, 1)), lambda: (floats(3, 4),)),
    Case("flip", lambda a: a.flip(1), lambda: (floats(3, 4),)),
    Case("tril", lambda a: a.tril(-1), lambda: (floats(4, 4),)),
    Case("diag", lambda a: torch.diag(a), lambda: (floats(4),)),
    Case("permuted_clone", lambda a: a.permute(2, 0, 1).contiguous(), lambda: (floats(3, 4, 5),)),
    Case("strided_slice", lambda a: a[:, ::2] * 2, lambda: (floats(4, 8),)),
    Case("to_bfloat16", lambda a: a.to(torch.bfloat16) * 3, lambda: (floats(4, 8),)),
    Case("to_half_and_back", lambda a: a.half().float(), lambda: (floats(4, 8),)),
    Case("index", lambda a, i: a[i], lambda: (floats(6, 3), integers(6, 9))),
    Case("index_mask", lambda a, m: a[m], lambda: (floats(6, 3), mask(6))),
    Case("index_cpu_indices", lambda a: a[torch.tensor([0, 2])], lambda: (floats(6, 3),)),
    Case(
        "index_put",
        lambda a, i, v: a.index_put((i,), v, True),
        lambda: (floats(6), integers(6, 4), floats(4)),
    ),
    Case("index_select", lambda a, i: a.index_select(1, i), lambda: (floats(3, 6), integers(6, 4))),
    Case(
        "index_add",
        lambda a, i, b: a.index_add(0, i, b),
        lambda: (floats(6, 2), integers(6, 4), floats(4, 2)),
    ),
    Case("gather", lambda a, i: a.gather(1, i), lambda: (floats(3, 6), integers(6, 3, 4))),
    Case(
        "scatter_add",
        lambda a, i, b: a.scatter_add(1, i, b),
        lambda: (floats(3, 6), integers(6, 3, 4), floats(3, 4)),
    ),
    Case(
        "take_along_dim",
        lambda a, i: a.take_along_dim(i, 0),
        lambda: (floats(6, 3), integers(6, 2, 3)),
    ),
    Case("one_hot", lambda a: F.one_hot(a, 7), lambda: (integers(7, 9),), False),
    Case("embedding", lambda w, i: F.embedding(i, w), lambda: (floats(9, 4), integers(9, 3, 5))),
    Case(
        "embedding_bag",
        lambda w, i: F.embedding_bag(i, w, mode="sum"),
        lambda: (floats(9, 4), integers(9, 3, 5)),
    ),
    Case("mm", torch.mm, lambda: (floats(7, 9), floats(9, 5))),
    Case("bmm", torch.bmm, lambda: (floats(3, 7, 9), floats(3, 9, 5))),
    Case("matmul_broadcast", torch.matmul, lambda: (floats(2, 3, 4, 5), floats(5, 6))),
    Case("addmm", torch.addmm, lambda: (floats(5), floats(7, 9), floats(9, 5))),
    Case("baddbmm", torch.baddbmm, lambda: (floats(3, 4, 5), floats(3, 4, 6), floats(3, 6, 5))),
    Case("mv", torch.mv, lambda: (floats(7, 9), floats(9))),
    Case("dot", torch.dot, lambda: (floats(9), floats(9))),
    Case("outer", torch.outer, lambda: (floats(4), floats(5))),
    Case(
        "einsum",
        lambda a, b: torch.einsum("bij,bkj->bik", a, b),
        lambda: (floats(2, 3, 4), floats(2, 5, 4)),
    ),
    Case("linear", F.linear, lambda: (floats(3, 4, 8), floats(5, 8), floats(5))),
    Case("cholesky", torch.linalg.cholesky, lambda: (spd(5),)),
    Case("inverse", torch.linalg.inv, lambda: (spd(5),)),
    Case("solve", torch.linalg.solve, lambda: (spd(5), floats(5, 2))),
    Case("det", torch.linalg.det, lambda: (spd(4),)),
    Case("eigvalsh", torch.linalg.eigvalsh, lambda: (spd(5),), False),
    Case("svdvals", torch.linalg.svdvals, lambda: (floats(5, 4),), False),
    Case("qr", lambda a: torch.linalg.qr(a), lambda: (floats(6, 4),)),
    Case("fft", lambda a: torch.fft.rfft(a).abs(), lambda: (floats(4, 16),)),
    Case(
        "complex_multiply",
        lambda a, b: torch.complex(a, b) * (1 + 2j),
        lambda: (floats(8), floats(8)),
        False,
    ),
    Case(
        "conjugate",
        lambda a, b: torch.complex(a, b).conj() + 1,
        lambda: (floats(8), floats(8)),
        False,
    ),
    Case("relu", F.relu, lambda: (floats(4, 9),)),
    Case("gelu", F.gelu, lambda: (floats(4, 9),)),
    Case("gelu_tanh", lambda a: F.gelu(a, approximate="tanh"), lambda: (floats(4, 9),)),
    Case("silu", F.silu, lambda: (floats(4, 9),)),
    Case("softplus", F.softplus, lambda: (floats(4, 9),)),
    Case("leaky_relu", F.leaky_relu, lambda: (floats(4, 9),)),
    Case("elu", F.elu, lambda: (floats(4, 9),)),
    Case("hardswish", F.hardswish, lambda: (floats(4, 9),)),
    Case("mish", F.mish, lambda: (floats(4, 9),)),
    Case("glu", F.glu, lambda: (floats(4, 8),)),
    Case("softmax", lambda a: F.softmax(a, -1), lambda: (floats(4, 9),)),
    Case("log_softmax", lambda a: F.log_softmax(a, -1), lambda: (floats(4, 9),)),
    Case("cross_entropy", F.cross_entropy, lambda: (floats(6, 9), integers(9, 6))),
    Case("nll_loss", F.nll_loss, lambda: (floats(6, 9), integers(9, 6))),
    Case("mse_loss", F.mse_loss, lambda: (floats(6, 9), floats(6, 9))),
    Case("l1_loss", F.l1_loss, lambda: (floats(6, 9), floats(6, 9))),
    Case("smooth_l1_loss", F.smooth_l1_loss, lambda: (floats(6, 9), floats(6, 9))),
    Case(
        "bce_with_logits",
        F.binary_cross_entropy_with_logits,
        lambda: (floats(6, 3), unit(6, 3).abs()),
    ),
    Case(
        "kl_div",
        lambda a, b: F.kl_div(a, b, reduction="batchmean"),
        lambda: (floats(6, 3), positive(6, 3)),
    ),
    Case(
        "layer_norm",
        lambda a, w, b: F.layer_norm(a, (8,), w, b),
        lambda: (floats(3, 8), floats(8), floats(8)),
    ),
    Case(
        "group_norm",
        lambda a, w, b: F.group_norm(a, 2, w, b),
        lambda: (floats(3, 4, 5), floats(4), floats(4)),
    ),
    Case(
        "batch_norm",
        lambda a, w, b: F.batch_norm(a, None, None, w, b, True),
        lambda: (floats(6, 4, 3), floats(4), floats(4)),
    ),
    Case(
        "rms_norm",
        lambda a, w: F.rms_norm(a, (8,), w),
        lambda: (floats(3, 8), floats(8)),
        True,
        1e-5,
    ),
    Case(
        "conv1d",
        lambda a, w, b: F.conv1d(a, w, b, padding=1),
        lambda: (floats(2, 3, 9), floats(4, 3, 3), floats(4)),
    ),
    Case(
        "conv2d",
        lambda a, w, b: F.conv2d(a, w, b, stride=2),
        lambda: (floats(2, 3, 9, 9), floats(4, 3, 3, 3), floats(4)),
    ),
    Case(
        "conv2d_depthwise",
        lambda a, w: F.conv2d(a, w, groups=4),
        lambda: (floats(2, 4, 9, 9), floats(4, 1, 3, 3)),
    ),
    Case(
        "conv3d",
        lambda a, w: F.conv3d(a, w),
        lambda: (floats(1, 2, 5, 5, 5), floats(3, 2, 3, 3, 3)),
    ),
    Case(
        "conv_transpose2d",
        lambda a, w: F.conv_transpose2d(a, w, stride=2),
        lambda: (floats(2, 3, 5, 5), floats(3, 4, 3, 3)),
    ),
    Case("max_pool2d", lambda a: F.max_pool2d(a, 2), lambda: (floats(2, 3, 8, 8),)),
    Case("avg_pool2d", lambda a: F.avg_pool2d(a, 2), lambda: (floats(2, 3, 8, 8),)),
    Case(
        "adaptive_avg_pool2d", lambda a: F.adaptive_avg_pool2d(a, 3), lambda: (floats(2, 3, 8, 8),)
    ),
    Case(
        "interpolate",
        lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
        lambda: (floats(1, 2, 4, 4),),
    ),
    Case("pixel_shuffle", lambda a: F.pixel_shuffle(a, 2), lambda: (floats(1, 4, 3, 3),)),
    Case("unfold", lambda a: F.unfold(a, 2), lambda: (floats(1, 2, 5, 5),)),
    Case(
        "grid_sample",
        lambda a, g: F.grid_sample(a, g, align_corners=False),
        lambda: (floats(1, 2, 5, 5), unit(1, 3, 3, 2)),
    ),
    Case(
        "ctc_loss",
        lambda a: F.ctc_loss(a.log_softmax(-1), torch.tensor([[1, 2]]), (8,), (2,)),
        lambda: (floats(8, 1, 5),),
    ),
    Case("cdist", torch.cdist, lambda: (floats(4, 3), floats(5, 3))),
    Case("cosine_similarity", F.cosine_similarity, lambda: (floats(4, 3), floats(4, 3))),
    Case("empty_tensors", lambda a, b: torch.cat([a, b]) * 2, lambda: (floats(0, 3), floats(0, 3))),
]


def to_device(values: tuple[Any, ...], device: str, *, leaves: bool) -> list[Any]:
    result = []
    for value in values:
        moved = value.detach().to(device, copy=True)
        result.append(moved.requires_grad_(leaves and moved.is_floating_point()))
    return result


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]


def run(case: Case, device: str) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(SHAPES_SEED)
    inputs = to_device(case.inputs(), device, leaves=case.backward)
    outputs = tensors_of(case.function(*inputs))
    if case.backward:
        total = sum(o.float().sum() for o in outputs if o.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
    return outputs, [i.grad for i in inputs]


def assert_equal(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    if expected is None:
        assert actual is None
        return
    assert actual is not None
    assert actual.is_cuda
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_equals_cpu(case: Case) -> None:
    expected, expected_grads = run(case, "cpu")
    actual, actual_grads = run(case, "cuda")
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e, case.tolerance)
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert_equal(a, e, case.tolerance)


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 100

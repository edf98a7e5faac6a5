"""A training step of ResNet-50 v1.5 as its operators, in mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks._calibration._walk import Walk
from spillover.emulator import _costs
from spillover.emulator._profiles import Profile

_HALF = 2
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_PARAMETERS = 25_557_032


@dataclass(frozen=True, kw_only=True)
class ResNet50:
    """How the published run trained it."""

    batch: int
    #: In "nchw" each convolution transposes its operands for the Tensor Cores.
    layout: Literal["nhwc", "nchw"] = "nhwc"
    image: int = 224


@dataclass(frozen=True)
class _Convolution:
    shape: _costs.ConvolutionShape
    relu: bool


def images_per_second(profile: Profile, model: ResNet50, dtype: _costs.DType) -> float:
    """Training throughput of one card."""
    return model.batch / step_ns(profile, model, dtype) * 1e9


def step_ns(profile: Profile, model: ResNet50, dtype: _costs.DType) -> int:
    """Duration of one training step."""
    walk = Walk(profile, dtype)
    for index, convolution in enumerate(_convolutions(model)):
        _train(walk, model, convolution, needs_input_gradient=index > 0)
    for elements in _residual_sums(model):
        # Forward: two reads and a write. Backward: the sum of both branches' gradients.
        walk.moves(3 * elements * _HALF, times=2)
    stem = model.batch * 64 * (model.image // 2) ** 2
    walk.moves(stem * _HALF * 5 / 4, times=2)  # max pooling
    walk.matmul(model.batch, 1000, 2048, times=3)
    walk.moves(28 * _PARAMETERS)
    return walk.total_ns()


def _train(
    walk: Walk, model: ResNet50, convolution: _Convolution, *, needs_input_gradient: bool
) -> None:
    shape = convolution.shape
    inputs, _, outputs = shape.elements
    passes: list[_costs.ConvolutionPass] = ["forward", "weight_gradient"]
    if needs_input_gradient:
        passes.append("input_gradient")
    for which in passes:
        walk.convolution(shape, which)
        if model.layout == "nchw":
            walk.moves(2 * inputs * _HALF)
            walk.moves(2 * outputs * _HALF)
    # Batch norm: statistics, then normalisation; backward reads both operands twice.
    walk.moves(outputs * _HALF)
    walk.moves(2 * outputs * _HALF)
    walk.moves(2 * outputs * _HALF)
    walk.moves(3 * outputs * _HALF)
    if convolution.relu:
        walk.moves(2 * outputs * _HALF)
        walk.moves(3 * outputs * _HALF)


def _convolutions(model: ResNet50) -> Iterator[_Convolution]:
    size = model.image
    yield _Convolution(_shape(model, 3, 64, size, 7, 2), relu=True)
    size, channels = size // 4, 64
    for width, blocks, first_stride in _STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            yield _Convolution(_shape(model, channels, width, size, 1, 1), relu=True)
            yield _Convolution(_shape(model, width, width, size, 3, stride), relu=True)
            out = size // stride
            # The ReLU after the sum counts with the last convolution of the block.
            yield _Convolution(_shape(model, width, 4 * width, out, 1, 1), relu=True)
            if block == 0:
                yield _Convolution(_shape(model, channels, 4 * width, size, 1, stride), relu=False)
            size, channels = out, 4 * width


def _residual_sums(model: ResNet50) -> Iterator[int]:
    size = model.image // 4
    for width, blocks, first_stride in _STAGES:
        size //= first_stride
        for _ in range(blocks):
            yield model.batch * 4 * width * size * size


def _shape(
    model: ResNet50, channels: int, filters: int, size: int, kernel: int, stride: int
) -> _costs.ConvolutionShape:
    return _costs.ConvolutionShape(
        n=model.batch,
        channels=channels,
        height=size,
        width=size,
        filters=filters,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
    )

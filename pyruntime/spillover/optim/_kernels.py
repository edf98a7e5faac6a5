"""The optimizer's CPU kernels on torch tensors: one pass over memory, on all cores.

Everything here takes flat, contiguous CPU tensors of one dimension (``_layout.flat_view`` gives
them), checks them, and calls the compiled kernels with the interpreter's lock released. The calls
block until the work is done, read and write memory at once, and order nothing on streams: wait for
the copies that bring gradients before, and start those that take weights afterwards. Results do not
depend on threads, instruction set or cutting (``csrc/optim/update.hpp``, Note [Same bits]).

All functions raise ConfigError, with nothing changed, for arguments of a wrong type, size,
device or layout, and for arrays that overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from spillover import _core
from spillover._core import BLOCK_ELEMENTS, SquareSum
from spillover._errors import ConfigError

#: Formats of moments; ``csrc/optim/elements.hpp``, Note [Formats of moments], has their errors.
MomentFormat = Literal["float32", "bfloat16", "blockwise8"]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_LOW = (torch.bfloat16, torch.float16)
_MOMENTS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Blockwise:
    """A moment in 8 bits: ``codes`` (n, uint8) and ``scales`` (ceil(n / 256), float32).

    Zeros stand for zero. Parts of a moment begin at multiples of ``BLOCK_ELEMENTS``.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def part(self, start: int, count: int) -> Blockwise:
        """Elements ``start`` to ``start + count``, over the same memory."""
        if start % BLOCK_ELEMENTS != 0:
            raise ConfigError(
                f"an 8-bit moment cannot be cut at {start}; cut at multiples of {BLOCK_ELEMENTS}"
            )
        first = start // BLOCK_ELEMENTS
        blocks = -(-count // BLOCK_ELEMENTS)
        return Blockwise(self.codes[start : start + count], self.scales[first : first + blocks])


Moment = torch.Tensor | Blockwise


@dataclass(frozen=True, eq=False)
class Range:
    """A contiguous part of a parameter with all that a step reads and writes of it.

    Make one with :func:`make_range`; it may be used for many steps. It holds its tensors.
    """

    core: _core.UpdateRange
    tensors: tuple[torch.Tensor, ...] = field(repr=False)

    @property
    def count(self) -> int:
        """Elements."""
        return self.core.count

    @property
    def step(self) -> int:
        """Number of the next step, from 1: what torch's state calls ``step`` after it."""
        return self.core.step

    @step.setter
    def step(self, value: int) -> None:
        self.core.step = value


def make_range(
    *,
    gradient: torch.Tensor,
    weight: torch.Tensor | None = None,
    low_weight: torch.Tensor | None = None,
    remainder: torch.Tensor | None = None,
    first: Moment | None = None,
    second: Moment | None = None,
    second_max: Moment | None = None,
    step: int = 1,
    first_index: int = 0,
) -> Range:
    """Describe ``n`` elements of a parameter.

    Parameters
    ----------
    gradient
        (n,) float32, bfloat16 or float16; read.
    weight
        (n,) float32, the weight itself or its master; read and written.
    low_weight
        (n,) bfloat16 or float16, rounded to nearest, ties to even; written only, past the caches
        where there is much of it.
    remainder
        (n,) int16, instead of ``weight``: the master is ``low_weight`` (bfloat16, then read too)
        and this; see :func:`join_weights`. Ties round away from zero then.
    first, second, second_max
        (n,) float32 or bfloat16, or :class:`Blockwise`: ``exp_avg`` or ``momentum_buffer``;
        ``exp_avg_sq`` or ``sum``; ``max_exp_avg_sq``. Read and written.
    step
        Number of the next step, from 1. SGD does not read its momentum at step 1.
    first_index
        Where the range begins in its parameter. Only bfloat16 moments depend on it, whose rounding
        is random by element and step, and 8-bit ones need a multiple of ``BLOCK_ELEMENTS``.
    """
    count = gradient.numel()
    tensors: list[torch.Tensor] = []

    def address(
        name: str, tensor: torch.Tensor | None, types: Sequence[torch.dtype], size: int = count
    ) -> int:
        if tensor is None:
            return 0
        tensors.append(tensor)
        return _address(name, tensor, types, size)

    def moment(
        name: str, value: Moment | None
    ) -> tuple[int, str] | tuple[int, Literal["blockwise8"], int] | None:
        if value is None:
            return None
        if isinstance(value, Blockwise):
            codes = address(f"{name}.codes", value.codes, (torch.uint8,))
            blocks = -(-count // BLOCK_ELEMENTS)
            scales = address(f"{name}.scales", value.scales, (torch.float32,), blocks)
            return codes, "blockwise8", scales
        return address(name, value, _MOMENTS), _NAMES[value.dtype]

    if low_weight is None and remainder is not None:
        raise ConfigError("a remainder needs its low_weight, of bfloat16")
    core = _core.UpdateRange(
        count=count,
        gradient=address("gradient", gradient, tuple(_NAMES)),
        gradient_type=_NAMES[gradient.dtype],
        weight=address("weight", weight, (torch.float32,)),
        low_weight=address("low_weight", low_weight, _LOW),
        low_weight_type="bfloat16" if low_weight is None else _NAMES[low_weight.dtype],
        remainder=address("remainder", remainder, (torch.int16,)),
        first=moment("first", first),
        second=moment("second", second),
        second_max=moment("second_max", second_max),
        step=step,
        first_index=first_index,
    )
    return Range(core, tuple(tensors))


def adam(
    ranges: Iterable[Range],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool = False,
    maximize: bool = False,
    gradient_scale: float = 1.0,
    threads: int = 0,
) -> None:
    """One step of Adam, with decoupled decay of AdamW; options as torch's.

    Gradients count ``gradient_scale`` times, which folds unscaling and clipping in. ``threads``: at
    most, 0 for :func:`spillover._core.optimizer_threads`.
    """
    _core.update_adam(
        [each.core for each in ranges],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
        gradient_scale=gradient_scale,
        threads=threads,
    )


def sgd(
    ranges: Iterable[Range],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    gradient_scale: float = 1.0,
    threads: int = 0,
) -> None:
    """One step of SGD as torch's; ranges have ``first`` if there is momentum, and only then."""
    _core.update_sgd(
        [each.core for each in ranges],
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        gradient_scale=gradient_scale,
        threads=threads,
    )


def lion(
    ranges: Iterable[Range],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    maximize: bool = False,
    gradient_scale: float = 1.0,
    threads: int = 0,
) -> None:
    """One step of Lion (Chen et al., 2023, algorithm 2); ranges have ``first``."""
    _core.update_lion(
        [each.core for each in ranges],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        maximize=maximize,
        gradient_scale=gradient_scale,
        threads=threads,
    )


def adagrad(
    ranges: Iterable[Range],
    *,
    lr: float,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    gradient_scale: float = 1.0,
    threads: int = 0,
) -> None:
    """One step of Adagrad as torch's; ``second`` is ``sum``, at first the initial accumulator."""
    _core.update_adagrad(
        [each.core for each in ranges],
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
        gradient_scale=gradient_scale,
        threads=threads,
    )


def accumulate(
    accumulators: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    *,
    scale: float = 1.0,
    add: bool = True,
    is_cached: bool = False,
    threads: int = 0,
) -> SquareSum:
    """``accumulator += scale * gradient``, or ``=``, and the exact sum of what is then squared.

    Parameters
    ----------
    accumulators, gradients
        Pairs of (n,) tensors: float32; float32, bfloat16 or float16.
    scale
        Of gradients; in fp32, in one operation with the addition.
    add
        False overwrites accumulators without reading them.
    is_cached
        Accumulators were written just before, few enough to be in the processor's caches still. It
        changes nothing but what the emulated device's clock takes the call to move of memory.
    threads
        At most; 0 for :func:`spillover._core.optimizer_threads`.

    Returns
    -------
    SquareSum
        Of all accumulators of this call. Its ``value`` is a float, inf or NaN where an element is.
        Sums of parts that are cut at multiples of ``BLOCK_ELEMENTS`` can be added in any order.
    """
    return _core.accumulate(
        [
            (
                _address("accumulator", accumulator, (torch.float32,), gradient.numel()),
                _array("gradient", gradient),
            )
            for accumulator, gradient in zip(accumulators, gradients, strict=True)
        ],
        scale=scale,
        add=add,
        is_cached=is_cached,
        threads=threads,
    )


def sum_of_squares(tensors: Sequence[torch.Tensor], *, threads: int = 0) -> SquareSum:
    """The exact sum of the squares of all elements; as for :func:`accumulate`."""
    return _core.sum_of_squares([_array("tensor", each) for each in tensors], threads=threads)


def scale(tensors: Sequence[torch.Tensor], factor: float, *, threads: int = 0) -> None:
    """Multiply in place, in fp32, and round to nearest, ties to even."""
    _core.scale_elements(
        [_array("tensor", each) for each in tensors], factor=factor, threads=threads
    )


class NonFinite(NamedTuple):
    """How many elements are inf or NaN, and the first of them: tensor and element."""

    total: int
    tensor: int
    element: int


def find_non_finite(tensors: Sequence[torch.Tensor], *, threads: int = 0) -> NonFinite | None:
    """The elements that are inf or NaN; None where there are none."""
    found = _core.find_non_finite([_array("tensor", each) for each in tensors], threads=threads)
    return NonFinite(*found) if found[0] else None


def encode_blockwise(values: torch.Tensor, *, signed: bool, into: Blockwise) -> None:
    """Write (n,) float32 ``values`` as a moment in 8 bits."""
    count = values.numel()
    _core.encode_blockwise(
        _address("values", values, (torch.float32,), count),
        *_blockwise_addresses(into, count),
        count=count,
        is_signed=signed,
        threads=0,
    )


def decode_blockwise(moment: Blockwise, *, signed: bool, into: torch.Tensor) -> None:
    """Write a moment in 8 bits to (n,) float32 ``into``; encoded again it is the same."""
    count = into.numel()
    _core.decode_blockwise(
        *_blockwise_addresses(moment, count),
        _address("into", into, (torch.float32,), count),
        count=count,
        is_signed=signed,
        threads=0,
    )


def join_weights(low_weight: torch.Tensor, remainder: torch.Tensor, into: torch.Tensor) -> None:
    """Write the float32 masters of (n,) bfloat16 weights and int16 remainders.

    The master's bits are the weight's, shifted by 16, plus the remainder.
    """
    count = into.numel()
    _core.join_weights(
        _address("low_weight", low_weight, (torch.bfloat16,), count),
        _address("remainder", remainder, (torch.int16,), count),
        _address("into", into, (torch.float32,), count),
        count=count,
        threads=0,
    )


def split_weights(weight: torch.Tensor, low_weight: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write (n,) float32 masters as the nearest bfloat16, ties away from zero, and remainders."""
    count = weight.numel()
    _core.split_weights(
        _address("weight", weight, (torch.float32,), count),
        _address("low_weight", low_weight, (torch.bfloat16,), count),
        _address("remainder", remainder, (torch.int16,), count),
        count=count,
        threads=0,
    )


def _blockwise_addresses(moment: Blockwise, count: int) -> tuple[int, int]:
    blocks = -(-count // BLOCK_ELEMENTS)
    return (
        _address("codes", moment.codes, (torch.uint8,), count),
        _address("scales", moment.scales, (torch.float32,), blocks),
    )


def _array(name: str, tensor: torch.Tensor) -> tuple[int, str, int]:
    address = _address(name, tensor, tuple(_NAMES), tensor.numel())
    return address, _NAMES[tensor.dtype], tensor.numel()


def _address(name: str, tensor: torch.Tensor, types: Sequence[torch.dtype], count: int) -> int:
    if tensor.dtype not in types:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in types)
        raise ConfigError(f"{name} is {tensor.dtype}; it must be {wanted}")
    if tensor.device.type != "cpu":
        raise ConfigError(f"{name} is on {tensor.device}; the kernels work on CPU tensors")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ConfigError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be flat"
        )
    if tensor.numel() != count:
        raise ConfigError(f"{name} has {tensor.numel()} elements; it must have {count}")
    return tensor.data_ptr()

"""Masters of low-precision weights when something else has written the weight, whole and split.

All block the host. Weights may be on a device, and are then read on the current stream.
"""

from __future__ import annotations

import torch

from spillover._layout import flat_view
from spillover.optim import _kernels

# Elements at a time, where 8 bytes of temporaries an element are needed.
_PART_ELEMENTS = 4 << 20
_MAGNITUDE_BITS = 0x7FFF
_INFINITY_BITS = 0x7F80
_HALF_UNIT = 1 << 15


def refresh_master(parameter: torch.Tensor, master: torch.Tensor) -> None:
    """Have ``master`` be the weight where its rounded value is another."""
    weight = parameter.detach().to("cpu")
    torch.where(master.to(weight.dtype) == weight, master, weight.float(), out=master)


def split_master(parameter: torch.Tensor, master: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write remainders of a bfloat16 weight on the host, 0 where it is not ``master`` rounded."""
    ordered = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=torch.float32, device="cpu"
    ).copy_(master)
    weights, masters = flat_view(parameter.detach()), flat_view(ordered)
    remainders = flat_view(remainder)
    for start in range(0, weights.numel(), _PART_ELEMENTS):
        part = slice(start, start + _PART_ELEMENTS)
        weight_bits = weights[part].view(torch.int16).to(torch.int64)
        # The bits of a float32 with 16 zeros behind the weight's.
        upper = weight_bits << 16
        difference = masters[part].view(torch.int32).to(torch.int64) - upper
        fits = (difference.abs() <= _HALF_UNIT) & (
            weight_bits.bitwise_and(_MAGNITUDE_BITS) < _INFINITY_BITS
        )
        # Half a unit up does not fit, and is what a tie to even leaves.
        remainders[part].copy_(torch.where(fits, difference, 0).clamp_(-_HALF_UNIT, _HALF_UNIT - 1))


def whole_master(parameter: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight and its remainders, in pageable memory."""
    weight = parameter.detach().to("cpu")
    master = torch.empty_strided(
        remainder.shape, remainder.stride(), dtype=torch.float32, device="cpu"
    )
    ordered = torch.empty_strided(
        remainder.shape, remainder.stride(), dtype=torch.bfloat16, device="cpu"
    ).copy_(weight)
    _kernels.join_weights(flat_view(ordered), flat_view(remainder), flat_view(master))
    return master


def drop_odd_remainders(parameter: torch.Tensor, remainder: torch.Tensor) -> None:
    """Forget remainders of weights with which they make no number close to the weight.

    That is 0, from which a negative remainder would make NaN, and what is not finite.
    """
    bits = flat_view(parameter.detach()).view(torch.int16).bitwise_and(_MAGNITUDE_BITS)
    flat_view(remainder).masked_fill_((bits == 0) | (bits >= _INFINITY_BITS), 0)

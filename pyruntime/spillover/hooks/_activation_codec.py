"""Smaller forms of saved tensors on their way out of the device, where the user asks for them.

bfloat16: float32 rounded to nearest even; relative error of a value at most 2^-8.

blockwise8: float32, bfloat16 and float16 as 8-bit integers and a float32 scale for each block of
256 values: a value's error is at most 1/254 of the greatest magnitude of its block (and the
rounding to its own type). A block with NaN or infinity comes back as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Codec = Literal["bfloat16", "blockwise8"]

_BLOCK = 256
_STEPS = 127.0
#: Values that are worked on at a time.
_SLICE = 1 << 20


@dataclass(frozen=True, eq=False, slots=True)
class Encoding:
    """How bytes that left are turned into what was saved.

    Attributes
    ----------
    dtype
        Of what was saved.
    size_bytes
        That left.
    decode
        Makes the flat tensor of that type from the flat bytes that left, on the current stream.
    """

    dtype: torch.dtype
    size_bytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


def encode(codec: Codec, flat: torch.Tensor) -> tuple[torch.Tensor, Encoding] | None:
    """Bytes to send in place of ``flat``, and how to read them; None where they go as they are.

    Works on the current stream, and allocates there: what is sent, and workspace of a few MiB.
    """
    if codec == "bfloat16":
        if flat.dtype is not torch.float32:
            return None
        sent = flat.to(torch.bfloat16).view(torch.uint8)
        return sent, Encoding(flat.dtype, sent.nbytes, _from_bfloat16)
    if flat.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    sent = _to_blocks(flat)
    return sent, Encoding(flat.dtype, sent.nbytes, _Blocks(flat.numel(), flat.dtype))


def _from_bfloat16(sent: torch.Tensor) -> torch.Tensor:
    return sent.view(torch.bfloat16).to(torch.float32)


def _parts(sent: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales, one a block, and the steps, as many as values."""
    blocks = -(-count // _BLOCK)
    return sent[: 4 * blocks].view(torch.float32), sent[4 * blocks :].view(torch.int8)


def _to_blocks(flat: torch.Tensor) -> torch.Tensor:
    count = flat.numel()
    sent = torch.empty(4 * -(-count // _BLOCK) + count, dtype=torch.uint8, device=flat.device)
    scales, steps = _parts(sent, count)
    for start in range(0, count, _SLICE):
        values = flat[start : start + _SLICE].float()
        padding = -values.numel() % _BLOCK
        blocks = torch.nn.functional.pad(values, (0, padding)).view(-1, _BLOCK)
        scale = blocks.abs().amax(dim=1) / _STEPS
        blocks = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
        # Of a block with what is not finite nothing is kept but the scale, which says so.
        rounded = blocks.round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.int8)
        first = start // _BLOCK
        scales[first : first + scale.numel()] = torch.where(scale.isfinite(), scale, torch.nan)
        steps[start : start + values.numel()] = rounded.view(-1)[: values.numel()]
    return sent


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Reads what ``_to_blocks`` made."""

    count: int
    dtype: torch.dtype

    def __call__(self, sent: torch.Tensor) -> torch.Tensor:
        scales, steps = _parts(sent, self.count)
        flat = torch.empty(self.count, dtype=self.dtype, device=sent.device)
        for start in range(0, self.count, _SLICE):
            values = steps[start : start + _SLICE].float()
            first = start // _BLOCK
            spread = scales[first : first + _SLICE // _BLOCK].repeat_interleave(_BLOCK)
            flat[start : start + values.numel()] = values.mul_(spread[: values.numel()])
        return flat

"""How to call operators that torch has for CUDA alone: there, and in plain terms on the CPU.

Both functions take what the operator's samples hold and return the same results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Functions that must agree."""

    on_device: Callable[..., Any]
    on_cpu: Callable[..., Any]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over (batch, length, heads, size) tensors, and the logsumexp of its scores."""
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (query, key, value))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.masked_fill(~visible, -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout, training=True)
    output = (weights @ v).transpose(1, 2).to(query.dtype)
    return output, scores.detach().logsumexp(-1)


def _visible(queries: int, keys: int, diagonal: int | None) -> Tensor:
    everything = torch.ones(queries, keys, dtype=torch.bool)
    return everything if diagonal is None else everything.tril(diagonal)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, is_causal: bool, **others: Any
) -> tuple[Tensor, Tensor]:
    shift = key.shape[1] - query.shape[1] if is_causal else None
    visible = _visible(query.shape[1], key.shape[1], shift)
    return _attention(query, key, value, visible, dropout_p, others["scale"])


def _flash_on_device(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(*arguments, **keywords)
    return output, logsumexp.detach()


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float,
    custom_mask_type: int,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    shift = {0: None, 1: 0, 2: key.shape[1] - query.shape[1]}[custom_mask_type]
    visible = _visible(query.shape[1], key.shape[1], shift)
    return _attention(query, key, value, visible, dropout_p, others["scale"])


def _efficient_on_device(
    query: Tensor, *arguments: Any, compute_log_sumexp: bool, **keywords: Any
) -> tuple[Tensor, Tensor]:
    output, logsumexp, *_ = torch.ops.aten._efficient_attention_forward(
        query, *arguments, compute_log_sumexp=True, **keywords
    )
    # Rows are padded to whole blocks.
    return output, logsumexp.detach()[..., : query.shape[1]]


#: By the operator's name in ``op_db``.
PAIRS = {
    "torch_ops_aten__flash_attention_forward": Pair(_flash_on_device, _flash),
    "torch_ops_aten__efficient_attention_forward": Pair(_efficient_on_device, _efficient),
}

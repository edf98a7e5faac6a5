"""A training step of a transformer as its operators, from shapes alone.

Bytes are counted as torch's kernels move them: ``passes`` are reads and writes of one operand.
Eager code runs one kernel an operator; compiled code fuses neighbours that are elementwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks._calibration._walk import Walk
from spillover.emulator import _costs
from spillover.emulator._profiles import Profile

_HALF = 2
_SINGLE = 4


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Shapes of the model and how the published run trained it."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    batch: int
    sequence: int
    vocabulary: int = 0  # 0: no language-model head
    kv_heads: int = 0  # 0: as many as heads
    gated: bool = False
    causal: bool = True
    attention: Literal["fused", "eager", "eager_autocast", "compiled"] = "fused"
    compiled: bool = False
    fused_kernels: bool = False  # hand-written kernels for norm, activation, rotation and loss
    dropout: bool = False
    rotary: bool = False
    biases: bool = True
    stream_bytes: int = _HALF  # element size of the residual stream
    autocast: bool = False  # weights are fp32 and cast in every micro-step
    recompute: bool = False
    optimizer_bytes: int = 28  # moved a parameter by the optimizer's step
    shards: int = 1
    micro_steps: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-step."""
        return self.batch * self.sequence

    @property
    def kv_width(self) -> int:
        """Features of the keys."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)

    def layer_linears(self) -> list[tuple[int, int]]:
        """Features in and out of a layer's linear layers."""
        up = (2 if self.gated else 1) * self.ffn
        return [
            (self.hidden, self.hidden + 2 * self.kv_width),
            (self.hidden, self.hidden),
            (self.hidden, up),
            (self.ffn, self.hidden),
        ]

    def parameters(self) -> int:
        """Parameters in matrices (biases and norms are left out)."""
        layer = sum(rows * columns for rows, columns in self.layer_linears())
        return self.layers * layer + self.vocabulary * self.hidden


def step_ns(profile: Profile, model: Transformer, dtype: _costs.DType) -> int:
    """Duration of one optimizer step of ``model``."""
    micro = Walk(profile, dtype)
    for _ in range(model.layers):
        _layer_forward(micro, model)
        if model.recompute:
            _layer_forward(micro, model)
        _layer_backward(micro, model)
    _embedding(micro, model)
    if model.vocabulary:
        _head(micro, model)
    if model.autocast:
        # The cast forward, the gradient's cast back, and its accumulation.
        micro.moves(6 * model.parameters(), times=2)
    if model.micro_steps > 1:
        micro.moves(3 * _SINGLE * model.parameters())
    step = Walk(profile, dtype)
    step.moves(model.optimizer_bytes * model.parameters() / model.shards)
    return micro.total_ns() * model.micro_steps + step.total_ns()


def tokens_per_second(profile: Profile, model: Transformer, dtype: _costs.DType) -> float:
    """Training throughput of one card."""
    return model.tokens * model.micro_steps / step_ns(profile, model, dtype) * 1e9


def _joined(model: Transformer) -> bool:
    """Whether a residual addition and the norm after it are one kernel."""
    return model.compiled or model.fused_kernels


def _layer_forward(walk: Walk, model: Transformer) -> None:
    width = model.tokens * model.hidden
    stream = model.stream_bytes
    for index, (rows, columns) in enumerate(model.layer_linears()):
        if index in (0, 2):
            _norm_forward(walk, model)
        walk.linear(model.tokens, rows, columns)
        if index == 0:
            _attention(walk, model, "forward")
        elif index == 2:
            _activation(walk, model, passes_fused=2, passes_eager=2 if not model.gated else 5)
        if index in (1, 3):
            if model.dropout:
                walk.moves(width * (2 * _HALF + 1))
            if not _joined(model):
                walk.moves(width * (2 * stream + _HALF))


def _norm_forward(walk: Walk, model: Transformer) -> None:
    width = model.tokens * model.hidden
    if _joined(model):
        walk.moves(width * (2 * model.stream_bytes + 2 * _HALF))
        return
    walk.moves(width * 2 * model.stream_bytes)
    if model.stream_bytes == _SINGLE:
        walk.moves(width * (_SINGLE + _HALF))


def _activation(walk: Walk, model: Transformer, *, passes_fused: int, passes_eager: int) -> None:
    """The activation of the feed-forward part; a gated one reads two halves."""
    fused = passes_fused + (1 if model.gated else 0)
    width = model.tokens * model.ffn * _HALF
    walk.moves(width * (fused if _joined(model) else passes_eager))


def _layer_backward(walk: Walk, model: Transformer) -> None:
    width = model.tokens * model.hidden
    stream = model.stream_bytes
    for index, (rows, columns) in reversed(list(enumerate(model.layer_linears()))):
        if index in (1, 3) and model.dropout:
            walk.moves(width * (2 * _HALF + 1))
        if index == 2:
            _activation(walk, model, passes_fused=3, passes_eager=3 if not model.gated else 8)
        elif index == 0:
            _attention(walk, model, "backward")
        walk.linear_backward(model.tokens, rows, columns)
        if model.biases:
            walk.moves(model.tokens * columns * _HALF)
        if index in (0, 2):
            # The norm's input and parameter gradients, and the sum with the residual's gradient.
            if _joined(model):
                walk.moves(width * (3 * stream + _HALF))
            else:
                if stream == _SINGLE:
                    walk.moves(width * (_HALF + _SINGLE))
                walk.moves(width * 3 * stream)
                walk.moves(width * 3 * stream)
            walk.moves(width * (stream + _HALF))


def _attention(walk: Walk, model: Transformer, which: _costs.Pass) -> None:
    if model.rotary:
        width = model.tokens * (model.hidden + model.kv_width) * _HALF
        walk.moves(width * (2 if _joined(model) else 10))
    head_dim = model.hidden // model.heads
    if model.attention == "fused":
        shape = _costs.AttentionShape(
            batch=model.batch,
            heads=model.heads,
            kv_heads=model.kv_heads or model.heads,
            queries=model.sequence,
            keys=model.sequence,
            head_dim=head_dim,
            causal=model.causal,
        )
        walk.attention(shape, which)
        return
    # Bytes an element of the scores that the elementwise operators between both products move:
    # scale, mask, softmax, dropout and casts; in compiled code one softmax kernel is left.
    moved = {
        "eager": {"forward": (4, 4, 4, 5), "backward": (5, 6, 4)},
        "eager_autocast": {"forward": (4, 4, 6, 6), "backward": (6, 12, 6, 4, 4)},
        "compiled": {"forward": (4,), "backward": (6,)},
    }[model.attention][which]
    scores = model.batch * model.heads * model.sequence**2
    for element_bytes in moved:
        walk.moves(scores * element_bytes)
    batch, times = model.batch * model.heads, 1 if which == "forward" else 2
    walk.matmul(model.sequence, model.sequence, head_dim, batch=batch, times=times)
    walk.matmul(model.sequence, head_dim, model.sequence, batch=batch, times=times)
    # The heads' transposition before and after.
    walk.moves(4 * model.tokens * model.hidden * 2 * _HALF * times)


def _embedding(walk: Walk, model: Transformer) -> None:
    width = model.tokens * model.hidden * model.stream_bytes
    walk.moves(2 * width)
    walk.moves(3 * width)


def _head(walk: Walk, model: Transformer) -> None:
    walk.linear(model.tokens, model.hidden, model.vocabulary)
    walk.linear_backward(model.tokens, model.hidden, model.vocabulary)
    logits = model.tokens * model.vocabulary
    if _joined(model):
        walk.moves(logits * 3 * _HALF)
        walk.moves(logits * 2 * _HALF)
        return
    # Cast to fp32, log-softmax, its backward, cast back.
    for element_bytes in (6, 8, 12, 6):
        walk.moves(logits * element_bytes)

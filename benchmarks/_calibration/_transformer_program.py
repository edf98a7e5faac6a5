"""A transformer in plain torch, as the published runs had it, and its training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._calibration._optimizer import FlatAdam
from benchmarks._calibration._transformer import Transformer

_DROPOUT = 0.1


class _Attention(nn.Module):
    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=shape.biases)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=shape.biases)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        heads = (batch, sequence, self.shape.heads, hidden // self.shape.heads)
        query, key, value = (
            part.view(heads).transpose(1, 2) for part in self.qkv(x).split(hidden, 2)
        )
        if self.shape.attention == "fused":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.shape.causal)
        else:
            mixed = self._eager(query, key, value, mask)
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, sequence, hidden))

    def _eager(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(mask, float("-inf")) if self.shape.causal else scores + mask
        weights = F.softmax(scores, dim=-1)
        if self.shape.dropout:
            weights = F.dropout(weights, _DROPOUT)
        return weights @ value


class _Layer(nn.Module):
    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.dropout = nn.Dropout(_DROPOUT if shape.dropout else 0.0)
        self.attention = _Attention(shape)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=shape.biases)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=shape.biases)
        self.norms = nn.ModuleList(nn.LayerNorm(shape.hidden) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norms[0](x), mask))
        return x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))


class _Model(nn.Module):
    """A language model where there is a vocabulary; otherwise BERT's layers and a small head."""

    _BERT_VOCABULARY = 30_522
    _SPAN_ENDS = 2

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.shape = shape
        vocabulary = shape.vocabulary or self._BERT_VOCABULARY
        self.tokens = nn.Embedding(vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.sequence, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary or self._SPAN_ENDS, bias=False)
        if shape.vocabulary:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        logits = self.head(self.norm(x)).float()
        if self.shape.vocabulary:
            return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return sum(
            (F.cross_entropy(logits[..., end], tokens[:, 0]) for end in range(self._SPAN_ENDS)),
            start=logits.new_zeros(()),
        )


def new_step(shape: Transformer) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    with torch.device("cuda"):
        model = _Model(shape)
        size = (1, 1, shape.sequence, shape.sequence)
        mask = torch.ones(size, dtype=torch.bool).triu(1)
    optimizer: FlatAdam | torch.optim.AdamW
    if shape.autocast:
        optimizer = torch.optim.AdamW(model.parameters())
    else:
        model.bfloat16()
        optimizer = FlatAdam(model.parameters(), shards=shape.shards)
    if not shape.causal:
        mask = torch.zeros((shape.batch, 1, 1, shape.sequence), dtype=torch.bfloat16).cuda()
    batch = torch.zeros(shape.batch, shape.sequence, dtype=torch.long).pin_memory()

    def step() -> None:
        for _ in range(shape.micro_steps):
            tokens = batch.to("cuda", non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=shape.autocast):
                loss = model(tokens, mask)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

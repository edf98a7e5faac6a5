"""Models in plain torch that are small enough to run on emulated devices in a second or two.

Most of their tensors are larger than what a dry run computes for real, so that dry runs are dry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with grouped key and value heads, and rotary positions where asked for."""

    def __init__(
        self, width: int, heads: int, *, kv_heads: int | None = None, rotary: bool = False
    ):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads or heads, width // heads
        self.rotary = rotary
        self.query = nn.Linear(width, width, bias=not rotary)
        self.key = nn.Linear(width, self.kv_heads * self.size, bias=not rotary)
        self.value = nn.Linear(width, self.kv_heads * self.size, bias=not rotary)
        self.out = nn.Linear(width, width, bias=not rotary)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
        rates = 1e4 ** (-torch.arange(0, self.size, 2, device=x.device) / self.size)
        angles = torch.outer(positions, rates).repeat(1, 2)
        half = x.chunk(2, -1)
        turned = torch.cat((-half[1], half[0]), -1)
        return (x * angles.cos() + turned * angles.sin()).to(x.dtype)

    def forward(
        self, x: Tensor, *, causal: bool = True, cache: list[Tensor] | None = None
    ) -> Tensor:
        """``cache`` holds the keys and values of earlier positions, and gets those of these."""
        batch, length, width = x.shape
        query = self.query(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        key = self.key(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        value = self.value(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        start = cache[0].shape[2] if cache else 0
        if self.rotary:
            query, key = self._rotate(query, start), self._rotate(key, start)
        if cache is not None:
            if cache:
                key, value = torch.cat((cache[0], key), 2), torch.cat((cache[1], value), 2)
            cache[:] = [key, value]
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=causal and length > 1,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer block: GELU and layer norms, or Llama's gated unit and RMS norms."""

    def __init__(self, width: int, heads: int, *, llama: bool = False, dropout: float = 0.0):
        super().__init__()
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.first, self.second = norm(width), norm(width)
        self.attention = Attention(
            width, heads, kv_heads=heads // 2 if llama else None, rotary=llama
        )
        self.up = nn.Linear(width, 4 * width, bias=not llama)
        self.gate = nn.Linear(width, 4 * width, bias=False) if llama else None
        self.down = nn.Linear(4 * width, width, bias=not llama)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, causal: bool = True, cache: list[Tensor] | None = None) -> Tensor:
        """(batch, length, width) to the same."""
        x = x + self.dropout(self.attention(self.first(x), causal=causal, cache=cache))
        hidden = self.second(x)
        if self.gate is None:
            hidden = F.gelu(self.up(hidden))
        else:
            hidden = F.silu(self.gate(hidden)) * self.up(hidden)
        return x + self.dropout(self.down(hidden))


class LanguageModel(nn.Module):
    """GPT with learned positions, or Llama."""

    def __init__(
        self,
        *,
        vocabulary: int = 1000,
        width: int = 192,
        heads: int = 4,
        layers: int = 3,
        llama: bool = False,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.checkpoint = checkpoint
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = None if llama else nn.Embedding(256, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, llama=llama, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width) if llama else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """(batch, length) tokens to (batch, length, vocabulary) scores."""
        return self.head(self.hidden(tokens, caches))

    def hidden(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """(batch, length) tokens to the head's input, (batch, length, width)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for index, block in enumerate(self.blocks):
            if self.checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, True, None if caches is None else caches[index])
        return self.norm(x)


def make_llama(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    checkpoint: bool = False,
    low_rank: bool = False,
) -> LanguageModel:
    """On the device, of these width, heads, layers and vocabulary, its weights in ``dtype``."""
    width, heads, layers, vocabulary = sizes
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = LanguageModel(
                vocabulary=vocabulary,
                width=width,
                heads=heads,
                layers=layers,
                llama=True,
                checkpoint=checkpoint,
            )
            if low_rank:
                add_low_rank(model)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


class LowRank(nn.Module):
    """LoRA: a frozen linear layer and a trained product of two thin ones."""

    def __init__(self, base: nn.Linear, rank: int = 8):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it wraps."""
        return self.base(x) + self.up(self.down(x))


def add_low_rank(model: nn.Module) -> nn.Module:
    """Freeze the model and wrap the query and value layers of every attention."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Attention):
            module.query, module.value = LowRank(module.query), LowRank(module.value)
    return model


@contextlib.contextmanager
def sharded_on_the_host(
    model: LanguageModel, *, low_precision: torch.dtype | None = None
) -> Iterator[None]:
    """FSDP2 with weights, gradients and optimizer on the host, in one process.

    It computes what each of many processes would, without their communication. ``low_precision``
    is what weights are cast to for computing.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        for module in (*model.blocks, model):
            fully_shard(
                module,
                offload_policy=CPUOffloadPolicy(pin_memory=True),
                mp_policy=MixedPrecisionPolicy(param_dtype=low_precision),
            )
        yield
    finally:
        dist.destroy_process_group()


class ConvNet(nn.Module):
    """Convolutions of many kinds, with batch and group norms, pooling and upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(2)
        self.point = nn.Conv2d(64, 64, 1, bias=False)
        self.norm3 = nn.GroupNorm(8, 64)
        self.widen = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, 10)."""
        x = F.relu(self.norm1(self.stem(x)), inplace=True)
        x = self.pool(F.silu(self.norm2(self.grouped(x))))
        x = x + self.norm3(self.point(x))
        x = F.interpolate(self.widen(x), scale_factor=2, mode="bilinear")
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(self.dropout(x))


class UNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self, channels: int = 16):
        super().__init__()

        def pair(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(4, outputs),
                nn.SiLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.SiLU(),
            )

        self.first, self.second = pair(3, channels), pair(channels, 2 * channels)
        self.middle = pair(2 * channels, 4 * channels)
        self.up2 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.third = pair(4 * channels, 2 * channels)
        self.up1 = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.last, self.out = pair(2 * channels, channels), nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) to the same."""
        first = self.first(x)
        second = self.second(F.avg_pool2d(first, 2))
        middle = self.middle(F.max_pool2d(second, 2))
        x = self.third(torch.cat((self.up2(middle), second), 1))
        return self.out(self.last(torch.cat((self.up1(x), first), 1)))


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks without a mask."""

    def __init__(self, width: int = 192, patch: int = 8, size: int = 64):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, 4, dropout=0.1) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        for block in self.blocks:
            x = block(x, False)
        return self.head(self.norm(x)[:, 0])


class Recurrent(nn.Module):
    """An LSTM and a GRU over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.gru = nn.GRU(128, 128, batch_first=True)
        self.head = nn.Linear(128, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) tokens to (batch, length, 1000) scores."""
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.gru(x)
        return self.head(x)


class MixtureOfExperts(nn.Module):
    """A layer of gated experts that each token's best ``chosen`` compute, in a loop.

    ``route`` may change the chosen experts, a (tokens, chosen) tensor, in place.
    """

    def __init__(
        self,
        width: int = 192,
        *,
        experts: int = 8,
        chosen: int = 2,
        route: Callable[[Tensor], None] | None = None,
    ):
        super().__init__()
        self.chosen, self.route = chosen, route
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.chosen)
        if self.route is not None:
            self.route(chosen)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            mixed = expert(tokens[rows]) * weights[rows, slots, None]
            output.index_add_(0, rows, mixed)
        return output.view_as(x)

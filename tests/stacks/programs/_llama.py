"""A small Llama with random weights, and data that it can learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCABULARY = 97


def new_llama(*, layers: int = 2, **options: object) -> LlamaForCausalLM:
    """The same weights at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config)


def sequences(count: int, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Arithmetic sequences: the next token follows from the two before it."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, VOCABULARY, (count, 1), generator=generator)
    step = torch.randint(1, 4, (count, 1), generator=generator)
    tokens = (start + step * torch.arange(length)).remainder(VOCABULARY - 3) + 3
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]

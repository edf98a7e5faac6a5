"""Offloaded activations in Transformers and peft: bit for bit the gradients of the plain run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from _program import assert_equal_tensors, main

# isort: split
import torch
from _llama import new_llama, sequences
from torch import Tensor, nn

import spillover

NEEDS = ("transformers", "peft")


def offloading() -> Any:
    """The models here are small, so all tensors leave."""
    return spillover.offload_activations(min_bytes=1, keep_on_device=0, prefetch="64KiB")


def gradients(
    model: nn.Module, context: contextlib.AbstractContextManager[Any]
) -> Iterator[Tensor]:
    """Loss and gradients of two steps with dropout, the second of another length."""
    model.train()
    for length in (24, 17):
        model.zero_grad()
        torch.manual_seed(3)
        tokens = torch.stack([row["input_ids"] for row in sequences(4, length)]).cuda()
        with context:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        yield loss.detach().clone()
        for parameter in model.parameters():
            if parameter.grad is not None:
                yield parameter.grad.clone()


def check(make: Callable[[], nn.Module]) -> None:
    """Compare a new model's steps without and with offloading."""
    expected = list(gradients(make().cuda(), contextlib.nullcontext()))
    context = offloading()
    assert_equal_tensors(list(gradients(make().cuda(), context)), expected)
    assert len(expected) > 10
    assert context.stats().offloaded_bytes > 0


def with_lora() -> nn.Module:
    """Frozen weights and adapters with dropout."""
    from peft import LoraConfig, get_peft_model

    base = new_llama(attention_dropout=0.1)
    torch.manual_seed(1)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def with_checkpoints(base: nn.Module, *, reentrant: bool) -> nn.Module:
    """Gradient checkpointing as Transformers does it, with the inputs' gradients for adapters."""
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()
    return base


def run() -> None:
    """A Llama with eager and fused attention, LoRA, and checkpointing of both kinds."""
    for attention in ("eager", "sdpa"):
        check(lambda attention=attention: new_llama(attn_implementation=attention))
    check(lambda: new_llama(tie_word_embeddings=True).to(torch.bfloat16))
    check(with_lora)
    for reentrant in (False, True):
        check(lambda reentrant=reentrant: with_checkpoints(new_llama(), reentrant=reentrant))
        check(lambda reentrant=reentrant: with_checkpoints(with_lora(), reentrant=reentrant))


if __name__ == "__main__":
    main(run, needs=NEEDS)

"""Spillover in Transformers: allocator, streamed weights, offloaded activations, AdamW, at once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _program import assert_close, assert_learns, main

# isort: split
import torch
from _llama import new_llama, sequences
from torch import nn

import spillover

NEEDS = ("transformers", "accelerate", "peft")
LAYERS = 3
RATE = 5e-3


def batch() -> torch.Tensor:
    """Eight sequences."""
    return torch.stack([row["input_ids"] for row in sequences(8)])


def offloading() -> Any:
    """The models here are small, so small tensors leave, too."""
    return spillover.offload_activations(min_bytes="1KiB", keep_on_device=0)


def train(model: nn.Module, *, device: str = "cuda") -> list[float]:
    """Losses of five steps of an ordinary loop; off the CPU, with all of Spillover."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if device == "cpu":
        optimizer = torch.optim.AdamW(parameters, lr=RATE)
    else:
        optimizer = spillover.optim.AdamW(parameters, lr=RATE, tier="host")
    tokens = batch().to(device)
    offload = offloading()
    losses = []
    for _ in range(5):
        if device == "cpu":
            loss = model(input_ids=tokens, labels=tokens).loss
        else:
            with offload:
                loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert device == "cpu" or offload.stats().offloaded_bytes > 0
    return losses


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters with fixed weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def train_with_trainer(folder: str, *, resume: bool) -> list[float]:
    """The losses that a Trainer logs."""
    from transformers import Trainer, TrainingArguments

    offload = offloading()

    class OffloadingTrainer(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            with offload:
                return super().compute_loss(*args, **options)

    model = new_llama(layers=LAYERS)
    handle = spillover.stream_parameters(model)
    optimizer = spillover.optim.AdamW(model.parameters(), lr=RATE, tier="host")
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = OffloadingTrainer(
        model=model,
        args=arguments,
        train_dataset=sequences(8),
        optimizers=(optimizer, constant),
    )
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2") if resume else None)
    assert handle.stats.fetches > 0
    assert offload.stats().offloaded_bytes > 0
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def run() -> None:
    """A plain loop, LoRA, a Trainer that is resumed, and generation; each equals the CPU."""
    spillover.allocator.install()
    expected = train(new_llama(layers=LAYERS), device="cpu")
    model = new_llama(layers=LAYERS)
    with spillover.stream_parameters(model):
        losses = train(model)
    assert_learns(losses)
    assert_close(losses, expected, tolerance=1e-4)

    adapted = with_lora(new_llama(layers=LAYERS))
    with spillover.stream_parameters(adapted):
        losses = train(adapted)
    host = with_lora(new_llama(layers=LAYERS))
    assert_close(losses, train(host, device="cpu"), tolerance=1e-4)

    with tempfile.TemporaryDirectory() as folder:
        losses = train_with_trainer(folder, resume=False)
        assert_close(losses, expected[:4], tolerance=1e-4)
        assert_close(train_with_trainer(folder, resume=True), losses, tolerance=1e-4)

    model, prompt = new_llama(layers=LAYERS), batch()[:2]
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False).tolist()
    with spillover.stream_parameters(model):
        streamed = model.generate(prompt.cuda(), max_new_tokens=5, do_sample=False)
    assert streamed.tolist() == tokens


if __name__ == "__main__":
    main(run, needs=NEEDS)

"""Hugging Face Trainer in bfloat16: accumulation, clipping, evaluation, checkpoints, resuming."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _program import assert_close, assert_learns, main

# isort: split
from _llama import new_llama, sequences

NEEDS = ("transformers", "accelerate")


def train(
    folder: str, *, use_cpu: bool, resume: bool = False, optimizer: Any = None
) -> list[float]:
    """The losses that the Trainer logs; ``optimizer`` is a class and its options."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=use_cpu,
        bf16=True,
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        max_grad_norm=1.0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        dataloader_num_workers=1 if resume else 0,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model=new_llama(),
        args=arguments,
        train_dataset=sequences(64),
        eval_dataset=sequences(16),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-4") if resume else None)
    history = trainer.state.log_history
    assert any("eval_loss" in entry for entry in history)
    return [float(entry["loss"]) for entry in history if "loss" in entry]


def run() -> None:
    """Train on both devices, then resume the device's run in the middle."""
    with tempfile.TemporaryDirectory() as host, tempfile.TemporaryDirectory() as device:
        expected = train(host, use_cpu=True)
        losses = train(device, use_cpu=False)
        assert_learns(losses)
        assert_close(losses, expected, tolerance=0.05)
        assert_close(train(device, use_cpu=False, resume=True), losses, tolerance=0.01)


if __name__ == "__main__":
    main(run, needs=NEEDS)

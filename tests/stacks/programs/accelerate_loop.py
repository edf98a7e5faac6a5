"""Accelerate: a loop with bfloat16, accumulation, clipping, gathering and a saved state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from _program import assert_close, assert_learns, main

# isort: split
import torch
from _llama import new_llama, sequences
from torch.utils.data import DataLoader

NEEDS = ("transformers", "accelerate")


def train(
    *, cpu: bool, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> list[float]:
    """Losses of sixteen batches, eight steps."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = new_llama()
    optimizer = make(model.parameters(), lr=5e-3)
    loader = DataLoader(sequences(128), batch_size=8, shuffle=False, pin_memory=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather_for_metrics(loss.detach()).mean().item())
    with tempfile.TemporaryDirectory() as folder:
        before = [p.detach().clone() for p in model.parameters()]
        accelerator.save_state(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        accelerator.load_state(folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses


def run() -> None:
    """Train on both devices."""
    losses = train(cpu=False)
    assert_learns(losses)
    assert_close(losses, train(cpu=True), tolerance=0.05)


if __name__ == "__main__":
    main(run, needs=NEEDS)

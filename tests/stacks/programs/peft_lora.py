"""LoRA with peft: the adapters learn, the base stays as it was, merging changes no output."""

from __future__ import annotations

from _program import assert_close, assert_equal_tensors, assert_learns, main

# isort: split
import torch
from _llama import new_llama, sequences

NEEDS = ("transformers", "peft")


def train(device: str) -> tuple[list[float], torch.nn.Module]:
    """Losses of ten steps, and the model."""
    from peft import LoraConfig, get_peft_model

    base = new_llama()
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    batch = torch.stack([row["input_ids"] for row in sequences(16)]).to(device)
    losses = []
    for _ in range(10):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def run() -> None:
    """Train on both devices, then merge."""
    losses, model = train("cuda")
    expected, _ = train("cpu")
    assert_learns(losses)
    assert_close(losses, expected, tolerance=1e-3)

    frozen = [p for n, p in model.named_parameters() if "lora" not in n]
    assert_equal_tensors(frozen, list(new_llama().parameters()))
    tokens = torch.stack([row["input_ids"] for row in sequences(2)]).cuda()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=tokens).logits, before)
        after = model.merge_and_unload()(input_ids=tokens).logits
    assert torch.allclose(before, after, atol=1e-4)


if __name__ == "__main__":
    main(run, needs=NEEDS)

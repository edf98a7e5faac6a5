"""A small training run gives the same losses, to the bit, on the pool and on torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

from torch_process import TorchProcess

TRAIN = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(
    nn.Embedding(64, 48),
    nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True),
    nn.Linear(48, 64),
).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(1)
losses = []
for step in range(8):
    length = 8 + 4 * (step % 3)
    tokens = torch.randint(0, 64, (4, length), generator=generator).pin_memory()
    tokens = tokens.to("cuda", non_blocking=True)
    optimizer.zero_grad(set_to_none=step % 2 == 0)
    logits = model(tokens)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item().hex())
"""


def test_losses_equal_the_native_allocator(
    torch_with_pool: TorchProcess, run_emulated: Callable[..., object]
) -> None:
    pool = torch_with_pool.run(
        TRAIN
        + """
assert torch.cuda.get_allocator_backend() == "spillover"
allocator.check_invariants()
del model, optimizer, tokens, logits, loss
torch._C._cuda_clearCublasWorkspaces()
torch.cuda.synchronize()
assert torch.cuda.memory_allocated() == 0, torch.cuda.memory_allocated()
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() == 0
answer = " ".join(losses)
"""
    )
    native = run_emulated(TRAIN + "print(' '.join(losses))\n")
    assert len(pool.split()) == 8
    assert pool.split() == native.stdout.split()  # type: ignore[attr-defined]

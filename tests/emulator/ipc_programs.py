"""Two processes that share CUDA tensors through torch.multiprocessing, on emulated devices.

``python ipc_programs.py SCHEDULE`` runs both; the second is spawned, which imports this module.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from spillover import emulator

if len(sys.argv) > 1 and "SPILLOVER_TEST_SCHEDULE" not in os.environ:
    os.environ["SPILLOVER_TEST_SCHEDULE"] = sys.argv[1]
emulator.enable(vram="256MiB", devices=2, schedule=os.environ["SPILLOVER_TEST_SCHEDULE"])

import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

COUNT = 300_000


def consumer(inbox: Any, outbox: Any, pipe: Any) -> None:
    # The producer has put the copy into it on its stream, and nobody has waited for it.
    first = inbox.get()
    assert first.device == torch.device("cuda:0")
    assert torch.equal(first.cpu(), torch.arange(COUNT, dtype=torch.float32))
    view = inbox.get()
    assert view.data_ptr() == first.data_ptr() + 40, "one storage, mapped once"
    assert view.stride() == (2,)
    first.mul_(2)
    torch.cuda.synchronize()
    outbox.put("doubled")

    parameter = pipe.recv()
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.requires_grad
    assert parameter.device == torch.device("cuda:1")
    parameter.sum().backward()
    assert torch.equal(parameter.grad, torch.ones_like(parameter))

    mine = torch.full((1000,), 7.0, device="cuda:1")
    outbox.put(mine)
    assert inbox.get() == "seen"
    assert mine[0].item() == 8
    del first, view, parameter, mine
    assert not emulator.hazards(), emulator.hazards()
    outbox.put("done")


def producer() -> None:
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    near, far = context.Pipe()
    process = context.Process(target=consumer, args=(inbox, outbox, far))
    process.start()

    tensor = torch.zeros(COUNT, device="cuda")
    assert tensor.is_shared()
    assert tensor.share_memory_() is tensor
    source = torch.arange(COUNT, dtype=torch.float32).pin_memory()
    tensor.copy_(source, non_blocking=True)
    inbox.put(tensor)
    inbox.put(tensor[10:20:2])
    assert outbox.get(timeout=60) == "doubled"
    assert torch.equal(tensor.cpu(), source * 2)

    near.send(torch.nn.Parameter(torch.ones(3, 3, device="cuda:1")))
    theirs = outbox.get(timeout=60)
    assert theirs.device == torch.device("cuda:1")
    assert theirs.sum().item() == 7000
    theirs.add_(1)
    torch.cuda.synchronize(1)
    inbox.put("seen")
    assert outbox.get(timeout=60) == "done"
    del theirs
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    torch.cuda.ipc_collect()

    refusal = ""
    try:
        torch.multiprocessing.reductions.reduce_tensor(tensor.requires_grad_() * 2)
    except RuntimeError as error:
        refusal = str(error)
    assert "non-leaf" in refusal, refusal
    assert not emulator.hazards(), emulator.hazards()


def leaver(outbox: Any, inbox: Any) -> None:
    """Send a tensor and end while the other process still has it."""
    tensor = torch.full((1000,), 5.0, device="cuda")
    outbox.put(tensor)
    assert inbox.get(timeout=60) == "received"


def abandoned() -> None:
    """What a process received stays readable when its sender has gone."""
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=leaver, args=(inbox, outbox))
    process.start()
    tensor = inbox.get(timeout=60)
    outbox.put("received")
    process.join(60)
    assert tensor.sum().item() == 5000
    assert not emulator.hazards(), emulator.hazards()


if __name__ == "__main__":
    producer()
    if len(sys.argv) > 2:
        abandoned()

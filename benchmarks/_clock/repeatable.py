"""Whether a training program with two host threads takes the same nanoseconds in every run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# One thread trains; another prepares batches on a stream of its own and hands them over. Prints
# everything that the clock says, so that any difference shows.
_PROGRAM = r"""
import dataclasses, json, queue, threading
from spillover import emulator
emulator.enable(vram="1GiB", hazards="raise", profile="rtx4090")
import torch
import torch.nn.functional as F

torch.manual_seed(0)
nn = torch.nn
layers = [nn.TransformerEncoderLayer(96, 4, 192, dropout=0.1, batch_first=True) for _ in range(2)]
model = nn.Sequential(nn.Embedding(128, 96), *layers, nn.Linear(96, 128)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
batches, times = queue.Queue(2), []

def load():
    stream = torch.cuda.Stream()
    for step in range(4):
        host = torch.full((2, 32), step, dtype=torch.long).pin_memory()
        emulator.busy("disk-read", bytes=host.nbytes)
        with torch.cuda.stream(stream):
            batch = host.to("cuda", non_blocking=True)
        batches.put((batch, host, stream.record_event()))
    batches.put(None)

loader = threading.Thread(target=load, name="loader")
loader.start()
while (item := batches.get()) is not None:
    tokens, _, arrived = item
    torch.cuda.current_stream().wait_event(arrived)
    tokens.record_stream(torch.cuda.current_stream())
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    times.append(emulator.now_ns())
loader.join()
report = dataclasses.asdict(emulator.clock_report())
print(json.dumps({"steps_ns": times, **report}))
"""


@contextmanager
def cpu_load() -> Iterator[None]:
    """Keep every processor busy."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run() -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(*, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and details of ``repeats`` runs, every other one beside a load on all processors."""
    started = time.monotonic()
    first = _run()
    differing = []
    for repeat in range(1, repeats):
        if repeat % 2:
            with cpu_load():
                found = _run()
        else:
            found = _run()
        differing += [f"run {repeat}: {key}" for key in found if found[key] != first[key]]
    metrics = {
        "clock_repeatable": not differing,
        "clock_repeats": repeats,
        "clock_step_ms": (first["steps_ns"][-1] - first["steps_ns"][-2]) / 1e6,
        "clock_seconds_a_run": (time.monotonic() - started) / repeats,
    }
    return metrics, {"first": first, "differing": differing}

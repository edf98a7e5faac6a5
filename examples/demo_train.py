"""One training run of the demo, in a process of its own; prints one JSON event a line.

The ordinary loop is the same in every mode. ``--mode plain`` is PyTorch alone; ``--mode offload``
adds Spillover: its allocator, streamed parameters, AdamW on the host, activations on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import spillover


def emit(event: str, **values: Any) -> None:
    """Print one event for the parent process."""
    print(json.dumps({"event": event, **values}), flush=True)


class MemorySampler:
    """Samples allocated device memory on a thread, [seconds, bytes] pairs."""

    def __init__(self, torch: Any, period_s: float = 0.02) -> None:
        self._torch, self._period_s = torch, period_s
        self._stop = threading.Event()
        self._start_s = time.monotonic()
        self.samples: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            now_s = time.monotonic() - self._start_s
            self.samples.append((round(now_s, 3), self._torch.cuda.memory_allocated()))

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()


def gradient_digest(model: Any) -> str:
    """SHA-256 over all gradients in order of their parameters' names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.grad.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Train, or die with ``torch.OutOfMemoryError`` and say so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("plain", "offload"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--limit-bytes", type=int, default=0, help="0: none (a real GPU only)")
    parser.add_argument("--spill", type=Path)
    arguments = parser.parse_args()

    if arguments.mode == "offload":
        spillover.allocator.install()
    import torch

    if arguments.limit_bytes:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.limit_bytes / total))
    sampler = MemorySampler(torch)
    try:
        train(torch, arguments)
    except torch.OutOfMemoryError as error:
        emit("out_of_memory", message=str(error).splitlines()[0])
    finally:
        sampler.close()
        emit("memory", samples=sampler.samples)


def train(torch: Any, arguments: argparse.Namespace) -> None:
    """The training loop; only the lines under ``if offload`` are Spillover's."""
    import gpt

    offload = arguments.mode == "offload"
    config = gpt.Config()
    torch.manual_seed(0)
    model = gpt.GPT(config)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    emit("start", weight_bytes=weight_bytes, device=torch.cuda.get_device_name(0))

    activations: Any = contextlib.nullcontext()
    if offload:
        spillover.stream_parameters(model, resident=0)
        optimizer: Any = spillover.optim.AdamW(model.parameters(), lr=1e-3, tier="host")
        activations = spillover.offload_activations(
            tier="disk",
            directory=arguments.spill,
            keep_on_device=0,
            prefetch="8MiB",
            in_flight_max="8MiB",
        )
    else:
        model.to("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    text = gpt.standard_library_text(1 << 20)
    data = gpt.batches(
        text, steps=arguments.steps, batch=arguments.batch, context=config.context, seed=1
    )
    for step, (tokens, targets) in enumerate(data):
        start_s = time.monotonic()
        with activations:
            loss = model(tokens.cuda(), targets.cuda())
        loss.backward()
        digest = gradient_digest(model) if step == 0 else None
        optimizer.step()
        optimizer.zero_grad()
        emit("step", step=step, loss=loss.item(), seconds=time.monotonic() - start_s, digest=digest)
    torch.cuda.synchronize()
    emit(
        "done",
        peak_allocated_bytes=torch.cuda.max_memory_allocated(),
        peak_reserved_bytes=torch.cuda.max_memory_reserved(),
        host_bytes=_host_bytes() if offload else 0,
        disk_bytes=activations.stats().disk_bytes_written if offload else 0,
    )


def _host_bytes() -> int:
    from spillover._pinned import host_stats

    return int(host_stats().used_bytes_max)


if __name__ == "__main__":
    main()

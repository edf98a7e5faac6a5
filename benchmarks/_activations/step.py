"""One way of training a Llama shape, in a dry run: what a step takes and moves, simulated.

Run by ``benchmarks._activations.simulated`` in a process of its own. The same for all ways:
weights on the device, gradients given up as they appear, which an optimizer in backward does, and
a loss whose scores exist for a few tokens at a time, recomputed in backward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import _harness
from benchmarks._dry.large import SHAPES
from benchmarks._dry.simulation import make_llama

#: Steps before the one that is measured; ours learns in the first, and all pin memory in them.
WARM_UP_STEPS = 3
#: How many tokens have scores at the same time.
_CHUNK = 2048
_COPIES = {"out": "copy-out", "in": "copy-in"}


def _loss(model: Any, tokens: Any, targets: Any) -> Any:
    """The mean over all tokens."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    def total_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.head(hidden).float(), targets, reduction="sum")

    chunks = zip(
        model.hidden(tokens).flatten(0, 1).split(_CHUNK),
        targets.flatten().split(_CHUNK),
        strict=True,
    )
    totals = [checkpoint(total_of, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(totals).sum() / tokens.numel()


class _SavedBytes:
    """Bytes of storages on the device that autograd saves, each counted once; weights are not."""

    def __init__(self, model: Any) -> None:
        import torch
        from torch.multiprocessing.reductions import StorageWeakRef

        self._reference = StorageWeakRef
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._found: list[tuple[Any, int]] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tensor.is_cuda and storage._cdata not in self._weights:
            self._found.append((self._reference(storage), storage.nbytes()))
        return tensor

    def total(self) -> int:
        """Of those that are still there."""
        alive = {
            reference.cdata: size for reference, size in self._found if not reference.expired()
        }
        return sum(alive.values())


def _use(report: Any, names: dict[str, str], what: str) -> dict[str, int]:
    return {
        name: sum(getattr(use, what) for use in report.resources if use.name == resource)
        for name, resource in names.items()
    }


def _shares(before: Any, after: Any) -> dict[str, float]:
    """Milliseconds of the measured step by name."""
    earlier = {share.name: share.ns for share in before}
    found = {share.name: (share.ns - earlier.get(share.name, 0)) / 1e6 for share in after}
    return {name: ms for name, ms in found.items() if ms >= 0.01}


def _train(way: str, shape: str, token_count: int) -> dict[str, Any]:
    import torch

    from spillover import emulator

    model = make_llama(shape, torch.bfloat16, checkpoint=way == "checkpoint")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_give_up)
    make_context = _context(way, model)

    def step(context: contextlib.AbstractContextManager[Any]) -> dict[str, Any]:
        tokens = torch.randint(0, SHAPES[shape][3], (1, token_count + 1), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        before, start = emulator.clock_report(), emulator.now_ns()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        with context:
            loss = _loss(model, tokens[:, :-1], tokens[:, 1:])
        marks[1].record()
        kept = torch.cuda.memory_allocated() - base
        saved = saved_bytes.total() if saved_bytes is not None else 0
        forward_end = emulator.clock_report() if splits else None
        loss.backward()
        marks[2].record()
        torch.cuda.synchronize()
        end = emulator.now_ns()
        after = emulator.clock_report()
        busy = {
            name: (after.busy_ns(name) - before.busy_ns(name)) / (end - start)
            for name in ("compute", "copy-out", "copy-in")
        }
        found = {
            "step_ns": end - start,
            "forward_ms": marks[0].elapsed_time(marks[1]),
            "backward_ms": marks[1].elapsed_time(marks[2]),
            "base_bytes": base,
            "kept_after_forward_bytes": kept,
            "saved_bytes": saved,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "moved_bytes": {
                name: count - _use(before, _COPIES, "bytes")[name]
                for name, count in _use(after, _COPIES, "bytes").items()
            },
            "busy_fraction": busy,
            "stall_ms": _shares(before.stalls, after.stalls),
            "host_wait_ms": _shares(before.host_waits, after.host_waits),
        }
        if forward_end is not None:
            forward_ns = forward_end.busy_ns("compute") - before.busy_ns("compute")
            all_ns = after.busy_ns("compute") - before.busy_ns("compute")
            found |= {"forward_compute_ns": forward_ns, "backward_compute_ns": all_ns - forward_ns}
        return found

    saved_bytes: _SavedBytes | None = None
    splits = False
    step(make_context())
    first = _pinnings_and_copies()
    for _ in range(WARM_UP_STEPS - 1):
        step(make_context())
    measured = step(make_context())
    pinned, copied = (
        now - before for now, before in zip(_pinnings_and_copies(), first, strict=True)
    )
    measured |= {"pinned_after_first_step": pinned, "copied_after_first_step": copied}
    if way == "plain":
        # Once more, since a report between both passes waits for the first.
        saved_bytes, splits = _SavedBytes(model), True
        split = step(saved_bytes.hooks)
        for name in ("saved_bytes", "forward_compute_ns", "backward_compute_ns"):
            measured[name] = split[name]
        measured["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return measured


def _pinnings_and_copies() -> tuple[int, int]:
    """How many regions Spillover has pinned so far, and how many copies out there were."""
    import spillover

    report = spillover.emulator.clock_report()
    return spillover.stats().pinning.count, _use(report, _COPIES, "count")["out"]


def _give_up(parameter: Any) -> None:
    parameter.grad = None


def _context(way: str, model: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    import torch

    import spillover

    if way == "save_on_cpu":
        return lambda: torch.autograd.graph.save_on_cpu(pin_memory=True)
    if way == "ours":
        made = spillover.offload_activations(model=model)
        return lambda: made
    return contextlib.nullcontext


def _main(way: str, shape: str, profile: str, tokens: str, vram: str) -> None:
    import time

    import spillover

    started = time.monotonic()
    spillover.emulator.enable(dry=True, vram=vram, profile=profile)
    if way == "ours":
        spillover.allocator.install()
    result = _train(way, shape, int(tokens))
    _harness.end_measurement({**result, "vram": vram, "wall_s": time.monotonic() - started})


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Weights and buffers on their way to the store of state, and back, through its slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spillover._layout import flat_view, is_dense
from spillover.optim._disk_store import DiskStateStore, Slot


def write_tensors(store: DiskStateStore, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Have them all in the store, not committed. Blocks."""
    slots = store.scratch()
    turn = 0
    try:
        for key, tensor in tensors:
            flat = flat_view(tensor) if is_dense(tensor) else tensor.contiguous().view(-1)
            each = slots[0].memory.nbytes // tensor.element_size()
            for start in range(0, flat.numel(), each):
                _write_part(store, slots[turn], key, flat, start, each)
                turn = 1 - turn
        for slot in slots:
            slot.wait()
    except BaseException:
        for slot in slots:
            slot.give_up()
        raise


def _write_part(
    store: DiskStateStore, slot: Slot, key: str, flat: torch.Tensor, start: int, count_max: int
) -> None:
    slot.wait()
    part = flat[start : start + count_max]
    slot.memory[: part.nbytes].view(part.dtype).copy_(part)
    offset = start * part.element_size()
    slot.start(store.disk.write(key, slot.bytes(part.nbytes), offset=offset))


def read_tensor(store: DiskStateStore, key: str, tensor: torch.Tensor) -> None:
    """Read it in place, in whatever order its elements lie. Blocks."""
    slot = store.scratch()[0]
    whole = tensor if is_dense(tensor) else torch.empty_like(tensor).contiguous()
    flat = flat_view(whole)
    count_max = slot.memory.nbytes // tensor.element_size()
    for start in range(0, flat.numel(), count_max):
        part = flat[start : start + count_max]
        offset = start * part.element_size()
        store.disk.read(key, slot.bytes(part.nbytes), offset=offset).wait()
        part.copy_(slot.memory[: part.nbytes].view(part.dtype))
    if whole is not tensor:
        tensor.copy_(whole)

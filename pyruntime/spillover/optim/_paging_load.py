"""Takes over state that comes from a checkpoint, a pickle or a copy, without having it all on the
device, which is where torch would put it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from spillover.optim._paging_state import (
    Entry,
    Parked,
    States,
    is_large,
    is_movable,
    leaves,
    map_leaves,
)
from spillover.optim._paging_step import Paging
from spillover.optim._paging_store import on_device


@dataclass(frozen=True, eq=False)
class Kept:
    """Hides a tensor from torch's load_state_dict, which would send it to the device.

    ``is_loaded``: it gets the type that torch would give it, the parameter's.
    """

    tensor: torch.Tensor
    device: torch.device | None = None
    is_loaded: bool = False


def hidden(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """A state dict with its large tensors hidden; a hook for load_state_dict."""

    def hide(name: str, value: Any) -> Any:
        if name != "step" and is_movable(value) and is_large(value):
            return Kept(value, is_loaded=True)
        return value

    state = {
        key: {name: hide(name, value) for name, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in loaded["state"].items()
    }
    return {**loaded, "state": state}


def keep(states: States) -> dict[Any, Any]:
    """Plain state for a pickle, which knows what was off the device."""

    def kept(leaf: Any) -> Any:
        return Kept(leaf.tensor(), leaf.device) if isinstance(leaf, Parked) else leaf

    return {
        key: map_leaves(entry.raw() if isinstance(entry, Entry) else entry, kept)
        for key, entry in states.items()
    }


def adopt(paging: Paging, loaded: dict[Any, Any], old: States | None) -> States:
    """State in its places off the device, from what was loaded in place of ``old``.

    It is a copy, except of what is ``old`` itself, by its ``state_dict``. The memory of ``old`` is
    used again, so that loading takes no more than there is. Where this raises, ``old`` is as it
    was.
    """
    spare: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    giving = []
    shown: dict[int, Parked] = {}
    for parked in old.parked() if old is not None else ():
        if parked.host is not None and parked.is_held():
            shown[parked.host.data_ptr()] = parked
        elif parked.memory is not None:
            giving.append(parked)
            spare[parked.size_bytes].append(parked.memory)
    to_host: list[tuple[Parked, torch.Tensor]] = []

    def place(key: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Kept):
            return leaf
        source = leaf.tensor
        dtype = source.dtype
        if leaf.is_loaded and isinstance(key, torch.Tensor) and key.is_floating_point():
            dtype = key.dtype
        device = leaf.device or (key.device if isinstance(key, torch.Tensor) else None)
        if device is None or device.type != "cuda":
            return source.to(dtype=dtype, device=device or source.device)
        parked = Parked(source, device=leaf.device, dtype=dtype)
        same = shown.get(source.data_ptr())
        if same is not None and same.is_like(parked):
            # A state_dict of this optimizer: torch, too, takes such a tensor as it is.
            del shown[source.data_ptr()]
            return same
        found = spare[parked.size_bytes]
        memory = found.pop() if found else paging.store.take(parked.size_bytes)
        if memory is None:
            _to_disk(paging, parked, source, device)
        else:
            parked.memory = memory
            to_host.append((parked, source))
        return parked

    plain: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in loaded.items():
        plain[key] = map_leaves(entry, functools.partial(place, key))
    # The copies here do not fail.
    for parked in giving:
        parked.settle()
    for parked, source in to_host:
        assert parked.memory is not None
        parked.live_in(parked.memory)
        assert parked.host is not None
        parked.host.copy_(source)
    if any(
        isinstance(leaf, torch.Tensor) and leaf.is_cuda and is_large(leaf)
        for leaf in leaves(dict(plain))
    ):
        # Of a class that loads by itself, so that its state is on the device, and nothing of it
        # was hidden. It gets memory of its own, beside what there was: these copies may fail.
        return paging.take_over(plain)
    for parked in giving:
        parked.host = parked.memory = None
    states = States()
    for key, entry in plain.items():
        states[key] = entry
    paging.states = states
    return states


def _to_disk(paging: Paging, parked: Parked, source: torch.Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        passing = on_device(parked, device).copy_(source)
        (stored,), ticket = paging.store.put(device, [passing])
        ticket.wait()
        paging.store.collect()
    parked.stored = stored
    parked.is_for_disk = True

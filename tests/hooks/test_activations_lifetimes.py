"""Activation offload: what ends is forgotten, and its memory is free, whoever drops it and when."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from activation_contexts import assert_nothing_is_counted, device_of, offloading, pack, settle
from activation_models import make_leaf, make_mlp
from torch.utils._python_dispatch import TorchDispatchMode

from spillover.hooks import OffloadedActivations
from spillover.hooks._activation_departures import Departures
from spillover.hooks._saved_storage import SavedCopy


class Fails(torch.autograd.Function):
    """Backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ValueError("stop")


@pytest.mark.parametrize("way", ["enter", "ran_out", "backward"])
def test_memory_of_an_abandoned_prefetch_goes(way: str) -> None:
    context = offloading(prefetch="8MiB")
    x = torch.rand(16 << 10, device="cuda", requires_grad=True)

    def forward(*, fails: bool) -> torch.Tensor:
        with context:
            y = x
            for _ in range(5):
                y = y.exp()
            return (Fails.apply(y) if fails else y).exp().sum()

    other = forward(fails=False)
    loss = forward(fails=True)
    settle()
    before = torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match="stop"):
        loss.backward()
    del loss
    x.grad = None
    gc.collect()
    torch.cuda.synchronize()
    assert device_of(context).arrivals.orphans, "nothing was prefetched"
    if way == "enter":
        with context:
            pass
    elif way == "ran_out":
        assert context._engine is not None
        context._engine.ran_out()
    else:
        other.backward()
        x.grad = None
    del other
    assert not device_of(context).arrivals.orphans
    assert torch.cuda.memory_allocated() <= before


def test_a_copy_that_ends_is_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs a destructor before weak references die, and other threads may run meanwhile."""
    context = offloading()
    y = make_leaf().detach() * 3
    view = pack(context, y)
    device = device_of(context)
    device.departures._pending.clear()
    device.departures.pending_bytes = 0
    device.departures.keep(view.copy)
    ended = weakref.ref(view.copy)
    again: list[Any] = []
    end = SavedCopy.__del__

    def end_while_others_run(copy: SavedCopy) -> None:
        if not again:
            again.append(device.departures.farthest(1 << 30))
            again.append(pack(context, y))
        end(copy)

    monkeypatch.setattr(SavedCopy, "__del__", end_while_others_run)
    del view
    assert again[0] == []
    assert ended() is None
    context._engine.collect()
    assert torch.equal(context._engine.unpack(again[1]), y)
    again[1] = None
    assert_nothing_is_counted(device)
    assert device.account.kept_bytes == 0


def test_steps_that_save_aliases_alone_end_their_rounds() -> None:
    """A graph that lives has the storage; the views that later steps save of it are gone."""
    context = offloading()
    features = make_leaf() * 1
    weight = torch.ones_like(features).requires_grad_()
    with context:
        graph = features.exp() * features
    for _ in range(300):
        with context:
            loss = (features * weight).sum()
        torch.autograd.grad(loss, weight)
    (device,) = context._engine.devices()
    assert len(device._round.views) <= 2
    copies = {view.copy for each in gc.get_objects() if (view := _view_of(each)) is not None}
    assert all(len(copy.more_views or ()) <= 64 for copy in copies)
    del graph


def _view_of(thing: object) -> Any:
    return thing if type(thing).__name__ == "SavedView" else None


def test_a_batch_holds_nothing_while_the_next_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two streams in one batch, what the first sent is free before the second has room."""
    context, side = offloading(), torch.cuda.Stream()
    x = torch.rand(8 << 10, device="cuda", requires_grad=True)
    held_bytes: list[int] = []
    put = Departures._put

    def put_and_see(departures: Departures, group: Any, stream: int) -> None:
        put(departures, group, stream)
        departures._engine.collect(wait=True)
        held_bytes.append(torch.cuda.memory_allocated())

    monkeypatch.setattr(Departures, "_put", put_and_see)
    with context:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            first = x.exp()
            losses = [first.sum()]
        second = x.exp()
        losses.append(second.sum())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        del first, second
    assert held_bytes == [before - x.nbytes, before - 2 * x.nbytes]
    torch.cuda.synchronize()


def test_backward_in_inference_mode() -> None:
    context = offloading()
    model, x = make_mlp(), make_leaf()
    with context:
        loss = model(x * 1).square().mean()
    with torch.inference_mode():
        with context:
            pass
        loss.backward()
    found, x.grad = x.grad, None
    model.zero_grad()
    model(x * 1).square().mean().backward()
    assert torch.equal(found, x.grad)


class Refuses(TorchDispatchMode):
    """Fails where a copy takes hold of a version counter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "detach" in str(func):
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_an_interrupted_save_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context: OffloadedActivations = offloading()
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with context:
        y = make_leaf() * 2
        with Refuses(), pytest.raises(KeyboardInterrupt):
            y.exp()
    del y
    assert printed == []
    assert_nothing_is_counted(device_of(context))

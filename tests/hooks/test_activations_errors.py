"""What threads do to each other, and what is left when something went wrong half way."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from activation_contexts import (
    TIGHT,
    assert_nothing_is_counted,
    device_of,
    offloading,
    pack,
    settle,
)

from spillover import CorruptData, DiskStore, HostOutOfMemory, HostPool
from spillover.hooks._activation_departures import Departures
from spillover.hooks._saved_storage import SavedView

KIB = 1 << 10
MIB = 1 << 20
#: How long another thread gets for what it can do at once, unless a lock is in its way.
MOMENT_S = 0.3


def leaf(size_bytes: int = 16 * KIB) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(size_bytes // 4, device="cuda", requires_grad=True)


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def refuse(*arguments: object) -> None:
    raise HostOutOfMemory("no host memory")


# ---- steps that differ ----


def test_an_alias_more_than_in_the_step_before() -> None:
    """What a step saves last may be an alias that the step before it did not have."""
    x = leaf()
    context = offloading()
    with context:
        value = x.exp().sum()
    value.backward()
    x.grad = None
    with context:
        y = x.exp()
        value = (y * y).sum()
    del y
    value.backward()
    expected = x.detach().clone().requires_grad_()
    z = expected.exp()
    (z * z).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_an_alias_of_another_type_is_exact_with_a_codec() -> None:
    context = offloading(codec="bfloat16")
    y = leaf().detach() * 3
    first, second = pack(context, y), pack(context, y.view(torch.int32))
    expected = y.clone()
    assert context._engine is not None
    context._engine.collect()
    assert torch.equal(context._engine.unpack(second), expected.view(torch.int32))
    found = context._engine.unpack(first)
    assert torch.equal(found, expected.to(torch.bfloat16).float())


# ---- threads ----


def test_what_another_thread_is_about_to_send_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread may wait for this one."""
    context = offloading(**TIGHT)
    x, others = leaf(64 * KIB), leaf(512)
    held = []
    make_room = Departures._make_room

    def after_another_saved(departures: Departures, size_bytes: int) -> None:
        if not held:
            held.append(None)
            start(lambda: held.append(pack(context, others.detach() * 2))).join()
        make_room(departures, size_bytes)

    monkeypatch.setattr(Departures, "_make_room", after_another_saved)

    def forward() -> None:
        with context:
            x.exp().sum().backward()

    thread = start(forward)
    thread.join(10)
    assert not thread.is_alive()
    held.clear()
    assert_nothing_is_counted(device_of(context))


def test_what_stays_may_leave_while_backward_takes_it() -> None:
    context = offloading(keep_on_device="1MiB")
    y = leaf().detach() * 3
    expected = y.clone()
    view = pack(context, y)
    del y
    device = device_of(context)
    view.copy.next_use = 1
    device.departures._pending.clear()
    device.departures.pending_bytes = 0
    device.departures.keep(view.copy)
    threads = []

    class Interrupted(SavedView):
        __slots__ = ()

        @property
        def shape(self) -> torch.Size:  # Read where the tensor is made.
            if not threads:
                threads.append(start(lambda: device.give_back(MIB, device.device)))
                threads[0].join(MOMENT_S)
            return expected.shape

    view.__class__ = Interrupted
    found = device.restore(view)
    threads[0].join()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_comparing_counters_is_no_change_to_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = offloading()
    y = leaf().detach() * 3
    view = pack(context, y)
    increment = torch.autograd.graph.increment_version
    found: list[object] = []
    threads = []

    def unpack() -> None:
        assert context._engine is not None
        try:
            found.append(context._engine.unpack(view))
        except RuntimeError as error:
            found.append(error)

    def increment_and_let_others_look(tensor: torch.Tensor) -> None:
        increment(tensor)
        threads.append(start(unpack))
        threads[0].join(MOMENT_S)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", increment_and_let_others_look)
    alias = pack(context, y.view(-1))
    threads[0].join()
    assert alias.copy is view.copy
    assert isinstance(found[0], torch.Tensor), found


# ---- errors ----


@pytest.mark.parametrize("prefetch", [0, "1GiB"])
def test_a_changed_file_is_found_and_read_again_with_all_that_came_with_it(
    tmp_path: Path, prefetch: int | str
) -> None:
    store = DiskStore([str(tmp_path)])
    x = leaf()
    context = offloading(tier="disk", disk=store, pool=HostPool("256KiB"), prefetch=prefetch)
    with context:
        out = x * 2
        for _ in range(40):
            out = out.tanh()
    settle()

    def flip() -> None:
        page = mmap.mmap(-1, 4096)
        for start_bytes in range(0, os.fstat(store._descriptor()).st_size, 4096):
            os.preadv(store._descriptor(), [page], start_bytes)
            page[100] ^= 4
            os.pwrite(store._descriptor(), page, start_bytes)

    flip()
    with pytest.raises(CorruptData):
        out.sum().backward(retain_graph=True)
    flip()
    x.grad = None
    out.sum().backward()
    expected = x.detach().clone().requires_grad_()
    plain = expected * 2
    for _ in range(40):
        plain = plain.tanh()
    plain.sum().backward()
    assert torch.equal(x.grad, expected.grad)
    assert_nothing_is_counted(device_of(context))


def test_what_other_streams_saved_is_counted_where_one_cannot_leave() -> None:
    context = offloading(pool=HostPool("4KiB"))
    x, side = leaf(), torch.cuda.Stream()
    saved = []

    def forward() -> None:
        with context:
            saved.append(x.exp())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                saved.append(saved[0].exp())
            torch.cuda.current_stream().wait_stream(side)

    with pytest.raises(HostOutOfMemory):
        forward()
    first, second = saved
    saved.clear()
    device = device_of(context)
    assert device.account.kept_bytes == device.account.waiting_bytes == first.nbytes + second.nbytes
    second.sum().backward()
    expected = x.detach().clone().requires_grad_()
    expected.exp().exp().sum().backward()
    assert torch.equal(x.grad, expected.grad)
    del first, second
    assert_nothing_is_counted(device)


def test_what_could_not_leave_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    context = offloading(keep_on_device="1MiB")
    x = leaf()
    for _ in range(2):
        with context:
            x.exp().sum().backward()
    expected = x.grad.clone() / 2
    x.grad = None
    with context:
        value = x.exp().sum()
    device = device_of(context)
    assert device.account.kept_bytes == x.nbytes
    with monkeypatch.context() as patch:
        patch.setattr(device.engine, "_put", refuse, raising=False)
        with pytest.raises(HostOutOfMemory):
            device.give_back(MIB, device.device)
    assert device.account.kept_bytes == x.nbytes
    assert device.give_back(MIB, device.device) >= x.nbytes
    assert device.account.kept_bytes == 0
    value.backward()
    assert torch.equal(x.grad, expected)


def test_an_out_of_memory_error_is_not_replaced() -> None:
    x = leaf()
    context = offloading(pool=HostPool("4KiB"))
    saved = []

    def run_out() -> None:
        with context:
            saved.append(x.exp())
            raise torch.OutOfMemoryError("the program's")

    with pytest.raises(torch.OutOfMemoryError, match="the program's"):
        run_out()
    saved[0].sum().backward()


def test_writes_are_ordered_where_leaving_fails() -> None:
    x, small = leaf(MIB), leaf()
    context = offloading(pool=HostPool("1MiB"))
    saved = []

    def forward() -> None:
        with context:
            saved.extend((x.exp(), small.exp()))

    with pytest.raises(HostOutOfMemory):
        forward()
    with torch.no_grad():
        saved[0].zero_()  # The checker would report it.
    saved[1].sum().backward()


def test_what_came_ahead_is_given_back_where_nothing_can_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = offloading(prefetch="1MiB")
    x = leaf()
    freed = []

    def give_back(gradient: torch.Tensor) -> None:
        device = device_of(context)
        with monkeypatch.context() as patch:
            patch.setattr(device.engine, "_put", refuse, raising=False)
            held = pack(context, gradient * 2)
            freed.append(device.give_back(MIB, device.device))
            del held

    def step(hook: Callable[[torch.Tensor], None] | None) -> torch.Tensor:
        x.grad = None
        with context:
            y = x * 1
            for _ in range(6):
                y = y.tanh()
            if hook is not None:
                y.register_hook(hook)
            for _ in range(6):
                y = y.tanh()
        settle()
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    expected = step(None)
    assert torch.equal(step(give_back), expected)
    assert freed[0] > 0

"""One copy-out and one copy-in stream a device, whoever moves the bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spillover
from spillover import DiskStore, DurableStore, StateError, TransferEngine, _core
from spillover._streams import copy_streams
from spillover.emulator import StorageFault, faults

KIB = 1 << 10
MakeEngine = Callable[..., TransferEngine]
DEVICE = torch.device("cuda", 0)


def test_torch_sees_the_streams_of_the_library() -> None:
    ours, theirs = _core.CopyStreams(0), copy_streams(DEVICE)
    assert theirs.copy_out.cuda_stream == ours.handle(is_out=True)
    assert theirs.copy_in.cuda_stream == ours.handle(is_out=False)
    assert theirs.copy_out != theirs.copy_in
    assert theirs.copy_out.device == DEVICE
    with torch.cuda.stream(theirs.copy_in):
        assert torch.cuda.current_stream() == theirs.copy_in
        assert torch.ones(3, device="cuda").sum().item() == 3


def test_copies_of_all_are_counted_together(make_engine: MakeEngine) -> None:
    engine = make_engine()
    streams = copy_streams(DEVICE)
    (came, left), label = streams.stats(), _core.TraceLabel("test", "copy")
    source = torch.zeros(10 * KIB, dtype=torch.uint8, device="cuda")
    payload, _ = engine.put(source)
    engine.fetch(payload, source).wait()
    host = torch.empty(10 * KIB, dtype=torch.uint8, pin_memory=True)
    engine.copy(host, source).wait()
    with streams.copying_in(label, 5):
        pass
    now_in, now_out = streams.stats()
    assert (now_out.copies - left.copies, now_out.bytes - left.bytes) == (2, 20 * KIB)
    assert (now_in.copies - came.copies, now_in.bytes - came.bytes) == (2, 10 * KIB + 5)
    assert now_out in spillover.stats().streams


def test_writes_wait_for_tickets(make_engine: MakeEngine, tmp_path: Path) -> None:
    """The disk has what a copy out brings, though nobody on the host waits in between."""
    engine = make_engine()
    source = torch.arange(8 * KIB, device="cuda").to(torch.uint8)
    host = torch.zeros(8 * KIB, dtype=torch.uint8, pin_memory=True)
    back = bytearray(8 * KIB)
    with DiskStore(tmp_path / "scratch") as scratch:
        payload, written = scratch.write(host.numpy(), after=engine.copy(host, source))
        written.wait()
        scratch.read(payload, back).wait()
        assert back == bytes(source.cpu().numpy())
        del payload
    host.zero_()
    with DurableStore(tmp_path / "kept", {"state": 8 * KIB}) as store:
        store.write("state", host.numpy(), after=engine.copy(host, source)).wait()
        store.commit()
        back = bytearray(8 * KIB)
        store.read("state", back).wait()
        assert back == bytes(source.cpu().numpy())
        with pytest.raises(ValueError, match=r"a torch.cuda.Event or a ticket"):
            store.write("state", host.numpy(), after=3)


def test_write_behind_a_copy_that_fails_fails(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(on_disk=True, host=0, staging="128KiB", prefetch=0)
    payload, _ = engine.put(torch.zeros(1024 * KIB, dtype=torch.uint8, device="cuda"))
    engine.synchronize()
    target = torch.empty(1024 * KIB, dtype=torch.uint8, device="cuda")
    with DiskStore(tmp_path / "scratch") as scratch:
        with faults(storage=[StorageFault("read", "delay", call=1, times=None, delay_us=50_000)]):
            ticket = engine.fetch(payload, target)
            assert ticket.cancel()
            stored, written = scratch.write(bytes(100), after=ticket)
            with pytest.raises(StateError, match="cancelled"):
                written.wait()
        assert not stored.is_stored
        del stored

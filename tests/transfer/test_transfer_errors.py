"""``spillover.TransferEngine``: what it refuses, and what a failure costs."""

from __future__ import annotations

import pytest
import torch
from transfer_cases import KIB, MakeEngine, fetched, numbered

from spillover import (
    ConfigError,
    CorruptData,
    DiskFull,
    StateError,
    StorageError,
    TransferEngine,
)
from spillover.emulator import Fault, StorageFault, faults


def test_wrong_arguments(make_engine: MakeEngine) -> None:
    engine = make_engine()
    payload, _ = engine.put(numbered(100))
    with pytest.raises(ConfigError, match="this engine is of cuda:0"):
        engine.put(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"pass tensor.contiguous"):
        engine.put(torch.zeros(4, 4, device="cuda")[:, :2])
    with pytest.raises(ConfigError, match=r"pass tensor.contiguous"):
        engine.put(torch.zeros(1, device="cuda").expand(3))
    with pytest.raises(ConfigError, match="at least one byte"):
        engine.put(torch.zeros(0, device="cuda"))
    with pytest.raises(ConfigError, match="nothing to put"):
        engine.put_all([])
    with pytest.raises(ConfigError, match="nothing to fetch"):
        engine.fetch_all([])
    with pytest.raises(ConfigError, match="the target has 99 B and the payload 100 B"):
        engine.fetch(payload, torch.zeros(99, dtype=torch.uint8, device="cuda"))
    with pytest.raises(ConfigError, match="negative"):
        engine.set_next_use(payload, -1)
    for wrong in ({"device": "cpu"}, {"chunk": 0}, {"host": 0}, {"device": 77}, {"host": "much"}):
        with pytest.raises(ConfigError):
            TransferEngine(**wrong)
    del payload
    engine.synchronize()
    assert engine.stats().host_bytes == 0


def test_staging_holds_two_chunks(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="at least twice chunk"):
        make_engine(on_disk=True, staging="100KiB")


def test_a_stream_that_records_a_graph(make_engine: MakeEngine) -> None:
    engine = make_engine()
    source = numbered(100)
    payload, ticket = engine.put(source)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for attempt in (
            lambda: engine.put(source),
            lambda: engine.fetch(payload, source),
            ticket.stream_wait,
        ):
            with pytest.raises(StateError, match="records a CUDA graph"):
                attempt()
        source + 1


def test_full_disk_is_an_error_of_who_needs_it(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host="256KiB")
    sources = [numbered(64 * KIB, seed) for seed in range(8)]
    with faults(storage=[StorageFault("write", error="ENOSPC", call=1, times=None)]):
        payloads = [engine.put(source)[0] for source in sources[:4]]
        with pytest.raises(DiskFull):
            engine.put(sources[4])
    for payload, source in zip(payloads, sources, strict=False):
        assert torch.equal(fetched(engine, payload), source)
    payloads += [engine.put(source)[0] for source in sources[4:]]  # There is room again.
    for payload, source in zip(payloads, sources, strict=True):
        assert torch.equal(fetched(engine, payload), source)


def test_a_failed_write_is_told_and_costs_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0)
    with faults(storage=[StorageFault("write", error="EIO", call=1)]):
        payload, ticket = engine.put(numbered(64 * KIB))
        ticket.wait()
        with pytest.raises(StorageError):
            engine.synchronize()
    engine.synchronize()
    assert payload.state == "host"
    assert engine.stats().disk_errors == 1
    assert torch.equal(fetched(engine, payload), numbered(64 * KIB))


def test_a_copy_on_the_host_serves_where_the_disk_fails(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0)
    payload, _ = engine.put(numbered(64 * KIB))
    engine.synchronize()
    assert payload.state == "host and disk"
    with faults(storage=[StorageFault("read", error="EIO", call=1, times=None)]):
        assert torch.equal(fetched(engine, payload), numbered(64 * KIB))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (StorageFault("read", error="EIO", call=1), StorageError),
        (StorageFault("read", "flip", call=1), CorruptData),
    ],
)
def test_a_failed_read_reaches_the_ticket(
    make_engine: MakeEngine, fault: StorageFault, error: type[Exception]
) -> None:
    engine = make_engine(on_disk=True, host=0, prefetch=0)
    payloads = [engine.put(numbered(300 * KIB, seed))[0] for seed in range(3)]
    engine.synchronize()
    target = torch.empty(300 * KIB, dtype=torch.uint8, device="cuda")
    with faults(storage=[fault]):
        ticket = engine.fetch(payloads[0], target)
        for _ in range(2):
            with pytest.raises(error):
                ticket.wait()
        with pytest.raises(error):
            ticket.stream_wait()
        assert ticket.done()
    assert torch.equal(fetched(engine, payloads[0]), numbered(300 * KIB, 0))


def test_a_failed_copy_is_raised_and_keeps_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    source = numbered(300 * KIB)
    for function, call in (
        ("cuMemcpyDtoHAsync", 1),
        ("cuEventRecord", 2),
        ("cuStreamWaitEvent", 1),
    ):
        with faults(Fault(function, call=call)), pytest.raises(RuntimeError, match=function):
            engine.put(source)
        engine.synchronize()
        assert engine.stats().host_bytes == 0
        assert engine.stats().leaving_bytes == 0
    payload, _ = engine.put(source)
    with faults(Fault("cuMemcpyHtoDAsync", call=1)), pytest.raises(RuntimeError):
        fetched(engine, payload)
    assert torch.equal(fetched(engine, payload), source)

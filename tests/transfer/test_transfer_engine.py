"""``spillover.TransferEngine``: what it moves, what waits for what, and what it refuses."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transfer_cases import KIB, MakeEngine, fetched, numbered

import chrome_format
import spillover
from spillover import (
    ConfigError,
    DiskStore,
    HostOutOfMemory,
    StateError,
    TransferEngine,
    trace,
)
from spillover._core import HostPool
from spillover._pinned import empty_pinned
from spillover.emulator import StorageFault, faults

# Below a chunk, a chunk, several with a rest.
SIZES = (1, 4 * KIB, 64 * KIB, 300 * KIB + 5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("host", [None, 0, "256KiB"], ids=["host", "disk", "both"])
def test_bytes_come_back(make_engine: MakeEngine, size: int, host: Any) -> None:
    engine = make_engine(on_disk=host is not None, host=host)
    sources = [numbered(size, seed) for seed in range(5)]
    payloads = [engine.put(source)[0] for source in sources]
    for _ in range(2):
        for payload, source in zip(payloads, sources, strict=True):
            assert torch.equal(fetched(engine, payload), source)
    engine.synchronize()
    assert {payload.state for payload in payloads} <= {"host", "disk", "host and disk"}
    del payloads, payload
    stats = engine.stats()
    assert stats.host_bytes == stats.dirty_bytes == 0
    assert stats.leaving_bytes == stats.writing_bytes == stats.reading_bytes == 0
    assert stats.out_bytes == 5 * size
    assert stats.in_bytes == 10 * size


def test_many_small_ones_share_a_batch(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sources = [numbered(size, size) for size in range(1, 60)]
    payloads, ticket = engine.put_all(sources)
    assert engine.stats().copies_out == 1
    targets = [torch.zeros_like(source) for source in sources]
    engine.fetch_all(zip(payloads, targets, strict=True)).stream_wait()
    assert all(map(torch.equal, targets, sources))
    ticket.wait()
    assert ticket.done()


def test_dense_tensors_of_any_order(make_engine: MakeEngine) -> None:
    engine = make_engine()
    source = torch.randn(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last)
    payload, _ = engine.put(source)
    target = torch.empty_like(source)
    assert target.stride() == source.stride()
    engine.fetch(payload, target).stream_wait()
    assert torch.equal(target, source)
    scalar, _ = engine.put(source[0, 0, 0, 0])
    assert scalar.size_bytes == 4


def test_source_is_held_until_the_copy_is_over(make_engine: MakeEngine) -> None:
    engine = make_engine(inflight="1MiB")
    source = numbered(100)
    died = weakref.ref(source.untyped_storage())
    _, ticket = engine.put(source)
    del source
    gc.collect()
    assert engine.stats().leaving_bytes == 100
    ticket.wait()
    assert engine.stats().leaving_bytes == 0
    assert died() is None


def test_collect_waits_for_copies_out(make_engine: MakeEngine) -> None:
    engine = make_engine()
    payload, _ = engine.put(numbered(1000))
    assert engine.collect(wait=True) == 1000
    assert payload.state == "host"
    assert engine.collect() == 0


def test_copies_out_are_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine(inflight="128KiB")
    payloads = []
    for seed in range(10):
        payloads.append(engine.put(numbered(50 * KIB, seed))[0])
        assert engine.stats().leaving_bytes <= 128 * KIB
    large, _ = engine.put(numbered(200 * KIB))  # It goes alone.
    assert engine.stats().leaving_bytes == 200 * KIB
    assert engine.stats().stalls["copy"] > 0
    assert large.size_bytes == 200 * KIB


def test_a_payload_on_its_way_out_can_be_fetched(make_engine: MakeEngine) -> None:
    engine = make_engine()
    source = numbered(100 * KIB)
    payload, ticket = engine.put(source)
    assert payload.state == "leaving"
    assert not ticket.done()
    assert torch.equal(fetched(engine, payload), source)


def test_streams_order(make_engine: MakeEngine) -> None:
    """The copy comes after its stream's work, and a stream's later work after the ticket."""
    engine = make_engine()
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        source = numbered(1000)
        expected = source.cpu()
        payload, ticket = engine.put(source)
        ticket.stream_wait(side)
        source.zero_()
    with torch.cuda.stream(other):
        target = torch.full((1000,), 3, dtype=torch.uint8, device="cuda")
    arriving = engine.fetch(payload, target, stream=other)
    arriving.stream_wait(side)
    with torch.cuda.stream(side):
        result = target.clone()
    side.synchronize()
    assert torch.equal(result.cpu(), expected)


def test_pinned_tensors_of_the_program(make_engine: MakeEngine) -> None:
    engine = make_engine()
    source = torch.randn(1000, device="cuda")
    host, more = empty_pinned((1000,), torch.float32), empty_pinned((10,), torch.float32)
    small = torch.ones(10, device="cuda")
    engine.copy_all([(host, source), (more, small)]).wait()
    assert torch.equal(host, source.cpu())
    assert torch.equal(more, small.cpu())
    host += 1
    engine.copy(source, host).stream_wait()
    assert torch.equal(source.cpu(), host)
    with pytest.raises(ConfigError, match="must be pinned"):
        engine.copy(source, torch.empty(1000))
    with pytest.raises(ConfigError, match="4000 bytes, and the host's 40"):
        engine.copy(source, more)
    with pytest.raises(ConfigError, match="nothing to copy"):
        engine.copy_all([])


# ---- budgets ----


def test_host_budget_without_a_disk(make_engine: MakeEngine) -> None:
    engine = make_engine(host="128KiB")
    held = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(2)]
    source = numbered(64 * KIB)
    with pytest.raises(HostOutOfMemory, match=r"host budget of 128.00 KiB does not allow 64.00"):
        engine.put(source)
    with pytest.raises(HostOutOfMemory):
        engine.put(numbered(200 * KIB))
    assert engine.stats().host_bytes_max <= 128 * KIB
    held.pop()
    payload, _ = engine.put(source)
    assert torch.equal(fetched(engine, payload), source)
    assert torch.equal(fetched(engine, held[0]), numbered(64 * KIB, 0))


def test_pool_of_others_is_a_budget_too(make_engine: MakeEngine) -> None:
    pool = HostPool(limit_bytes=256 * KIB)
    engine = make_engine(on_disk=True, pool=pool)
    mine = pool.allocate(128 * KIB)
    payloads = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(6)]
    for seed, payload in enumerate(payloads):
        assert torch.equal(fetched(engine, payload), numbered(64 * KIB, seed))
    del mine


@pytest.mark.parametrize("host", [0, "256KiB", "512KiB"])
def test_budget_holds_with_a_disk(make_engine: MakeEngine, host: Any) -> None:
    engine = make_engine(on_disk=True, host=host)
    limit = 512 * KIB if host == "512KiB" else 256 * KIB
    payloads = [engine.put(numbered(300 * KIB, seed))[0] for seed in range(6)]
    for seed, payload in enumerate(payloads):
        assert torch.equal(fetched(engine, payload), numbered(300 * KIB, seed))
    stats = engine.stats()
    assert stats.host_bytes_max <= limit
    assert stats.written_bytes >= 6 * 300 * KIB - limit
    assert stats.read_bytes > 0


def test_farthest_next_use_goes_first(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host="256KiB", prefetch=0)
    payloads = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(4)]
    order = [payloads[index] for index in (2, 0, 3, 1)]
    engine.expect(order)
    engine.synchronize()
    more = [engine.put(numbered(64 * KIB, seed), next_use=0)[0] for seed in (10, 11)]
    engine.synchronize()
    assert [payload.state for payload in more] == ["host", "host"]
    assert [payload.state for payload in order[2:]] == ["disk", "disk"]
    assert all("host" in payload.state for payload in order[:2])


def test_clean_copies_cost_nothing(make_engine: MakeEngine) -> None:
    """What came back from disk is not written again."""
    engine = make_engine(on_disk=True, host=0)
    payloads = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(8)]
    engine.synchronize()
    written = engine.stats().written_bytes
    assert written == 8 * 64 * KIB
    for _ in range(3):
        for seed, payload in enumerate(payloads):
            assert torch.equal(fetched(engine, payload), numbered(64 * KIB, seed))
    assert engine.stats().written_bytes == written


def test_prefetch_comes_ahead_by_bytes(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0, prefetch="128KiB")
    payloads = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(8)]
    engine.synchronize()
    away = [payload for payload in payloads if payload.state == "disk"]
    engine.expect(away)
    assert [payload.state for payload in away[:3]] == ["reading", "reading", "disk"]
    engine.synchronize()
    assert fetched(engine, away[0]).numel() == 64 * KIB
    stats = engine.stats()
    assert stats.host_misses == 0
    assert stats.prefetched_bytes == 3 * 64 * KIB  # The fetch has moved the window.
    for payload in away[1:]:
        seed = payloads.index(payload)
        assert torch.equal(fetched(engine, payload), numbered(64 * KIB, seed))
        engine.synchronize()
    assert engine.stats().host_misses == 0


@pytest.mark.parametrize("host", [0, "256KiB"])
def test_what_is_needed_soonest_ends_up_on_the_host(make_engine: MakeEngine, host: Any) -> None:
    engine = make_engine(on_disk=True, host=host, prefetch="1MiB")
    payloads = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(8)]
    engine.expect(payloads)
    for _ in range(10):
        engine.synchronize()
        engine.advance(0)
    engine.synchronize()
    states = [payload.state for payload in payloads]
    assert all("host" in state for state in states[:4]), states
    assert states[4:] == ["disk"] * 4


def test_memory_that_is_being_read_for_the_same_fetch_is_waited_for(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(on_disk=True, host=0, prefetch="256KiB")
    payloads = [engine.put(numbered(64 * KIB, seed))[0] for seed in range(9)]
    engine.synchronize()
    away = [payload for payload in payloads if payload.state == "disk"]
    assert len(away) == 5
    with faults(storage=[StorageFault("read", "delay", call=1, times=None, delay_us=200_000)]):
        engine.expect(away[1:])
        assert [payload.state for payload in away] == ["disk"] + ["reading"] * 4
        targets = [torch.empty(64 * KIB, dtype=torch.uint8, device="cuda") for _ in away]
        engine.fetch_all(list(zip(away, targets, strict=True))).wait()
    for payload, target in zip(away, targets, strict=True):
        assert torch.equal(target, numbered(64 * KIB, payloads.index(payload)))


# ---- priorities and cancelling ----


def test_higher_priority_goes_first(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0, staging="128KiB", prefetch=0)
    payloads = [engine.put(numbered(512 * KIB, seed))[0] for seed in range(3)]
    engine.synchronize()
    targets = [torch.empty(512 * KIB, dtype=torch.uint8, device="cuda") for _ in payloads]
    with faults(storage=[StorageFault("read", "delay", call=1, times=None, delay_us=20_000)]):
        low = engine.fetch(payloads[0], targets[0], priority=-1)
        high = engine.fetch(payloads[1], targets[1], priority=5)
        high.stream_wait()
        # Its last piece is on the stream, while pieces of the other are still to be read.
        assert engine.stats().waiting_pieces > 0
        assert not low.done()
        low.wait()
    assert torch.equal(targets[0], numbered(512 * KIB, 0))
    high.wait()
    assert torch.equal(targets[1], numbered(512 * KIB, 1))


def test_cancel_a_put(make_engine: MakeEngine) -> None:
    engine = make_engine()
    payload, ticket = engine.put(numbered(1000))
    assert ticket.cancel()
    assert not ticket.cancel()
    assert ticket.is_cancelled
    with pytest.raises(StateError, match="cancelled"):
        ticket.wait()
    with pytest.raises(StateError, match="dropped"):
        fetched(engine, payload)
    engine.synchronize()
    assert engine.stats().host_bytes == 0
    done = engine.put(numbered(10))[1]
    done.wait()
    assert not done.cancel()


def test_cancel_a_fetch_from_disk(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0, staging="128KiB", prefetch=0)
    payload, _ = engine.put(numbered(1024 * KIB))
    engine.synchronize()
    target = torch.empty(1024 * KIB, dtype=torch.uint8, device="cuda")
    with faults(storage=[StorageFault("read", "delay", call=1, times=None, delay_us=50_000)]):
        ticket = engine.fetch(payload, target)
        assert ticket.cancel()
    with pytest.raises(StateError, match="cancelled"):
        ticket.wait()
    assert ticket.done()
    with pytest.raises(StateError, match="cancelled"):
        ticket.stream_wait()
    assert torch.equal(fetched(engine, payload), numbered(1024 * KIB))


def test_drop_does_not_stop_a_fetch(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0)
    payload, _ = engine.put(numbered(512 * KIB))
    engine.synchronize()
    target = torch.empty(512 * KIB, dtype=torch.uint8, device="cuda")
    ticket = engine.fetch(payload, target)
    del payload
    ticket.wait()
    assert torch.equal(target, numbered(512 * KIB))
    engine.synchronize()
    assert engine.stats().host_bytes == 0


# ---- life ----


def test_close_waits_and_refuses(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0)
    payload, ticket = engine.put(numbered(1024 * KIB))
    engine.close()
    engine.close()
    ticket.wait()
    for refused in (
        lambda: engine.put(numbered(10)),
        lambda: fetched(engine, payload),
        engine.synchronize,
        lambda: engine.advance(3),
    ):
        with pytest.raises(StateError, match="closed"):
            refused()


def test_close_fails_what_waits_for_the_disk(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host=0, staging="128KiB", prefetch=0)
    payload, _ = engine.put(numbered(1024 * KIB))
    engine.synchronize()
    target = torch.empty(1024 * KIB, dtype=torch.uint8, device="cuda")
    with faults(storage=[StorageFault("read", "delay", call=1, times=None, delay_us=50_000)]):
        ticket = engine.fetch(payload, target)
        engine.close()
    with pytest.raises(StateError, match="closed"):
        ticket.wait()


def test_an_engine_that_goes_ends_cleanly() -> None:
    source = numbered(1000)
    engine = TransferEngine()
    payload, ticket = engine.put(source)
    died = weakref.ref(engine)
    del engine
    gc.collect()
    assert died() is None
    ticket.wait()
    assert payload.state == "host"
    assert not ticket.cancel()


def test_two_engines_on_one_device(make_engine: MakeEngine) -> None:
    engines = [make_engine(), make_engine(host="1MiB")]
    sources = [numbered(100 * KIB, seed) for seed in range(4)]
    payloads = [[engine.put(source)[0] for source in sources] for engine in engines]
    for engine, kept in zip(engines, payloads, strict=True):
        for payload, source in zip(kept, sources, strict=True):
            assert torch.equal(fetched(engine, payload), source)


def test_threads(make_engine: MakeEngine) -> None:
    engine = make_engine(on_disk=True, host="512KiB", inflight="512KiB")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for turn in range(8):
                    sources = [numbered(70 * KIB, number + 10 * turn + i) for i in range(3)]
                    payloads = [engine.put(source)[0] for source in sources]
                    for payload, source in zip(payloads, sources, strict=True):
                        assert torch.equal(fetched(engine, payload, priority=number), source)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    engine.synchronize()
    assert engine.stats().host_bytes == 0


def test_is_exported_without_torch() -> None:
    code = "import sys, spillover; spillover.TransferEngine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "TransferEngine" in spillover.__all__


def test_a_store_may_serve_engines_and_others(make_engine: MakeEngine, tmp_path: Path) -> None:
    with DiskStore(tmp_path / "shared") as store:
        engine = make_engine(disk=store, host=0)
        payload, _ = engine.put(numbered(300 * KIB))
        stored, ticket = store.write(b"mine")
        ticket.wait()
        assert torch.equal(fetched(engine, payload), numbered(300 * KIB))
        del payload, stored
        engine.close()
        assert store.stats().used_bytes == 0


def test_spans_are_in_the_trace(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(on_disk=True, host=0)
    source = numbered(512 * KIB)
    with trace.record(tmp_path / "out.json"):
        payload, _ = engine.put(source)
        engine.synchronize()
        assert torch.equal(fetched(engine, payload), source)
        engine.synchronize()
    found = chrome_format.read(tmp_path / "out.json")
    for name in ("copy out", "copy in", "write", "read"):
        spans = chrome_format.spans(found, name)
        assert sum(span["args"]["bytes"] for span in spans) >= 256 * KIB, name
    assert sum(span["args"]["bytes"] for span in chrome_format.spans(found, "copy in")) == 512 * KIB
    assert chrome_format.spans(found, "wait for host memory")


def test_figures_are_in_the_stats_of_the_process(make_engine: MakeEngine) -> None:
    engine = make_engine()
    payload, ticket = engine.put(numbered(1000))
    ticket.wait()
    stats = spillover.stats()
    assert engine.stats() in stats.transfers
    assert engine.stats().dirty_bytes == payload.size_bytes
    assert "transfers" not in stats.others
    assert "transfers" in str(stats)

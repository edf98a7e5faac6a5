"""A transfer engine beside a model that remembers what each payload must hold.

Run as ``transfer_model.py SEED STEPS``: a random program on the emulated device.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spillover import DiskStore, StateError, TransferEngine
from spillover._core import Payload
from spillover._transfer import TransferTicket

KIB = 1 << 10
CHUNK = 16 * KIB
STAGING = 64 * KIB
#: Below a chunk, chunks and rests, larger than the staging.
SIZES = (1, 1000, CHUNK, CHUNK + 1, 40 * KIB, 3 * CHUNK, 100 * KIB)
#: The host's budget, and whether there is a disk.
PLACES = ((None, False), (0, True), (STAGING, True), (150 * KIB, True))


@dataclass
class Kept:
    """A payload and what it holds."""

    payload: Payload
    ticket: TransferTicket
    seed: int
    size: int
    shares_ticket: bool = False


@dataclass
class Arriving:
    """A fetch and where it goes to."""

    ticket: TransferTicket
    target: torch.Tensor
    kept: Kept


def contents(seed: int, size: int) -> torch.Tensor:
    """Bytes on the device that tell the seed and their place."""
    return ((torch.arange(size, device="cuda") + seed) * (2 * seed + 7) % 251).to(torch.uint8)


@dataclass
class ModelledEngine:
    """Each method does something on the engine and checks what must be true at once."""

    host: int | None
    on_disk: bool
    folder: Path
    kept: list[Kept] = field(default_factory=list)
    arriving: list[Arriving] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        self.store = DiskStore(self.folder) if self.on_disk else None
        self.engine = TransferEngine(
            host=self.host,
            disk=self.store,
            chunk=CHUNK,
            staging=STAGING,
            inflight=128 * KIB,
            prefetch=STAGING,
        )
        self.streams = [torch.cuda.current_stream(), torch.cuda.Stream()]

    # ---- operations: numbers pick from what there is, by the remainder ----

    def put(self, sizes: list[int], next_use: int | None, stream: int) -> None:
        with torch.cuda.stream(self.streams[stream % 2]):
            seeds = [self.made + i for i in range(len(sizes))]
            self.made += len(sizes)
            sources = [contents(seed, size) for seed, size in zip(seeds, sizes, strict=True)]
            payloads, ticket = self.engine.put_all(sources, next_uses=[next_use] * len(sizes))
        for payload, seed, size in zip(payloads, seeds, sizes, strict=True):
            self.kept.append(Kept(payload, ticket, seed, size, len(sizes) > 1))

    def fetch(self, pick: int, priority: int, stream: int) -> None:
        if not self.kept:
            return
        kept = self.kept[pick % len(self.kept)]
        with torch.cuda.stream(self.streams[stream % 2]):
            target = torch.full((kept.size,), 255, dtype=torch.uint8, device="cuda")
            ticket = self.engine.fetch(kept.payload, target, priority=priority)
        self.arriving.append(Arriving(ticket, target, kept))

    def use(self, pick: int, stream: int) -> None:
        """Have a stream wait for a fetch and look at what came."""
        if not self.arriving:
            return
        arriving = self.arriving.pop(pick % len(self.arriving))
        with torch.cuda.stream(self.streams[stream % 2]):
            arriving.ticket.stream_wait()
            torch.cuda.current_stream().wait_stream(self.streams[1 - stream % 2])
            assert torch.equal(arriving.target, contents(arriving.kept.seed, arriving.kept.size))

    def wait(self, pick: int) -> None:
        """The host waits for a fetch."""
        if self.arriving:
            arriving = self.arriving[pick % len(self.arriving)]
            arriving.ticket.wait()
            assert arriving.ticket.done()

    def ask(self, pick: int) -> None:
        for ticket in [kept.ticket for kept in self.kept] + [item.ticket for item in self.arriving]:
            if ticket.done():
                ticket.wait()
                assert not ticket.cancel()

    def drop(self, pick: int) -> None:
        if self.kept:
            self.kept.pop(pick % len(self.kept)).payload.drop()

    def cancel_fetch(self, pick: int) -> None:
        if not self.arriving:
            return
        arriving = self.arriving.pop(pick % len(self.arriving))
        if arriving.ticket.cancel():
            assert arriving.ticket.is_cancelled
            try:
                arriving.ticket.wait()
            except StateError:
                return
            raise AssertionError("a cancelled transfer went well")

    def cancel_put(self, pick: int) -> None:
        if not self.kept:
            return
        kept = self.kept[pick % len(self.kept)]
        if not kept.shares_ticket and kept.ticket.cancel():
            self.kept.remove(kept)

    def expect(self, picks: list[int]) -> None:
        chosen = {pick % len(self.kept): None for pick in picks} if self.kept else {}
        self.engine.expect(self.kept[index].payload for index in chosen)

    def advance(self, steps: int) -> None:
        self.engine.advance(self.engine.position + steps)

    def collect(self, wait: bool) -> None:
        self.engine.collect(wait=wait)
        if wait:
            assert self.engine.stats().leaving_bytes == 0

    def synchronize(self) -> None:
        self.engine.synchronize()
        stats = self.engine.stats()
        under_way = ("leaving_bytes", "writing_bytes", "reading_bytes", "waiting_pieces")
        assert all(getattr(stats, name) == 0 for name in under_way), stats
        held = {kept.payload.state for kept in self.kept}
        assert held <= {"host", "disk", "host and disk"}, held

    # ---- what always holds ----

    def check(self) -> None:
        stats = self.engine.stats()
        if self.host is not None:
            assert stats.host_bytes_max <= max(self.host, STAGING), stats
        assert stats.dirty_bytes <= stats.host_bytes, stats
        assert stats.disk_errors == 0

    def finish(self) -> None:
        """Every payload still has its bytes, and nothing is left when all have gone."""
        for kept in self.kept:
            target = torch.empty(kept.size, dtype=torch.uint8, device="cuda")
            self.engine.fetch(kept.payload, target).stream_wait()
            assert torch.equal(target, contents(kept.seed, kept.size))
        while self.arriving:
            self.use(0, 0)
        while self.kept:
            self.drop(0)
        self.engine.synchronize()
        stats = self.engine.stats()
        assert stats.host_bytes == stats.dirty_bytes == 0, stats
        self.engine.close()
        if self.store is not None:
            assert self.store.stats().used_bytes == 0
            self.store.close()


def random_step(model: ModelledEngine, rng: random.Random) -> None:
    """Some operation; those that move bytes are the most likely."""
    pick, stream = rng.randrange(1000), rng.randrange(2)
    operations: list[tuple[int, Any]] = [
        (6, lambda: model.put([rng.choice(SIZES)], rng.choice((None, pick)), stream)),
        (1, lambda: model.put(rng.choices(SIZES, k=5), None, stream)),
        (6, lambda: model.fetch(pick, rng.randrange(-1, 2), stream)),
        (4, lambda: model.use(pick, stream)),
        (1, lambda: model.wait(pick)),
        (1, lambda: model.ask(pick)),
        (4, lambda: model.drop(pick)),
        (1, lambda: model.cancel_fetch(pick)),
        (1, lambda: model.cancel_put(pick)),
        (1, lambda: model.expect(rng.choices(range(1000), k=4))),
        (1, lambda: model.advance(rng.randrange(3))),
        (1, lambda: model.collect(bool(stream))),
        (1, lambda: model.synchronize()),
    ]
    weights, functions = zip(*operations, strict=True)
    rng.choices(functions, weights)[0]()
    model.check()


def main(seed: str, steps: str) -> None:
    print(f"seed {seed}", flush=True)
    rng = random.Random(int(seed))
    for host, on_disk in PLACES:
        with tempfile.TemporaryDirectory(prefix="spillover-transfers-") as folder:
            model = ModelledEngine(host, on_disk, Path(folder))
            for _ in range(int(steps)):
                random_step(model, rng)
            model.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])

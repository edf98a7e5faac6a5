"""Transfers in virtual time: copies and disk overlap, and every run takes the same nanoseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from spillover import emulator
from spillover.emulator import costs

MIB = 1 << 20
CHUNK = MIB
SIZE = 16 * MIB

PROGRAM = """
import json, sys
from spillover import emulator
emulator.enable(vram="1GiB", profile="rtx4090", hazards="raise")
import torch
from spillover import DiskStore, TransferEngine
MIB = 1 << 20
store = DiskStore(sys.argv[1])
engine = TransferEngine(chunk="1MiB", staging="4MiB", host=0, disk=store, prefetch="4MiB")
source = torch.arange(16 * MIB, device="cuda").to(torch.uint8)
target = torch.empty_like(source)

def away(tensor):
    payload, ticket = engine.put(tensor)
    ticket.wait()
    engine.synchronize()
    return payload

# Pins the memory, and makes what is made once.
engine.fetch(away(source), target).wait()
torch.cuda.synchronize()
found, now = {}, emulator.now_ns

start = now()
payload, ticket = engine.put(source)
found["put_returned"] = now() - start
ticket.wait()
found["left"] = now() - start
engine.synchronize()
found["stored"] = now() - start

misses = engine.stats().host_misses
start = now()
target.zero_()
ticket = engine.fetch(payload, target)
found["fetch_returned"] = now() - start
found["done_at_once"] = ticket.done()
found["reads"] = engine.stats().host_misses - misses
ticket.stream_wait()
found["issued"] = now() - start
assert torch.equal(target, source)
found["arrived"] = now() - start
found["done_then"] = ticket.done()

# A kernel of a millisecond or more while the next payloads are read ahead.
payloads = [away(source[i * MIB : (i + 1) * MIB]) for i in range(8)]
engine.expect(payloads[:4])
found["positions"] = []
for payload in payloads[:4]:
    emulator.advance(2_000_000)
    start = now()
    engine.fetch(payload, target[:MIB]).stream_wait()
    torch.cuda.synchronize()
    found["positions"].append(now() - start)

# Device memory that a copy holds is not free before the copy is over in virtual time.
_, ticket = engine.put(source)
found["held"] = [engine.stats().leaving_bytes]
emulator.advance(1000)
engine.collect()
found["held"].append(engine.stats().leaving_bytes)
emulator.advance(50_000_000)
engine.collect()
found["held"].append(engine.stats().leaving_bytes)
found["hazards"] = emulator.hazards()
report = emulator.clock_report()
found["makespan"], found["unseen"] = report.makespan_ns, report.unseen_waits
found["busy"] = {use.name: use.busy_ns for use in report.resources}
print(json.dumps(found))
"""


def run_program(folder: Path, **variables: str) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, **variables},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_copies_and_disk_overlap_and_repeat(tmp_path: Path) -> None:
    found = run_program(tmp_path)
    profile = emulator.load_profile("rtx4090")
    chunks, reads = SIZE // CHUNK, found["reads"]
    out = costs.copy_ns(profile.gpu, CHUNK, "to_host")
    back = costs.copy_ns(profile.gpu, CHUNK, "to_device")
    write = costs.disk_ns(profile.disk, CHUNK, "write")
    read = costs.disk_ns(profile.disk, CHUNK, "read")
    slack = 400_000  # Launches, and latencies of single copies.
    # The disk is slower, so it is never idle but before the first chunk has left; not the sum.
    assert chunks * write <= found["stored"] <= out + chunks * write + slack
    assert found["stored"] < chunks * (out + write) - slack
    assert found["left"] < found["stored"]
    # Some chunks are on the host yet.
    assert 0 < reads < chunks
    assert reads * read <= found["issued"] <= found["arrived"] <= reads * read + back + slack
    assert found["arrived"] < reads * (read + back) - slack
    # The first chunks are on their way at once; the last one is issued once it has been read.
    assert found["fetch_returned"] < slack < found["issued"]
    assert not found["done_at_once"]
    assert found["done_then"]
    # What is read ahead costs its copy alone.
    assert all(position <= back + slack // 2 for position in found["positions"][1:])
    assert found["held"][0] == found["held"][1] == SIZE
    assert found["held"][2] == 0
    assert found["hazards"] == []
    assert found["unseen"] == 0
    other = tmp_path / "other"
    assert run_program(other) == found

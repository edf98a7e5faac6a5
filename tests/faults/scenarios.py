"""Small programs over each part of the product, for sweeps of faults over every call they make.

Each makes what it needs, uses it, frees it and returns values that no fault may change.

Run as ``scenarios.py NAME FAULT [SAMPLE [SEED]]`` in a process with emulated devices: sweeps one of
them and prints what was found.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spillover import (
    DurableStore,
    TransferEngine,
    _core,
    allocator,
    offload_activations,
    stream_parameters,
)
from spillover._streams import copy_streams
from spillover.emulator import Fault, StorageFault, calls, faults, sweep
from spillover.optim import AdamW, _paging_store, page, unpage

MIB = 1 << 20
_folder = tempfile.TemporaryDirectory(prefix="spillover-faults-")
_FOLDER = _folder.name

# So little that what is paged to disk really goes there.
_paging_store._CHUNK_BYTES, _paging_store._STAGING_BYTES = 4 << 10, 8 << 10


def pool() -> object:
    """The device pool under torch: sizes of every kind, two streams, a block used on both."""
    side = torch.cuda.Stream()
    values = []
    for size in (100, 300_000, 3 * MIB, 25 * MIB):
        block = torch.full((size,), 3, dtype=torch.uint8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy = block + 1
        block.record_stream(side)
        del block
        again = torch.full((size,), 5, dtype=torch.uint8, device="cuda")
        torch.cuda.current_stream().wait_stream(side)
        copy.record_stream(torch.cuda.current_stream())
        values.append((copy.max().item(), again.min().item()))
        del copy, again
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return values


def host_pool() -> object:
    """Pinned buffers, small and large, reused and trimmed; a copy to the device and back."""
    host = _core.HostPool(limit_bytes=16 * MIB)
    small = [host.allocate(1000) for _ in range(3)]
    large = host.allocate(2 * MIB)
    source = torch.frombuffer(memoryview(large), dtype=torch.uint8)
    source.copy_(torch.arange(2 * MIB, dtype=torch.int64).to(torch.uint8))
    device = source.to("cuda", non_blocking=True)
    back = torch.empty_like(source)
    torch.cuda.synchronize()
    back.copy_(device)
    del small, large, source, device
    host.trim()
    reused = host.allocate(MIB)
    return back, len(reused)


def reserved_host_pool() -> object:
    """Memory pinned ahead in pieces; blocks and slots cut from it, and more than it has."""
    host = _core.HostPool(limit_bytes=16 * MIB, region_bytes_max=4 * MIB)
    host._reserve(6 * MIB, None)
    small, large, beyond = (host.allocate(size) for size in (1000, 3 * MIB, 5 * MIB))
    source = torch.frombuffer(memoryview(large), dtype=torch.uint8)
    source.fill_(7)
    device = source.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    result = device.cpu()
    del small, large, beyond, source, device
    stats = host.stats()
    assert stats.used_bytes == 0
    assert stats.ahead_bytes == 6 * MIB
    assert host._is_valid()
    return result, host.trim()


def disk() -> object:
    """Writes behind an event, reads into pinned memory, extents over two folders."""
    store = _core.DiskStore(
        [f"{_FOLDER}/a", f"{_FOLDER}/b"], extent_bytes_max=64 << 10, threads_per_folder=1
    )
    host = _core.HostPool(limit_bytes=16 * MIB)
    size = 200_000
    source, target = host.allocate(size), host.allocate(size)
    view = torch.frombuffer(memoryview(source), dtype=torch.uint8)
    result = torch.frombuffer(memoryview(target), dtype=torch.uint8)
    device = torch.full((size,), 7, dtype=torch.uint8, device="cuda")
    view.copy_(device, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    try:
        payload, ticket = store.write(memoryview(source), after=copied)
        ticket.wait()
        store.read(payload, memoryview(target)).wait()
        return result.clone(), store.stats().written_bytes
    finally:
        store.close()


def _training_step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss = model(x * 1).square().mean()
    loss.backward()
    return loss.detach()


def _activations(rows: int = 64, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.GELU())]
    model = nn.Sequential(*layers).cuda()
    x = torch.randn(rows, 64).cuda().requires_grad_()
    options.update(min_bytes=1, keep_on_device=0, in_flight_max="64KiB", prefetch="64KiB")
    with offload_activations(**options):
        loss = _training_step(model, x)
    found = [loss, x.grad, *(parameter.grad for parameter in model.parameters())]
    return [tensor.cpu() for tensor in found if tensor is not None]


def activations_host() -> object:
    """Saved tensors in pinned memory."""
    return _activations(pool=_core.HostPool(limit_bytes=8 * MIB))


def activations_disk() -> object:
    """Saved tensors on disk."""
    store = _core.DiskStore([f"{_FOLDER}/c"], threads_per_folder=1)
    pool = _core.HostPool(limit_bytes=256 << 10)
    try:
        return _activations(rows=256, tier="disk", disk=store, pool=pool)
    finally:
        store.close()


def parameters() -> object:
    """Weights streamed from the host through two training steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]), nn.Linear(16, 16).cuda()
    )
    handle = stream_parameters(model)
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(8, 16).cuda()
        for _ in range(2):
            optimizer.zero_grad()
            _training_step(model, x)
            optimizer.step()
    finally:
        handle.remove()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def adamw() -> object:
    """Two steps of the host optimizer on float32 and bfloat16 weights."""
    torch.manual_seed(0)
    weights = [
        nn.Parameter(torch.randn(1000).to("cuda", dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    optimizer = AdamW(weights, lr=0.1)
    for step in range(2):
        for weight in weights:
            weight.grad = torch.full_like(weight, step + 1.0)
        optimizer.step()
    return [weight.detach().cpu() for weight in weights]


def _paged(tier: str, **options: Any) -> list[torch.Tensor]:
    """Steps of an optimizer whose state is paged in small buckets, and its way back."""
    copy_streams(torch.device("cuda", 0))  # Which only the host tier, and failures, would use.
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(size).cuda()) for size in (1000, 3000, 500, 2000)]
    optimizer = torch.optim.Adam(weights, lr=0.1)
    page(optimizer, tier, bucket_bytes="16KiB", **options)  # type: ignore[arg-type]
    for step in range(3):
        for weight in weights:
            weight.grad = torch.full_like(weight, step + 1.0)
        optimizer.step()
    found = [optimizer.state[weights[0]]["exp_avg"].clone()]
    unpage(optimizer)
    found += [optimizer.state[weight]["exp_avg_sq"].cpu() for weight in weights]
    return found + [weight.detach().cpu() for weight in weights]


def paging_host() -> object:
    """A paged optimizer with its state in pinned memory."""
    return _paged("host", host_budget=MIB)


def paging_disk() -> object:
    """A paged optimizer with its state on disk."""
    return _paged("disk", directory=f"{_FOLDER}/e")


def _twice(step: Callable[[], object]) -> None:
    """Do the step, and again where it failed: what a program that catches errors would do."""
    try:
        step()
    except (RuntimeError, MemoryError, OSError):
        torch.cuda.synchronize()
        step()


def training_retried() -> object:
    """Forward and backward with weights and activations on the host, repeated where they failed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)]), nn.Linear(16, 16))
    x = torch.randn(8, 16).cuda()
    pool = _core.HostPool(limit_bytes=8 * MIB)
    handle = stream_parameters(model)

    def step() -> torch.Tensor:
        model.zero_grad()
        with offload_activations(
            min_bytes=1, keep_on_device=0, in_flight_max="64KiB", prefetch="64KiB", pool=pool
        ):
            return _training_step(model, x)

    try:
        for _ in range(2):
            _twice(step)
        torch.cuda.synchronize()
        return [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    finally:
        _twice(handle.remove)


def _transfers(**options: Any) -> object:
    """Payloads of several chunks and a batch of small ones, out and back, twice."""
    sources = [
        torch.full((size,), seed, dtype=torch.uint8, device="cuda")
        for seed, size in enumerate((200_000, 1000, 70_000))
    ]
    targets = [torch.zeros_like(source) for source in sources]
    host = _core.HostPool(limit_bytes=8 * MIB)
    engine = TransferEngine(pool=host, chunk="64KiB", **options)
    try:
        payloads, leaving = engine.put_all(sources)
        leaving.wait()
        engine.expect(payloads)
        for _ in range(2):
            engine.fetch_all(zip(payloads, targets, strict=True)).wait()
        return [target.cpu() for target in targets]
    finally:
        engine.close()


def transfers_host() -> object:
    """The transfer engine with pinned memory alone."""
    return _transfers()


def transfers_disk() -> object:
    """The transfer engine with everything passing through to the disk."""
    store = _core.DiskStore([f"{_FOLDER}/d"], threads_per_folder=1)
    try:
        return _transfers(host=0, staging="128KiB", disk=store)
    finally:
        store.close()


def durable() -> object:
    """A store that is made, committed twice, opened again, read, rolled back and removed."""
    size = 30_000
    contents = [bytes([number]) * size for number in (1, 2, 3)]
    found = bytearray(size)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as place:
        folders = [f"{place}/a", f"{place}/b"]
        with DurableStore(folders, {"state": size}, extent_bytes=8192) as store:
            for step, content in enumerate(contents[:2]):
                store.write("state", content).wait()
                store.commit({"step": step})
        with DurableStore(folders) as store:
            store.write("state", contents[2]).wait()
            store.rollback()
            store.verify()
            store.read("state", found).wait()
            result = torch.frombuffer(found, dtype=torch.uint8), store.extra, store.sequence
        DurableStore.delete(folders)
        return result


def sleeping() -> object:
    """A tag of the device pool that sleeps and wakes, with a block that is freed meanwhile."""
    with allocator.tag("faults: sleeping"):
        kept = torch.full((3 * MIB,), 7, dtype=torch.uint8, device="cuda")
        freed = torch.full((MIB,), 9, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    try:
        allocator.sleep("faults: sleeping")
        del freed
        moved = allocator.wake("faults: sleeping")
    finally:
        _twice(allocator.wake)  # A waking that failed can be repeated; what is awake stays so.
    result = kept.cpu(), moved
    del kept
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return result


SCENARIOS: dict[str, Callable[[], object]] = {
    function.__name__: function
    for function in (
        pool,
        host_pool,
        reserved_host_pool,
        disk,
        activations_host,
        activations_disk,
        parameters,
        adamw,
        paging_host,
        paging_disk,
        training_retried,
        transfers_host,
        transfers_disk,
        durable,
        sleeping,
    )
}
#: Those that have nothing to do without this package's pool under torch.
ON_THE_POOL = {"pool", "sleeping"}

#: Faults of the disk tier, one of each kind that an operation can have.
STORAGE = {
    **{
        f"{operation}-{error}": StorageFault(operation, error=error)  # type: ignore[arg-type]
        for operation, errors in {
            "make_folder": ("EACCES",),
            "open": ("EMFILE", "EROFS"),
            "rename": ("EIO",),
            "lock": ("EIO",),
            "sync": ("EIO",),
            "allocate": ("ENOSPC", "EIO", "EINTR", "EOPNOTSUPP"),
            "read": ("EIO", "EINTR", "EAGAIN"),
            "write": ("ENOSPC", "EIO", "EINTR", "EAGAIN"),
        }.items()
        for error in errors
    },
    **{
        f"{operation}-{kind}": StorageFault(operation, kind)  # type: ignore[arg-type]
        for operation, kinds in {
            "read": ("short", "flip", "delay"),
            "write": ("short", "flip", "torn", "delay"),
        }.items()
        for kind in kinds
    },
}


#: Calls that torch makes by the hundred to ask for the current device, also where it destroys an
#: event: an error ends the process there, so "work" leaves them out and "driver" has them.
QUESTIONS = ("cuCtxGetCurrent", "cuCtxGetDevice", "cuDevicePrimaryCtxGetState")


def points_of(scenario: Callable[[], object], name: str) -> list[Fault | StorageFault]:
    """The faults called ``name`` at every call that the scenario makes."""
    scenario()
    with faults():
        scenario()
    counts = calls()
    if name == "driver":
        total = sum(counts[function] for function in counts if function[2:3].isupper())
        return [Fault(call=call) for call in range(1, total + 1)]
    if name == "work":
        return [
            Fault(function, call=call)
            for function, count in counts.items()
            if function[2:3].isupper() and function not in QUESTIONS
            for call in range(1, count + 1)
        ]
    points: list[Fault | StorageFault] = []
    for kind in STORAGE if name == "storage" else (name,):
        fault = STORAGE[kind]
        count = counts.get(f"storage.{fault.operation}", 0)
        points += [replace(fault, call=call) for call in range(1, count + 1)]
    return points


def check_pool() -> None:
    """The device pool's own checks; that nothing is left in it shows to the driver."""
    _core.Pool(0).check_invariants()


def main(name: str, fault: str, sample: str = "all", seed: str = "0") -> None:
    """Sweep one scenario, or all of them on the installed pool, and print what was found."""
    names = list(SCENARIOS) if name == "all" else [name]
    check = None
    if ON_THE_POOL & set(names):
        allocator.install()
        check = check_pool
    found: dict[str, Any] = {"points": 0, "survived": 0, "raised": Counter(), "failures": []}
    for each in names:
        report = sweep(
            SCENARIOS[each],
            points=points_of(SCENARIOS[each], fault),
            sample=None if sample == "all" else int(sample),
            seed=int(seed),
            check=check,
            progress=sys.stderr,
        )
        found["points"] += report.points
        found["survived"] += report.survived
        found["raised"] += report.raised
        found["failures"] += [f"{each}: {failure}" for failure in report.failures]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

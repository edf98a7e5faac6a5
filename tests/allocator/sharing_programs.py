"""Processes that share CUDA tensors with the pool installed, on emulated devices.

``python sharing_programs.py PROGRAM...`` runs one after the other; the other process is spawned,
which imports this module. ``SPILLOVER_TEST_NATIVE`` names the sides that keep torch's own
allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from spillover import allocator, emulator

MIB = 1 << 20
NAME = "receiver" if __name__ == "__mp_main__" else "sender"
NATIVE = os.environ.get("SPILLOVER_TEST_NATIVE", "").split()
IS_NATIVE = NAME in NATIVE

emulator.enable(
    vram=os.environ.get("SPILLOVER_TEST_VRAM", "256MiB"),
    devices=2,
    schedule="late",
    hazards="raise",
    virtual_memory=os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1",
)
if not IS_NATIVE:
    assert allocator.install(adapter="full")

import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from own_allocator import OwnAllocator  # noqa: E402

HELD: dict[str, Any] = {}


def backend() -> str:
    return torch.cuda.get_allocator_backend()


def check() -> None:
    torch.cuda.synchronize()
    assert not emulator.hazards(), emulator.hazards()
    if not IS_NATIVE:
        for device in range(2):
            allocator.check_invariants(device)


def receive(inbox: Any, outbox: Any) -> None:
    """Do what the other process asks until it asks for nothing."""
    while (request := inbox.get()) is not None:
        function, arguments = request
        outbox.put(function(*arguments))
        del request, arguments
    HELD.clear()
    check()
    outbox.put("done")


class Receiver:
    """The other process; ``ask`` has it run a function of this module."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.inbox, self.outbox = context.Queue(), context.Queue()
        self.process = context.Process(target=receive, args=(self.inbox, self.outbox), daemon=True)
        self.process.start()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.inbox.put((function, arguments))
        return self.outbox.get(timeout=60)


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    other = Receiver()
    assert (backend() == "native") == ("sender" in NATIVE)
    assert (other.ask(backend) == "native") == ("receiver" in NATIVE)
    yield other
    other.inbox.put(None)
    assert other.outbox.get(timeout=60) == "done"
    other.process.join(60)
    assert other.process.exitcode == 0, other.process.exitcode
    torch.cuda.ipc_collect()
    check()


def keep(name: str, tensor: torch.Tensor) -> int:
    HELD[name] = tensor
    return tensor.data_ptr()


def drop(name: str) -> None:
    del HELD[name]


def add(name: str, value: int) -> list[float]:
    """Add to a tensor; give its first and last elements before."""
    tensor = HELD[name]
    found = [tensor[0].item(), tensor[-1].item()]
    tensor.add_(value)
    torch.cuda.synchronize()
    return found


def send_back(name: str) -> str:
    try:
        torch.multiprocessing.reductions.reduce_tensor(HELD[name])
    except RuntimeError as error:
        return str(error)
    return "no error"


def wait_for(event: torch.cuda.Event) -> str:
    stream = torch.cuda.Stream()
    stream.wait_event(event)
    stream.synchronize()
    assert event.query()
    return "waited"


def copy_to_other_device(name: str) -> float:
    """Copy between devices; what was opened before they became peers is theirs, too."""
    copy = HELD[name].to("cuda:1", non_blocking=True)
    back = torch.zeros(HELD[name].shape, device="cuda:0").copy_(copy)
    assert torch.cuda.can_device_access_peer(0, 1)
    total = float(back.sum().item())
    torch.cuda.synchronize(0)
    with torch.cuda.device(1):
        address, count = ctypes.c_void_p(HELD[name].data_ptr()), ctypes.c_size_t(4)
        assert ctypes.CDLL("libcudart.so.13").cudaMemsetAsync(address, 0, count, None) == 0
        torch.cuda.synchronize()
    return total


def refusal_of(shared: tuple[Any, ...]) -> str:
    """Open a storage by what its process says of it; why that fails."""
    torch.cuda.init()
    try:
        torch.UntypedStorage._new_shared_cuda(*shared)
    except RuntimeError as error:
        return str(error)
    return "no error"


def leave() -> None:
    os._exit(0)


def tensors() -> None:
    """Blocks of every size; what one process writes the other sees, one mapping a block."""
    with receiver() as other:
        sizes = {"small": 100, "page": MIB, "chunks": 7 * MIB, "odd": 3 * MIB + 77}
        blocks = {name: torch.full((size,), 1.0, device="cuda") for name, size in sizes.items()}
        for index, (name, block) in enumerate(blocks.items()):
            # Nobody has waited for the fill.
            block.fill_(index)
            address = other.ask(keep, name, block)
            assert other.ask(add, name, 5) == [index, index]
            assert [block[0].item(), block[-1].item()] == [index + 5] * 2
            view = block[10:90:2]
            assert other.ask(keep, name + " view", view) == address + 40
            assert other.ask(add, name + " view", 100) == [index + 5] * 2
            assert block[88].item() == index + 105
            assert block[89].item() == index + 5
        # Many times the same; and the small ones have one chunk together.
        for _ in range(20):
            assert other.ask(keep, "again", blocks["chunks"]) == other.ask(
                keep, "again", blocks["chunks"]
            )
        second = torch.full((100,), 3.0, device="cuda")
        assert other.ask(keep, "second", second) != other.ask(keep, "small", blocks["small"])
        assert other.ask(add, "second", 1) == [3, 3]
        assert blocks["small"][0].item() == 5
        far = torch.full((MIB,), 9.0, device="cuda:1")
        other.ask(keep, "far", far)
        assert other.ask(add, "far", 1) == [9, 9]
        torch.cuda.synchronize(1)
        assert far[-1].item() == 10
        assert "from another process" in other.ask(send_back, "far")
        parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
        other.ask(keep, "parameter", parameter)
        for name in (*sizes, *[f"{name} view" for name in sizes], "again", "second", "far"):
            other.ask(drop, name)
        other.ask(drop, "parameter")


def large() -> None:
    """A block of large chunks and small ones."""
    block = torch.empty(515 * MIB, dtype=torch.uint8, device="cuda")
    block[0], block[-1] = 3, 4
    with receiver() as other:
        if "receiver" in NATIVE:
            refusal = other.ask(refusal_of, block.untyped_storage()._share_cuda_())
            assert "illformed shareable handle type" in refusal, refusal
            return
        other.ask(keep, "large", block)
        assert other.ask(add, "large", 1) == [3, 4]
        assert block[-1].item() == 5
        other.ask(drop, "large")


def lifetimes() -> None:
    """Memory is used again when both have let go of it, and not before."""
    with receiver() as other:
        block = torch.full((5 * MIB,), 1.0, device="cuda")
        address = block.data_ptr()
        other.ask(keep, "block", block)
        del block
        torch.cuda.ipc_collect()
        assert torch.cuda.memory_allocated() == 20 * MIB
        torch.cuda.empty_cache()
        assert torch.zeros(5 * MIB, device="cuda").data_ptr() != address
        assert other.ask(add, "block", 1) == [1, 1]
        other.ask(drop, "block")
        torch.cuda.ipc_collect()
        assert torch.cuda.memory_allocated() == 0
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        free, total = torch.cuda.mem_get_info()
        assert free == total, "the driver has it all back"
        # Again and again: neither descriptors nor memory pile up.
        for index in range(100):
            block = torch.full((MIB,), float(index), device="cuda")
            other.ask(keep, "block", block)
            assert other.ask(add, "block", 1) == [index, index]
            del block
            torch.cuda.ipc_collect()
        other.ask(drop, "block")
        torch.cuda.ipc_collect()
        assert torch.cuda.memory_allocated() == 0
        assert len(os.listdir("/proc/self/fd")) < 300


def own_allocator() -> None:
    """Memory of a pool's own allocator, which gives parts of what it has; it may sleep no more."""
    with receiver() as other:
        own = OwnAllocator(offset=4096)
        with allocator.tag("weights"):
            pool = torch.cuda.MemPool(own.allocator)
            with torch.cuda.use_mem_pool(pool):
                sizes = {"small": 100, "more": 100, "large": 7 * MIB}
                blocks = {name: torch.empty(size, device="cuda") for name, size in sizes.items()}
        for index, (name, block) in enumerate(blocks.items()):
            assert own.holds(block)
            block.fill_(index)
            other.ask(keep, name, block)
            assert other.ask(add, name, 5) == [index, index]
            assert [block[0].item(), block[-1].item()] == [index + 5] * 2
        if os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY") == "1":
            assert allocator.sleep("weights") == 0
            assert other.ask(add, "large", 1) == [7, 7]
            assert allocator.wake() == 0
        del block, pool
        blocks.clear()
        torch.cuda.empty_cache()
        assert sum(segment.size for segment in own.live.values()) == 30 * MIB
        for name in sizes:
            other.ask(drop, name)
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        own.check_ended()


def events() -> None:
    with receiver() as other:
        event = torch.cuda.Event(interprocess=True)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            block = torch.full((MIB,), 2.0, device="cuda")
        event.record(side)
        assert other.ask(wait_for, event) == "waited"
        side.synchronize()
        del block


def peers() -> None:
    with receiver() as other:
        block = torch.ones(2 * MIB, device="cuda:0")
        other.ask(keep, "block", block)
        assert other.ask(copy_to_other_device, "block") == 2 * MIB
        assert block.sum().item() == 2 * MIB - 1
        other.ask(drop, "block")


def receiver_dies() -> None:
    """What it had is not used again, and all else goes on."""
    other = Receiver()
    block = torch.full((MIB,), 4.0, device="cuda")
    other.ask(keep, "block", block)
    other.inbox.put((leave, ()))
    other.process.join(60)
    assert other.process.exitcode == 0
    assert block[-1].item() == 4
    address = block.data_ptr()
    del block
    torch.cuda.ipc_collect()
    assert torch.zeros(MIB, device="cuda").data_ptr() != address
    check()
    with receiver() as another:
        again = torch.full((MIB,), 6.0, device="cuda")
        another.ask(keep, "again", again)
        assert another.ask(add, "again", 1) == [6, 6]
        another.ask(drop, "again")


def give(outbox: Any, inbox: Any) -> None:
    """Send a tensor and end while the other process still has it."""
    outbox.put(torch.full((3 * MIB,), 5.0, device="cuda"))
    assert inbox.get(timeout=60) == "received"


def sender_dies() -> None:
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=give, args=(inbox, outbox))
    process.start()
    tensor = inbox.get(timeout=60)
    outbox.put("received")
    process.join(60)
    assert tensor.sum().item() == 15 * MIB
    del tensor
    check()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()

"""Blocks of the pool as DLPack arrays, for torch and by the words of the array API standard."""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from cuda_calls import Cuda, live_blocks
from torch_process import TorchProcess

import spillover
from spillover import _core, allocator

MIB = 1 << 20

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]


def capsule_name(capsule: Any) -> bytes:
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    name = get_name(capsule)
    assert isinstance(name, bytes)
    return name


def test_torch_takes_a_block_without_a_copy(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        block = allocator.Pool(0).allocate(3 * MiB)
        for x in torch.from_dlpack(block), torch.utils.dlpack.from_dlpack(block.__dlpack__()):
            assert (x.data_ptr(), x.dtype, x.shape) == (block.address, torch.uint8, (3 * MiB,))
            assert x.device == torch.device("cuda", 0)
        live = allocator.stats()["allocation.all.current"]
        del block
        x.fill_(7)
        y = x.view(torch.int32)
        del x
        assert int(y.max()) == 0x07070707
        del y
        assert allocator.stats()["allocation.all.current"] == live - 1
        """
    )


def test_a_consumers_stream_waits_for_the_blocks(torch_with_pool: TorchProcess) -> None:
    """The checker would find the missing order, and a reuse before the consumer is done."""
    torch_with_pool.run(
        """
        first, then = torch.cuda.Stream(), torch.cuda.Stream()
        for consumer in (then, torch.cuda.default_stream()):
            block = allocator.Pool(0).allocate(3 * MiB, first)
            with torch.cuda.stream(first):
                torch.as_tensor(block, device="cuda").fill_(3)
            with torch.cuda.stream(consumer):
                x = torch.from_dlpack(block)
                total = x.sum()
            del x, block
            with torch.cuda.stream(first):
                other = torch.zeros(3 * MiB, dtype=torch.uint8, device="cuda")
            with torch.cuda.stream(consumer):
                assert total.item() == 9 * MiB
            del other
        """
    )


OWN_BLOCKS = """
import threading
import torch
from spillover import allocator, emulator
allocator.install()
torch.cuda.init()
threading.Thread(target=int).start()  # from here on blocks are followed
SIZE = 3 << 20
tensor = torch.ones(SIZE, dtype=torch.uint8, device="cuda")
address = tensor.data_ptr()
del tensor
block = allocator.Pool(0).allocate(SIZE)
assert block.address == address, "the bytes were torch's before"
alias = torch.as_tensor(block, device="cuda")
alias.fill_(3)
assert emulator.hazards() == []
block.free()
tensor = torch.zeros(SIZE, dtype=torch.uint8, device="cuda")
assert tensor.data_ptr() == address, "and are torch's again"
tensor.fill_(1)
assert emulator.hazards() == []
del tensor
block = allocator.Pool(0).allocate(SIZE)
alias.fill_(4)
assert emulator.hazards() == [], "the same bytes, in use"
block.free()
alias.fill_(5)
(text,) = emulator.hazards()
assert "kind: use after free" in text, text
emulator.clear_hazards()
"""


def test_the_checker_follows_blocks_that_are_not_torchs(run_emulated: RunEmulated) -> None:
    """What torch gave back and the program took from the pool is not free, until it is."""
    run_emulated(OWN_BLOCKS, hazards="count")


@pytest.mark.parametrize(
    ("max_version", "name"),
    [(None, b"dltensor"), ((0, 8), b"dltensor"), ((1, 0), b"dltensor_versioned")],
)
def test_capsules(pool: _core.Pool, max_version: tuple[int, int] | None, name: bytes) -> None:
    block = allocator.Pool(0).allocate(MIB)
    assert block.__dlpack_device__() == (2, 0)
    capsule = block.__dlpack__(stream=-1, max_version=max_version, dl_device=(2, 0), copy=False)
    assert capsule_name(capsule) == name
    del block
    gc.collect()
    assert len(live_blocks(pool)) == 1, "the capsule holds it"
    del capsule
    assert live_blocks(pool) == {}


def test_streams(pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> None:
    block = allocator.Pool(0).allocate(MIB, kept_streams[0])
    for stream in (None, 1, 2, kept_streams[1]):
        block.__dlpack__(stream=stream)
    wrong: list[Any] = [0, -2, 1 << 64, True, "1"]
    for stream in wrong:
        with pytest.raises(spillover.ConfigError, match="not allowed by DLPack"):
            block.__dlpack__(stream=stream)


def test_what_is_not_possible(pool: _core.Pool) -> None:
    block = allocator.Pool(0).allocate(MIB)
    with pytest.raises(BufferError, match="without a copy"):
        block.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="where it is"):
        block.__dlpack__(dl_device=(1, 0))
    block.free()
    with pytest.raises(spillover.StateError, match="freed"):
        block.__dlpack__()


def test_an_empty_block(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run("assert torch.from_dlpack(allocator.Pool(0).allocate(0)).shape == (0,)")

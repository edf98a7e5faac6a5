"""What stays on the device, what raises, and what is left after an error."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import leaving_bytes, offloading, reloaded_tensors, settle
from activation_models import SMALL, assert_same, gradients, make_gpt, make_mlp
from torch import nn

from spillover import (
    ConfigError,
    DiskFull,
    HostOutOfMemory,
    StorageError,
    offload_activations,
)
from spillover._core import DiskStore, HostPool
from spillover.hooks._activation_engine import is_plain
from spillover.hooks._saved_storage import KeptTensor, SavedView

MIB = 1 << 20


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(64, 64, device="cuda", requires_grad=True)


def test_in_place_change_raises_as_torch_does(x: torch.Tensor) -> None:
    with offloading():
        y = x * 2
        z = y.exp()
        out = (z * y).sum()
    # Ordered after the copy, which a snapshot does not need but the checker wants to see.
    torch.cuda.synchronize()
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        out.backward()
    assert "[torch.cuda.FloatTensor [64, 64]] is at version 1; expected version 0" in str(
        caught.value
    )


def test_in_place_change_of_what_was_kept_raises_too(x: torch.Tensor) -> None:
    weight = nn.Parameter(torch.randn(64, 64, device="cuda"))
    with offloading():
        out = (x * 1) @ weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def pack_all(context: Any, *tensors: torch.Tensor) -> list[Any]:
    engine = context._engine
    assert engine is not None
    return [engine.pack(context._counters, tensor) for tensor in tensors]


def test_what_stays_on_the_device(x: torch.Tensor) -> None:
    model = nn.Linear(64, 64).cuda()
    model.register_buffer("table", torch.randn(64, 64, device="cuda"))
    context = offload_activations(min_bytes=1024, model=model)
    with context:
        pass
    moving = x * 1
    kept = pack_all(
        context,
        x,  # a leaf that requires a gradient
        x.t(),
        model.weight,
        model.weight.t()[3:],
        model.weight.detach(),
        model.table[1:],
        moving.cpu(),
        torch.zeros(255, device="cuda"),
        torch.empty(0, 7, device="cuda"),
        torch.view_as_complex(torch.randn(64, 64, 2, device="cuda")).conj(),
    )
    assert all(isinstance(item, KeptTensor) for item in kept)
    assert not is_plain(torch.eye(3).to_sparse())
    assert isinstance(pack_all(context, moving)[0], SavedView)
    assert context.stats().kept_tensors == len(kept)
    assert context.stats().offloaded_bytes == moving.nbytes


def test_subclasses_pass_through_unchanged() -> None:
    class Marked(torch.Tensor):
        pass

    context = offloading()
    marked = torch.randn(64, 64, device="cuda").as_subclass(Marked)
    (packed,) = pack_all(context, marked)
    assert context._engine.unpack(packed) is marked
    assert context.stats().tensors == 0


def test_cpu_models_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    inputs = torch.randn(300, 64)
    model(inputs).square().mean().backward()
    expected = model.weight.grad
    model.weight.grad = None
    with offloading() as context:
        value = model(inputs).square().mean()
    value.backward()
    assert torch.equal(model.weight.grad, expected)
    assert context.stats().tensors == 0


def test_an_alias_made_after_a_write_through_data_is_copied_again(x: torch.Tensor) -> None:
    with offloading() as context:
        y = (x * 2).detach()
        first = (x * y.data).sum()
        torch.cuda.synchronize()
        # Moves the counter of this alias only; the next one begins at zero again.
        y.data.fill_(5)
        second = (x * y.data).sum()
    second.backward()
    assert torch.equal(x.grad, torch.full_like(x, 5))
    x.grad = None
    first.backward()  # As without offloading, where nothing tells that it was changed.
    assert context.stats().offloaded_bytes == 2 * y.nbytes


def test_writes_after_backward_are_ordered_after_the_copies(x: torch.Tensor) -> None:
    hidden = x * 2
    with offloading():
        out = hidden.exp()
    out.sum().backward()
    with torch.no_grad():
        out.zero_()  # The checker would report it.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        hidden.detach().zero_()


def test_a_small_part_of_a_large_storage_is_copied_alone(x: torch.Tensor) -> None:
    large = x.repeat(16, 1)
    part = large[100:140]
    context = offloading()
    packed = pack_all(context, part, large[100:120])
    assert context.stats().offloaded_bytes <= part.nbytes + 512
    torch.cuda.synchronize()
    settle()
    for item, original in zip(packed, (part, large[100:120]), strict=True):
        assert torch.equal(context._engine.unpack(item), original)


def test_an_exception_inside_leaves_no_hooks(x: torch.Tensor) -> None:
    context = offload_activations(**SMALL)

    def fail() -> None:
        with context:
            _ = (x * 1).exp()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    before = context.stats().tensors
    (x * 1).exp().sum().backward()
    assert context.stats().tensors == before
    with context:
        (x * 1).exp().sum().backward()
    assert context.stats().tensors > before


def test_the_host_budget_is_an_error_that_loses_nothing() -> None:
    model = make_mlp(depth=8)
    inputs = torch.randn(512, 64, device="cuda")
    expected = gradients(model, inputs)
    pool = HostPool(limit_bytes=300 << 10)
    with pytest.raises(HostOutOfMemory, match=r"300\.00 KiB"):
        gradients(model, inputs, offload_activations(**SMALL, pool=pool))
    gc.collect()
    settle()
    assert pool.stats().used_bytes == 0
    with pytest.raises(HostOutOfMemory):
        gradients(model, inputs, offload_activations(**SMALL, host_budget="300KiB"))
    # The same job within its budget.
    assert_same(
        gradients(model, inputs, offload_activations(**SMALL, host_budget="8MiB")), expected
    )


def test_the_disk_tier_works_within_a_small_staging_budget(tmp_path: Path) -> None:
    model = make_mlp(depth=8)
    inputs = torch.randn(512, 64, device="cuda")
    expected = gradients(model, inputs)
    pool = HostPool(limit_bytes=600 << 10)
    options = {**SMALL, "in_flight_max": "256KiB", "prefetch": "256KiB"}
    context = offload_activations(tier="disk", directory=tmp_path, pool=pool, **options)
    for _ in range(2):
        assert_same(gradients(model, inputs, context), expected)
    assert context.stats().disk_bytes_written > 4 * pool.stats().reserved_bytes_max
    assert pool.stats().reserved_bytes_max <= 600 << 10
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_the_job_can_be_repeated(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        model = make_mlp(depth=8)
        inputs = torch.randn(512, 64, device="cuda")
        expected = gradients(model, inputs)
        for preallocate in (True, False):
            store = DiskStore([str(folder)], preallocate=preallocate)
            pool = HostPool(limit_bytes=256 << 10)
            context = offload_activations(**SMALL, tier="disk", disk=store, pool=pool)
            with pytest.raises(DiskFull) as caught:
                gradients(model, inputs, context)
            assert caught.value.errno == errno.ENOSPC
            # The error's traceback holds the graph.
            del caught
            gc.collect()
            settle()
            assert store.stats().used_bytes == 0
            small = torch.randn(64, 64, device="cuda")
            assert_same(gradients(model, small, context), gradients(model, small))
            store.close()
        assert_same(gradients(model, inputs), expected)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_failed_write_keeps_the_bytes_in_host_memory(tmp_path: Path, x: torch.Tensor) -> None:
    store = DiskStore([str(tmp_path)], preallocate=False)
    context = offloading(tier="disk", disk=store)
    y = x * 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with context:
            out = y.exp()
        with pytest.raises(StorageError, match="writing") as caught:
            settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # A write that ends inside of a block says EIO, since it cannot go on there.
    assert caught.value.errno in (errno.EFBIG, errno.EIO)
    out.sum().backward()
    expected = x.detach().clone().requires_grad_()
    (expected * 2).exp().sum().backward()
    assert torch.equal(x.grad, expected.grad)
    store.close()


def test_the_write_limit_reaches_the_user(tmp_path: Path) -> None:
    model = make_mlp()
    inputs = torch.randn(512, 64, device="cuda")
    context = offload_activations(
        **SMALL,
        tier="disk",
        directory=tmp_path / "limited",
        write_limit="200KiB",
        pool=HostPool(limit_bytes=256 << 10),
    )
    with pytest.raises(DiskFull, match="write limit"):
        gradients(model, inputs, context)


def test_steps_make_no_streams_and_keep_no_memory() -> None:
    from spillover import emulator

    if not emulator.is_enabled():
        pytest.skip("counts the emulated device's resources")
    model = make_gpt(depth=2)
    inputs = torch.randn(4, 24, 32, device="cuda")
    counts = []
    for _ in range(4):
        gradients(model, inputs, offload_activations(**SMALL))
        gc.collect()
        settle()
        live = emulator.live()
        counts.append((live.streams, live.events, live.pinned_regions))
    assert counts[1] == counts[2] == counts[3]
    assert leaving_bytes() == 0


def test_prefetch_hides_reloads() -> None:
    model = make_mlp(depth=10)
    inputs = torch.randn(96, 64, device="cuda")
    ahead = offloading(in_flight_max=1, prefetch="256KiB")
    on_demand = offloading(in_flight_max=1, prefetch=0)
    assert_same(gradients(model, inputs, ahead), gradients(model, inputs, on_demand))
    assert ahead.stats().prefetch_misses <= 3
    assert on_demand.stats().prefetch_misses == reloaded_tensors(on_demand) > 15


def test_wrong_options_are_named(tmp_path: Path) -> None:
    for options, text in [
        ({"tier": "tape"}, "tape"),
        ({"tier": "disk"}, "directory"),
        ({"tier": "host", "directory": tmp_path}, "tier='disk'"),
        ({"min_bytes": "much"}, "min_bytes"),
        ({"prefetch": -1}, "prefetch"),
        ({"host_budget": "some"}, "host_budget"),
        ({"host_budget": -1}, "host_budget"),
        ({"tier": "disk", "directory": tmp_path, "host_budget": 1}, "host_budget"),
        ({"keep_on_device": "x"}, "keep_on_device"),
        ({"in_flight_max": -2}, "in_flight_max"),
        ({"where": 3}, "where"),
        ({"codec": "zip"}, "codec"),
        ({"pool": "8GiB"}, "pool"),
        ({"directory": tmp_path, "disk": 5}, "not both"),
        ({"prefetch": "abc"}, "prefetch"),
        ({"model": 5}, "model"),
        ({"tier": "disk", "disk": 7}, "DiskStore"),
        ({"tier": "disk", "directory": ""}, "directory"),
        ({"tier": "disk", "directory": 5}, "directory"),
        ({"tier": "disk", "directory": []}, "directory"),
        ({"tier": "disk", "directory": [tmp_path, ""]}, "directory"),
        ({"tier": "disk", "directory": tmp_path, "write_limit": "x"}, "write_limit"),
    ]:
        with pytest.raises(ConfigError, match=text):
            offload_activations(**options)


def test_spillover_0_does_nothing(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    with offloading() as context:
        (x * 1).exp().sum().backward()
    assert context.stats().tensors == context.stats().kept_tensors == 0


SCHEDULED = """
import sys
sys.path.insert(0, FOLDER)
import torch
from activation_contexts import reloaded_tensors
from activation_models import SMALL, assert_same, gradients, make_gpt
from spillover import offload_activations
model = make_gpt(depth=2)
x = torch.randn(4, 24, 32, device="cuda")
expected = gradients(model, x)
for more in ({}, {"tier": "disk", "directory": DIRECTORY}):
    context = offload_activations(**SMALL, **more)
    for inside in (False, True):
        assert_same(gradients(model, x, context, backward_inside=inside), expected)
    assert reloaded_tensors(context) > 10
torch.cuda.synchronize()
assert not spillover.emulator.hazards(), spillover.emulator.hazards()
print("equal")
"""


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        ("random", 1),
        *(
            pytest.param(*other, marks=pytest.mark.soak)
            for other in [("eager", 0), ("random", 2), ("threaded", 0)]
        ),
    ],
)
def test_every_schedule(
    run_emulated: Callable[..., Any], tmp_path: Path, schedule: str, seed: int
) -> None:
    folder, directory = str(Path(__file__).parent), str(tmp_path)
    code = SCHEDULED.replace("FOLDER", repr(folder)).replace("DIRECTORY", repr(directory))
    result = run_emulated(code, schedule=schedule, seed=seed)
    assert "equal" in result.stdout

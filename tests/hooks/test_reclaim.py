"""Memory that offloading holds goes to allocations that would fail, with Spillover's pool."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]
FOLDER = Path(__file__).parent

PRELUDE = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import threading
import torch
from torch import nn
from spillover import allocator, emulator, offload_activations, stream_parameters
assert allocator.install(adapter="full")
from activation_models import assert_same, gradients, make_mlp
MIB = 1 << 20


def make(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def fill_up():
    # Takes what is left of the device, without one of the holders being asked.
    taken = []
    with _reclaim.suspended():
        for mib in (32, 8, 1):
            try:
                while True:
                    taken.append(make(mib))
            except torch.OutOfMemoryError:
                pass
    return taken


def allocated_mib():
    return torch.cuda.memory_allocated() / MIB


from spillover import _reclaim
"""


@pytest.fixture
def run(run_emulated: RunEmulated) -> Callable[[str], None]:
    return lambda code: print(run_emulated(PRELUDE + code, vram="256MiB").stdout)


WIDE = """
def make_model():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)])  # 16 MiB each

torch.ones(8, 2048, device="cuda") @ torch.ones(2048, 8, device="cuda")  # cuBLAS's workspace
x = torch.randn(2, 2048, device="cuda")
"""


def test_streamed_weights_that_nobody_uses_are_given_back(run: Callable[[str], None]) -> None:
    run(
        WIDE
        + """
expected = make_model().cuda()(x).detach().cpu()
torch.cuda.empty_cache()
model = make_model()
handle = stream_parameters(model, blocks=list(model), prefetch=1)
with torch.no_grad():
    assert torch.equal(model(x).cpu(), expected)
    held = allocated_mib()
    rest = fill_up()
    wanted = make(30)  # two blocks were left on the device
    assert allocated_mib() - held > 0
    # The host may write at once: no copy reads any more what was given up.
    for parameter in model.parameters():
        parameter.add_(0)
    del wanted, rest
    assert torch.equal(model(x).cpu(), expected)
"""
    )


def test_a_copy_that_is_given_up_on_its_way_is_waited_for_before_the_host_writes(
    run: Callable[[str], None],
) -> None:
    run(
        WIDE
        + """
model = make_model()
handle = stream_parameters(model, blocks=list(model), prefetch=1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)

def take(module, arguments, output):
    rest = fill_up()
    make(12)  # has the block that was fetched ahead, and is still on its way
    raise ZeroDivisionError

model[0].register_forward_hook(take)
try:
    model(x)
except ZeroDivisionError:
    assert handle.stats.device_bytes <= 16 * MIB
    optimizer.step()
else:
    raise AssertionError("no error")
"""
    )


def test_a_block_that_runs_is_kept(run: Callable[[str], None]) -> None:
    run(
        WIDE
        + """
class Hungry(nn.Linear):
    def forward(self, value):
        rest = fill_up()
        try:
            make(200)
        except torch.OutOfMemoryError as error:
            told.append(str(error))
        return super().forward(value)

told = []
torch.manual_seed(0)
model = nn.Sequential(Hungry(2048, 2048), nn.Linear(2048, 2048))
expected = nn.functional.linear(
    nn.functional.linear(x.cpu(), model[0].weight, model[0].bias), model[1].weight, model[1].bias
)
handle = stream_parameters(model, blocks=list(model), prefetch=1)
with torch.no_grad():
    found = model(x)
assert torch.equal(found.cpu(), expected)
assert "1 reclaimer (says that it freed 16.01 MiB)" in told[0], told
"""
    )


def test_saved_tensors_that_came_ahead_are_given_back(run: Callable[[str], None]) -> None:
    run(
        """
model = make_mlp(depth=16)
x = torch.randn(16 << 10, 64, device="cuda")  # 4 MiB each
expected = gradients(model, x)
torch.cuda.empty_cache()
taken = []


class Hungry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        device().departures.finish()
        rest = fill_up()
        assert device().account.waiting_bytes >= 8 * MIB, device().account.waiting_bytes
        taken.append(make(8).numel())
        assert device().account.waiting_bytes == 0
        return gradient


context = offload_activations(min_bytes=1, keep_on_device=0, prefetch="32MiB")
engine = context._engine
device = lambda: engine.devices()[0]
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model

    def forward(self, value):
        return model[16:](Hungry.apply(model[:16](value)))

assert_same(gradients(Model(), x, context), expected)
assert taken == [8 * MIB]
"""
    )


def test_copies_out_are_waited_for(run: Callable[[str], None]) -> None:
    run(
        """
model = make_mlp(depth=8)
x = torch.randn(16 << 10, 64, device="cuda")
expected = gradients(model, x)
torch.cuda.empty_cache()
context = offload_activations(min_bytes=1, keep_on_device=0, in_flight_max="64MiB")
taken = []

def loss(out):
    (device,) = context._engine.devices()
    leaving = device.engine.stats().leaving_bytes
    assert leaving > 16 * MIB, leaving
    rest = fill_up()
    taken.append(make(12))
    assert device.engine.stats().leaving_bytes < leaving
    return out.square().mean()

assert_same(gradients(model, x, context, loss=loss), gradients(model, x))
assert len(taken) == 1
"""
    )


@pytest.mark.soak
def test_another_thread_may_ask(run: Callable[[str], None]) -> None:
    run(
        WIDE
        + """
model = make_model()
handle = stream_parameters(model, blocks=list(model), prefetch=1)
failures, stop = [], threading.Event()

def hungry():
    try:
        while not stop.is_set():
            try:
                del_me = make(240)
            except torch.OutOfMemoryError:
                pass
    except BaseException as error:
        failures.append(error)

with torch.no_grad():
    expected = model(x).cpu()
thread = threading.Thread(target=hungry)
thread.start()
for _ in range(3):
    value = x.clone().requires_grad_()
    out = model(value)
    assert torch.equal(out.detach().cpu(), expected)
    out.sum().backward()
    model.zero_grad()
stop.set()
thread.join()
assert failures == [], failures
"""
    )


def test_torchs_own_allocator_asks_nobody(run_emulated: RunEmulated) -> None:
    run_emulated(
        """
        import torch
        from torch import nn
        from spillover import stream_parameters
        from spillover import _reclaim
        model = nn.Sequential(nn.Linear(8, 8))
        handle = stream_parameters(model, blocks=list(model))
        model(torch.ones(1, 8, device="cuda"))
        assert not _reclaim._handles
        """
    )


def test_a_holder_that_fails_leaves_the_others_to_be_asked(run: Callable[[str], None]) -> None:
    run(
        """
class Holder:
    def __init__(self, fails):
        self.fails = fails
        self.held = [make(80)]

    def give_back(self, missing_bytes, device):
        if self.fails:
            raise RuntimeError("cannot give back")
        given = len(self.held) * 80 * MIB
        self.held.clear()
        return given


device = torch.device("cuda", 0)
holders = [Holder(True), Holder(False)]
for holder in holders:
    _reclaim.offer(device, holder)
kept = make(150)
assert not holders[1].held and holders[0].held
try:
    _reclaim.ask(device, MIB)
except RuntimeError as error:
    assert "cannot give back" in str(error)
else:
    raise AssertionError("no error")
"""
    )

"""Activation offloading in processes, modes and settings that change what torch does around it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import (
    TIGHT,
    Context,
    check_equal,
    offloaded_bytes,
    offloaded_tensors,
    offloading,
    on_host,
    settle,
)
from activation_models import assert_same, gradients, gradients_of, make_gpt, make_leaf, make_mlp
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent


# ---- what backward itself does to saved tensors ----


class ScalesSaved(torch.autograd.Function):
    """Backward works in place on what it saved, to spare memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return ctx.saved_tensors[0].cos_().mul_(gradient)


@pytest.mark.parametrize("has_left", [True, False])
def test_backward_that_works_in_place_on_what_it_saved(
    budgets: dict[str, Any], has_left: bool
) -> None:
    def run(context: Context) -> list[torch.Tensor]:
        x = make_leaf()
        with context:
            hidden = x * 1
            for _ in range(4):
                hidden = ScalesSaved.apply(hidden) * 2
        if has_left:
            settle()
        hidden.sum().backward()
        return on_host(x.grad)

    check_equal(run, steps=3, **budgets)


@pytest.mark.parametrize("prefetch", [0, "1GiB"])
def test_in_place_change_in_backward_of_what_another_use_needs(prefetch: int | str) -> None:
    """Torch raises at the other use. An error is right, and so is the true gradient."""
    x = make_leaf()
    with offloading(prefetch=prefetch):
        hidden = x * 1
        other = hidden.square()  # Backward comes to it last.
        value = ScalesSaved.apply(hidden)
    del hidden
    settle()
    try:
        (other.sum() + value.sum()).backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert torch.allclose(x.grad, 2 * x.detach() + x.detach().cos())


@pytest.mark.parametrize("prefetch", [0, "1GiB"])
def test_in_place_change_in_backward_of_a_graph_that_is_kept(prefetch: int | str) -> None:
    """The same of the second backward."""
    x = make_leaf()
    with offloading(prefetch=prefetch):
        value = ScalesSaved.apply(x * 1).sum()
    settle()
    value.backward(retain_graph=True)
    try:
        value.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert torch.allclose(x.grad, 2 * x.detach().cos())


# ---- streams and devices ----


def test_backward_is_called_under_another_stream(budgets: dict[str, Any]) -> None:
    model = make_mlp()
    side = torch.cuda.Stream()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            value = model(x * 1).square().mean()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value.backward()
        torch.cuda.current_stream().wait_stream(side)
        return on_host(x.grad, *gradients_of(model))

    check_equal(run, steps=2, **budgets)


def test_a_model_over_two_devices(run_emulated: Callable[..., Any]) -> None:
    """Half of it on each, while the current device is the first; and DataParallel."""
    run_emulated(
        f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import contextlib
import torch
from activation_contexts import TIGHT, check_equal, on_host
from activation_models import gradients_of, make_leaf, make_mlp

first, second = make_mlp(depth=2), make_mlp(depth=2).to("cuda:1")
side = torch.cuda.Stream(device=1)

def split(context):
    for model in (first, second):
        model.zero_grad()
    x = make_leaf()
    with context:
        middle = first(x * 1).to("cuda:1")
        value = second(middle).to("cuda:0").square().mean() + middle.exp().mean().to("cuda:0")
    value.backward()
    return on_host(x.grad, *gradients_of(first), *gradients_of(second))

def on_the_other(context):
    second.zero_grad()
    with torch.cuda.device(1):
        x = make_leaf().detach().to("cuda:1").requires_grad_()
    side.wait_stream(torch.cuda.current_stream(1))
    with torch.cuda.stream(side), context:
        value = second(x * 1).square().mean()
    value.backward()
    torch.cuda.synchronize(1)
    return on_host(x.grad, *gradients_of(second))

def replicated(context):
    first.zero_grad()
    x = make_leaf()
    with context:
        value = torch.nn.DataParallel(first, [0, 1])(x * 1).square().mean()
    value.backward()
    return on_host(x.grad, *gradients_of(first))

for budgets in (dict(), TIGHT):
    for run in (split, on_the_other, replicated):
        check_equal(run, steps=2, **budgets)
for device in range(2):
    torch.cuda.synchronize(device)
assert not spillover.emulator.hazards(), spillover.emulator.hazards()
""",
        devices=2,
    )


# ---- modes and settings ----


@pytest.fixture
def restored_settings() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("restored_settings")
@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_any_default_device_and_dtype(device: str, budgets: dict[str, Any]) -> None:
    model, x = make_mlp(), make_leaf()
    expected = gradients(model, x)
    torch.set_default_device(device)
    torch.set_default_dtype(torch.bfloat16)
    context = offloading(**budgets)
    with torch.device(device):
        found = gradients(model, x, context)
    assert_same(found, expected)
    assert offloaded_bytes(context) > 0


@pytest.mark.usefixtures("restored_settings")
def test_deterministic_algorithms(budgets: dict[str, Any]) -> None:
    """Torch then fills new memory, that of reloads as well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, x = make_mlp(), make_leaf()
    check_equal(lambda context: gradients(model, x, context), steps=2, **budgets)


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeesFunctions, SeesOperators])
@pytest.mark.parametrize("is_outer", [False, True])
def test_modes_that_see_every_call(mode: Any, is_outer: bool) -> None:
    model, x = make_gpt(depth=1), torch.randn(2, 8, 32, device="cuda")

    def run(context: Context) -> list[torch.Tensor]:
        if is_outer:
            with mode():
                return gradients(model, x, context)
        with contextlib.ExitStack() as stack:
            stack.enter_context(context)
            stack.enter_context(mode())
            return gradients(model, x, stack, backward_inside=True)

    check_equal(run, steps=2, **TIGHT)


def test_counted_operations_are_those_of_the_plain_run() -> None:
    model, x = make_gpt(depth=1), torch.randn(2, 8, 32, device="cuda")
    counts = []
    for context in (contextlib.nullcontext(), offloading()):
        with FlopCounterMode(display=False) as counter:
            gradients(model, x, context)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_fake_tensors_pass_through() -> None:
    """As estimators of memory and compilers trace with."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    context = offloading()
    with FakeTensorMode(allow_non_fake_inputs=False), context:
        x = torch.randn(48, 64, device="cuda", requires_grad=True)
        value = (x * 1).exp().sin().sum()
    value.backward()
    assert x.grad is not None
    assert offloaded_tensors(context) == 0


def test_the_profiler(budgets: dict[str, Any]) -> None:
    model, x = make_mlp(depth=2), make_leaf()
    expected = gradients(model, x)
    context = offloading(**budgets)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_stack=True, record_shapes=True):
        assert_same(gradients(model, x, context), expected)


def test_forward_over_reverse() -> None:
    """Saved tensors that carry tangents: a product of the Hessian and a vector."""

    def run(context: Context) -> list[torch.Tensor]:
        x = make_leaf()
        torch.manual_seed(2)
        tangent = torch.randn_like(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            with context:
                value = (dual * 1).sin().exp().sum()
            (slope,) = torch.autograd.grad(value, x)
            unpacked = forward_ad.unpack_dual(slope)
        return on_host(unpacked.primal, unpacked.tangent)

    check_equal(run)


# ---- lifetime of objects and processes ----


def test_backward_after_the_context_object_is_gone(budgets: dict[str, Any]) -> None:
    model, x = make_mlp(), make_leaf()
    expected = gradients(model, x)
    torch.manual_seed(5)
    model.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    context = offloading(host_budget=(3 << 20) + 4096, **budgets)
    with context:
        value = model(leaf * 1).square().mean()
    del context
    gc.collect()
    value.backward()
    assert_same(on_host(value, leaf.grad, *gradients_of(model)), expected)


ENDS = """
import sys
sys.path.insert(0, FOLDER)
import torch
from activation_contexts import TIGHT, offloading
from activation_models import make_leaf, make_mlp
kept = []
for options in ({}, TIGHT, dict(tier="disk", directory=DIRECTORY)):
    x = make_leaf()
    context = offloading(**options)
    context.__enter__()
    value = make_mlp()(x * 1).square().mean()
    value.backward(retain_graph=True)
    value = make_mlp()(x * 1).square().mean()
    kept.append((context, value))
"""

FORKS = """
import gc, os
child = os.fork()
if child == 0:
    # As a worker that loads data; torch itself aborts where a child destroys an event.
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for context, value in kept:
    value.backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("", id="exit", marks=pytest.mark.soak),
        pytest.param(FORKS, id="fork"),
        pytest.param("raise KeyboardInterrupt", id="interrupt", marks=pytest.mark.soak),
    ],
)
def test_a_process_that_ends_with_copies_under_way(
    run_emulated: Callable[..., Any], tmp_path: Path, more: str
) -> None:
    code = ENDS.replace("FOLDER", repr(str(HERE))).replace("DIRECTORY", repr(str(tmp_path)))
    result = run_emulated(code + more, check=False)
    if more.startswith("raise"):
        assert result.returncode in (1, 130, -2), result.stderr
        assert result.stderr.strip().splitlines()[-1] == "KeyboardInterrupt", result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert not result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []

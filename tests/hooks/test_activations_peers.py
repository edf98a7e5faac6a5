"""What other libraries' own tests of activation offloading check, asked of ours.

torchtune and TRL (OffloadActivations), PyTorch (save_on_cpu), Transformer Engine (CPU offloading),
ms-swift and Accelerate: the behaviours that their tests and defects are about.
"""

from __future__ import annotations

import contextlib
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
from activation_models import assert_same, gradients_of, make_leaf, make_mlp
from torch import nn

KIB = 1 << 10
MIB = 1 << 20


# ---- torchtune ----


class GivesViewOfSaved(torch.autograd.Function):
    """Backward gives a view of what it unpacked as the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.t())
        return torch.full((2, 4), 0.5, device=x.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return ctx.saved_tensors[0].t()


class PassesOn(torch.autograd.Function):
    """Unpacks a tensor of its own, so that whatever was unpacked before may be let go."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.full_like(x, 5))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        _ = ctx.saved_tensors[0] * 1
        return gradient


class LooksMuchLater(torch.autograd.Function):
    """Queues work, and looks at the gradient only after it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(1_000_000)
        return (gradient == 1).float()


@pytest.mark.parametrize("prefetch", [0, "1GiB"])
def test_a_gradient_that_is_a_view_of_an_unpacked_tensor(prefetch: Any) -> None:
    """It lives on after its node, while other saved tensors come and go."""
    for _ in range(2):
        x = torch.ones(64, 256, device="cuda", requires_grad=True)
        with offloading(in_flight_max="64KiB", prefetch=prefetch):
            hidden = x * 1
            for _ in range(3):
                hidden = PassesOn.apply(hidden)
            hidden = PassesOn.apply(LooksMuchLater.apply(hidden))
            value = GivesViewOfSaved.apply(PassesOn.apply(hidden)).sum()
        value.backward()
        assert torch.equal(x.grad, torch.ones_like(x))


def test_an_unpacked_tensor_that_is_kept_by_its_user() -> None:
    """Forever, past the graph's end, and then changed."""
    kept: list[torch.Tensor] = []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            kept.append(ctx.saved_tensors[0])
            return gradient * 2

    x = make_leaf()
    with offloading(**TIGHT):
        value = x * 1
        for _ in range(4):
            value = Keeps.apply(value)
    value.sum().backward()
    settle()
    _ = [torch.full((48, 64), 9.0, device="cuda") for _ in range(16)]
    for power, tensor in enumerate(reversed(kept)):
        assert torch.equal(tensor, x.detach() * 2**power)
        tensor.zero_()


def test_saved_tensors_on_the_cpu_stay_there() -> None:
    """A function that saves host tensors gets host tensors back."""
    devices: list[torch.device] = []

    class SavesHost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x.cpu(), x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            devices.extend(tensor.device for tensor in ctx.saved_tensors)
            return gradient * ctx.saved_tensors[0].to(gradient.device).exp()

    def run(context: Context) -> list[torch.Tensor]:
        x = make_leaf()
        with context:
            value = SavesHost.apply(x * 1).sum()
        value.backward()
        return on_host(x.grad)

    check_equal(run)
    assert {device.type for device in devices[-2:]} == {"cpu", "cuda"}


def test_linear_layers_without_anything_between() -> None:
    """Each one's output is the next one's input, and nothing else is saved."""
    model = nn.Sequential(*[nn.Linear(10, 10) for _ in range(3)], nn.ReLU()).cuda()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with context:
            value = model(torch.randn(2, 10, device="cuda")).sum()
        value.backward()
        return on_host(value, *gradients_of(model))

    check_equal(run, steps=3)
    check_equal(run, steps=3, **TIGHT)


# ---- TRL ----


def test_a_region_that_is_left_out() -> None:
    """Plain hooks inside of the context keep what is saved there."""
    model = make_mlp()
    context = offloading()

    def run(used: Context, within: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with used:
            hidden = model[:2](x * 1)
            with within:
                hidden = model[2:6](hidden)
            value = model[6:](hidden).square().mean()
        value.backward()
        return on_host(x.grad, *gradients_of(model))

    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    expected = run(contextlib.nullcontext(), contextlib.nullcontext())
    assert_same(run(context, keep), expected)
    partly = offloaded_bytes(context)
    assert_same(run(context, contextlib.nullcontext()), expected)
    assert offloaded_bytes(context) - partly > partly > 0


def test_small_tensors_stay() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1000), nn.Tanh()).cuda()
    x = torch.randn(2, 5, device="cuda")
    context = offloading(min_bytes=1000)
    with context:
        value = model(x).sum()
    assert offloaded_bytes(context) == 2 * 1000 * 4
    value.backward()


def test_views_of_one_storage_are_deduplicated() -> None:
    layer = nn.Linear(100, 100).cuda()
    x = torch.randn(10, 100, device="cuda", requires_grad=True)
    context = offloading()
    with context:
        out = layer(x)
        value = out.view(-1).square().sum() + out.t().square().sum() + out[2:].exp().sum()
    # The output once, and the result of exp; the layer's input is a leaf.
    assert offloaded_bytes(context) == 10 * 100 * 4 + 8 * 100 * 4
    assert offloaded_tensors(context) == 3
    value.backward()


# ---- Transformer Engine ----


def test_interleaved_halves_are_copied_once() -> None:
    leaf = torch.randn(256, 64, device="cuda", requires_grad=True)
    context = offloading()
    settle()
    before = torch.cuda.memory_allocated()
    with context:
        x = leaf * 1
        size = x.nbytes
        value = x[::2].exp().mean() + x[1::2].square().mean()
    del x
    settle()
    assert torch.cuda.memory_allocated() - before < size / 2
    # x[::2] is not saved, its exp is.
    assert size <= offloaded_bytes(context) <= 1.5 * size
    value.backward()
    settle()
    expected = torch.empty_like(leaf)
    expected[::2] = leaf.detach()[::2].exp() / (128 * 64)
    expected[1::2] = leaf.detach()[1::2] * (2 / (128 * 64))
    assert torch.allclose(leaf.grad, expected)


def test_memory_of_layers_that_have_left() -> None:
    """On the device are, at any time of forward and backward, a few layers at most."""
    model = make_mlp(depth=16)
    x = torch.randn(1024, 64, device="cuda")
    size = x.nbytes
    context = offloading(in_flight_max=2 * size, prefetch=2 * size)
    for _ in range(2):
        model.zero_grad()
        settle()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with context:
            value = model(x * 1).square().mean()
        settle()
        # The output of the model lives as long as the loss's node lets it, which it does not.
        assert torch.cuda.memory_allocated() - before < size / 2
        value.backward()
        del value
        torch.cuda.synchronize()
        weights = sum(p.nbytes for p in model.parameters())
        assert torch.cuda.max_memory_allocated() - before < weights + 9 * size


# ---- PyTorch's save_on_cpu ----


def test_the_graph_holds_what_the_tensors_held() -> None:
    """What backward sees as saved is equal to the original, though it is another tensor."""
    x = make_leaf()
    with offloading():
        y = (x * 1).pow(2)
    saved = y.grad_fn._saved_self
    assert torch.equal(saved, x)
    assert saved.data_ptr() != x.data_ptr()
    assert not saved.requires_grad or saved.grad_fn is not None
    y.sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_what_is_unpacked_continues_the_graph() -> None:
    """For derivatives of any order, by way of the saved tensor itself."""

    def run(context: Context) -> list[torch.Tensor]:
        x = make_leaf()
        with context:
            value = (x * 1).pow(4).sum()
            found = [value]
            for _ in range(4):
                (slope,) = torch.autograd.grad(found[-1].sum(), x, create_graph=True)
                found.append(slope)
        return on_host(*found)

    check_equal(run)
    check_equal(run, **TIGHT)


def test_gradcheck_of_first_and_second_order() -> None:
    """Numerically, by torch's own checker, which calls backward many times over."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    context = offloading()

    @context
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ((x @ weight).tanh() * x.exp()).sum(0)

    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)
    assert offloaded_tensors(context) > 0


def test_pack_may_not_change_what_it_is_given() -> None:
    """Neither values nor versions: the forward pass goes on with them."""
    x = make_leaf()
    with offloading(**TIGHT):
        y = x * 1
        before, version = y.detach().clone(), y._version
        for _ in range(3):
            _ = y.exp() * y
        assert y._version == version
        assert torch.equal(y, before)
        torch.cuda.synchronize()
        y.add_(1)
        assert y._version == version + 1


# ---- Accelerate and axolotl ----


def test_a_step_that_was_given_up_leaves_nothing() -> None:
    """Forward without backward, again and again: neither host nor device memory grows."""
    from spillover._core import HostPool

    pool = HostPool(limit_bytes=16 * MIB)
    model, x = make_mlp(), make_leaf(512)
    context = offloading(pool=pool, **TIGHT)
    held = []
    for _ in range(4):
        with contextlib.suppress(ZeroDivisionError), context:
            _ = model(x * 1)
            raise ZeroDivisionError
        del _
        settle()
        held.append((torch.cuda.memory_allocated(), pool.stats().used_bytes))
    assert held[1] == held[3]
    assert held[-1][1] == 0


def test_evaluation_between_forward_and_backward() -> None:
    """Another model's step, and no-grad work, in the middle of ours."""
    model, other = make_mlp(), make_mlp(depth=2)

    def run(context: Context) -> list[torch.Tensor]:
        for module in (model, other):
            module.zero_grad()
        x, y = make_leaf(), make_leaf(seed=2)
        with context:
            value = model(x * 1).square().mean()
            with torch.no_grad():
                model(y)
        with context:
            between = other(y * 1).square().mean()
        between.backward()
        value.backward()
        return on_host(x.grad, y.grad, *gradients_of(model), *gradients_of(other))

    check_equal(run, steps=3, **TIGHT)

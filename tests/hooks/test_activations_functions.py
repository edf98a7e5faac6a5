"""Custom functions, threads and hooks of others, under activation offloading."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from activation_contexts import (
    BUDGETS,
    Context,
    check_equal,
    offloaded_tensors,
    offloading,
    on_host,
)
from activation_models import assert_same, gradients, gradients_of, make_leaf, make_mlp
from torch.autograd.function import once_differentiable
from torch.nn import functional


@pytest.fixture(params=BUDGETS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BUDGETS[request.param]


# ---- custom functions ----


class SavesOutputs(torch.autograd.Function):
    """Saves an input, two outputs and a tensor of its own; some are not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, order = x.sort(dim=1)
        square = out.square()
        ctx.mark_non_differentiable(order)
        ctx.save_for_backward(x, square, order, torch.full_like(x, 3), None)
        ctx.set_materialize_grads(False)
        return out, square, order

    @staticmethod
    def backward(ctx: Any, first: Any, second: Any, _order: Any) -> torch.Tensor:
        x, square, order, three, nothing = ctx.saved_tensors
        assert nothing is None
        gradient = torch.zeros_like(x)
        for part, scale in ((first, three), (second, 2 * square.sqrt() * x.sign().sort(1)[0])):
            if part is not None:
                gradient = gradient + torch.zeros_like(x).scatter(1, order, part * scale)
        return gradient


class OnceDifferentiable(torch.autograd.Function):
    """In the newer style, with setup_context; its backward may not be differentiated."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight).sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, output = ctx.saved_tensors
        again = ctx.saved_tensors[2]
        inner = gradient * output * (1 - again)
        return inner @ weight.t(), x.t() @ inner


class ChangesItsInput(torch.autograd.Function):
    """In place, and saves what it has made of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.mul_(3).tanh_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return gradient * 3 * (1 - y * y)


class KeepsAsAttribute(torch.autograd.Function):
    """Past the hooks, as many do that should not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = x.detach() * 2
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.saved_tensors[0].exp() + 0 * ctx.kept


def test_custom_functions(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 64, device="cuda").div_(8).requires_grad_()

    def run(context: Context) -> list[torch.Tensor]:
        weight.grad = None
        x = make_leaf()
        with context:
            out, square, order = SavesOutputs.apply(x * 1)
            mixed = OnceDifferentiable.apply(out + square, weight)
            changed = ChangesItsInput.apply(mixed * 2)
            value = KeepsAsAttribute.apply(changed).mean() + (square * order).mean() / 64
        value.backward()
        return on_host(value, x.grad, weight.grad)

    check_equal(run, steps=3, **options)


def test_once_differentiable_raises_as_torch_does() -> None:
    x, weight = make_leaf(), make_leaf(64)
    with offloading():
        value = OnceDifferentiable.apply(x * 1, weight).square().sum()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# ---- threads ----


def test_backward_on_other_threads(options: dict[str, Any]) -> None:
    """Graphs are made on one thread and used on several at once, which accumulate together."""
    model = make_mlp()

    def run(context: Context, *, threaded: bool) -> list[torch.Tensor]:
        leaves = [make_leaf(seed=seed) for seed in range(4)]
        values = []
        for leaf in leaves:
            with context:
                values.append(model(leaf * 1).square().mean())
        torch.cuda.synchronize()
        failures: list[BaseException] = []

        def work(leaf: torch.Tensor, value: torch.Tensor) -> None:
            try:
                value.backward(inputs=[leaf])
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=pair) for pair in zip(leaves, values, strict=True)
        ]
        for thread in threads:
            thread.start()
            if not threaded:
                thread.join()
        for thread in threads:
            thread.join()
        assert not failures, failures
        torch.cuda.synchronize()
        return on_host(*(leaf.grad for leaf in leaves))

    expected = run(contextlib.nullcontext(), threaded=False)
    context = offloading(**options)
    for _ in range(3):
        assert_same(run(context, threaded=True), expected)


def test_one_graph_on_two_threads(options: dict[str, Any]) -> None:
    """Branches over one saved tensor run backward at the same time."""
    x = make_leaf()

    def run(context: Context) -> list[torch.Tensor]:
        with context:
            shared = (x * 1).exp()
            branches = [shared * shared.sin(), shared.sigmoid() * shared, shared.tanh()]
        torch.cuda.synchronize()
        found: dict[int, torch.Tensor] = {}
        failures: list[BaseException] = []

        def work(index: int) -> None:
            try:
                (found[index],) = torch.autograd.grad(branches[index].sum(), x, retain_graph=True)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        torch.cuda.synchronize()
        return on_host(*(found[index] for index in range(3)))

    check_equal(run, steps=3, **options)


# ---- hooks of others ----


def test_other_saved_tensor_hooks_inside_and_outside(options: dict[str, Any]) -> None:
    """The innermost pair is in charge, as always in torch; the others get their own back."""
    model = make_mlp()
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor.clone()

    def theirs() -> Context:
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context, theirs():
            hidden = model[:2](x * 1)
            with context:
                hidden = model[2:4](hidden)
        with theirs(), context:
            hidden = model[4:6](hidden)
        with context, torch.autograd.graph.save_on_cpu(pin_memory=True):
            hidden = model[6:](hidden)
        with context:
            value = hidden.square().mean()
        value.backward()
        return on_host(x.grad, *gradients_of(model))

    check_equal(run, steps=2, **options)
    assert packed


def test_hooks_that_quantize_inside_of_ours() -> None:
    """What an inner pair's pack saves or makes is not offloaded behind its back."""
    x = make_leaf()
    context = offloading()
    with context:
        y = x * 1
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor.to(torch.float16), lambda packed: packed.float()
        ):
            value = y.exp().sum()
    assert offloaded_tensors(context) == 0
    value.backward()
    assert torch.equal(x.grad, x.detach().exp().half().float())


def test_disabled_hooks_are_an_error_of_torch() -> None:
    with (
        torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        pytest.raises(RuntimeError, match="not here"),
        offloading(),
    ):
        pass
    gradients(make_mlp(), make_leaf(), offloading())


def test_tensor_and_module_hooks_see_what_they_always_do(options: dict[str, Any]) -> None:
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        seen: list[torch.Tensor] = []
        handles = [
            model[2].register_full_backward_hook(lambda _m, grads, _o: seen.append(grads[0])),
            model[4].register_full_backward_pre_hook(lambda _m, grads: seen.append(grads[0])),
            model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad + 0)),
        ]
        with context:
            hidden = model[:3](x * 1)
            hidden.register_hook(lambda gradient: gradient * 2)
            hidden.retain_grad()
            value = model[3:](hidden).square().mean()
        torch.autograd.graph.register_multi_grad_hook(
            [x, hidden], lambda grads: seen.extend(g for g in grads if g is not None)
        )
        value.backward()
        for handle in handles:
            handle.remove()
        return on_host(x.grad, hidden.grad, *seen, *gradients_of(model))

    check_equal(run, steps=2, **options)


def test_functional_transforms_refuse_hooks_as_torch_does() -> None:
    """torch.func does not support saved-tensor hooks, whoever installs them."""
    x = make_leaf().detach()

    def value(row: torch.Tensor) -> torch.Tensor:
        return row.sin().exp().sum()

    expected = torch.func.vmap(torch.func.grad(value))(x)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    outcomes = []
    for context in (hooks, offloading()):
        try:
            with context:
                found = torch.func.vmap(torch.func.grad(value))(x)
            assert torch.equal(found, expected)
            outcomes.append("equal")
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_anomaly_detection(options: dict[str, Any]) -> None:
    model = make_mlp(depth=2)

    def run(context: Context) -> list[torch.Tensor]:
        with torch.autograd.set_detect_anomaly(True):
            return gradients(model, make_leaf(), context)

    check_equal(run, **options)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_anomalies_are_reported() -> None:
    x = make_leaf()
    with torch.autograd.detect_anomaly(), offloading():
        value = (functional.relu(x * 1) - 1e9).clamp(min=-1).sqrt().sum()
        with pytest.raises(RuntimeError, match="returned nan values"):
            value.backward()

"""What programs do with autograd graphs, under activation offloading: the bits of the plain run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
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
from torch import nn

from spillover import ConfigError
from spillover._core import HostPool

# ---- which part of a graph runs, and how often ----


def test_backward_of_part_of_the_outputs(budgets: dict[str, Any]) -> None:
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            hidden = model[:4](x * 1)
            first, second = model[4:](hidden).tanh(), hidden.exp().sin()
        first.sum().backward(retain_graph=True)
        found = on_host(x.grad, *gradients_of(model))
        second.mean().backward()
        return found + on_host(x.grad, *gradients_of(model))

    check_equal(run, steps=3, **budgets)


def test_inputs_of_backward_are_named(budgets: dict[str, Any]) -> None:
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            value = model(x * 1).square().mean()
        value.backward(inputs=[model[6].weight, model[2].bias], retain_graph=True)
        (only,) = torch.autograd.grad(value, x, retain_graph=True)
        value.backward(inputs=[model[0].weight])
        return on_host(only, *gradients_of(model))

    check_equal(run, steps=2, **budgets)


def test_retained_graphs_run_many_times(budgets: dict[str, Any]) -> None:
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            out = model(x * 1)
        rows = [
            torch.autograd.grad(out[index].sum(), x, retain_graph=True)[0] for index in (0, 17, 3)
        ]
        batched = torch.autograd.grad(
            out,
            x,
            torch.eye(3, 48, device="cuda").unsqueeze(-1).expand(-1, -1, 64).contiguous(),
            is_grads_batched=True,
        )
        return on_host(*rows, *batched)

    check_equal(run, **budgets)


def test_double_backward_through_what_left(budgets: dict[str, Any]) -> None:
    """A gradient penalty: backward saves tensors of its own, inside of the context and outside."""
    model = make_mlp(depth=2)

    def run(context: Context, *, inside: bool) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            value = model(x * 1).tanh().square().sum()
            if inside:
                (slope,) = torch.autograd.grad(value, x, create_graph=True)
        if not inside:
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
        (value + slope.square().sum() + slope.sin().mean()).backward()
        return on_host(slope, x.grad, *gradients_of(model))

    for inside in (True, False):
        check_equal(lambda context, inside=inside: run(context, inside=inside), steps=2, **budgets)


def test_several_forwards_before_their_backwards(budgets: dict[str, Any]) -> None:
    """As a pipeline's stages do: first in, first out; last in, first out; and mixed."""
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
            model.zero_grad()
            leaves = [make_leaf(seed=seed) for seed in range(4)]
            values = []
            for leaf in leaves:
                with context:
                    values.append(model(leaf * 1).square().mean())
            for index in order:
                values[index].backward()
            found += on_host(*(leaf.grad for leaf in leaves), *gradients_of(model))
        return found

    check_equal(run, **budgets)


def test_one_forward_one_backward_pipeline(budgets: dict[str, Any]) -> None:
    """Stages pass detached tensors on; forwards of later micro-batches go between backwards."""
    stages = [make_mlp(depth=2), make_mlp(depth=1)]

    def run(context: Context) -> list[torch.Tensor]:
        for stage in stages:
            stage.zero_grad()
        flying: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        leaves = [make_leaf(seed=seed) for seed in range(5)]

        def backward() -> None:
            sent, received, value = flying.pop(0)
            value.backward()
            sent.backward(received.grad)

        for leaf in leaves:
            with context:
                sent = stages[0](leaf * 1)
                received = sent.detach().requires_grad_()
                flying.append((sent, received, stages[1](received * 1).square().mean()))
            if len(flying) == 3:
                backward()
        while flying:
            backward()
        grads = [p for stage in stages for p in gradients_of(stage)]
        return on_host(*(leaf.grad for leaf in leaves), *grads)

    check_equal(run, steps=2, **budgets)


def test_unused_branches_and_steps_that_differ(budgets: dict[str, Any]) -> None:
    """Each step takes other branches than the recorded one."""
    model = make_mlp(depth=6)

    def run(context: Context) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for step in range(6):
            model.zero_grad()
            x = make_leaf(24 + 8 * (step % 3))
            with context:
                hidden = x * 1
                for index, layer in enumerate(model):
                    if (step + index) % 4:
                        hidden = layer(hidden)
                    else:
                        _ = layer(hidden).exp().square()
                value = hidden.square().mean() + (hidden.sin().sum() if step % 2 else 0)
            if step != 4:
                value.backward()
            found += on_host(x.grad, *gradients_of(model))
        return found

    check_equal(run, **budgets)


def test_a_step_that_deviates_is_learnt() -> None:
    """Its steps save alike, and run the branches of their backward in one order or the other."""
    model, x = make_mlp(depth=12), make_leaf(512)

    def run(context: Context, order: list[int]) -> list[torch.Tensor]:
        model.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        with context:
            middle = model[:8](leaf * 1)
            ends = [part(middle).square().mean() for part in (model[8:16], model[16:])]
        slopes = [torch.autograd.grad(ends[index], middle, retain_graph=True) for index in order]
        middle.backward(slopes[0][0] + slopes[1][0])
        return on_host(leaf.grad)

    context = offloading(in_flight_max=1, prefetch="1MiB", pool=HostPool(limit_bytes=64 << 20))
    misses = []
    for order in [[1, 0]] * 3 + [[0, 1]] * 3:
        expected = run(contextlib.nullcontext(), order)
        before = context.stats().prefetch_misses
        assert_same(run(context, order), expected)
        misses.append(context.stats().prefetch_misses - before)
    assert misses[3] > 4, "the fourth step is to deviate"
    assert max(misses[4:]) <= 3


# ---- exceptions ----


def test_an_exception_in_forward(budgets: dict[str, Any]) -> None:
    model = make_gpt(depth=2)
    x = torch.randn(2, 8, 32, device="cuda")
    expected = gradients(model, x)
    context = offloading(**budgets)
    for _ in range(3):
        hook = model[1].mlp[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), context:
            model(x * 1)
        hook.remove()
        assert_same(gradients(model, x, context), expected)
    settle()
    before = torch.cuda.memory_allocated()
    with contextlib.suppress(ZeroDivisionError), context:
        model(x * 1)
        raise ZeroDivisionError
    settle()
    assert torch.cuda.memory_allocated() <= before


class Failing(torch.autograd.Function):
    """Backward raises, once asked to."""

    fails = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        if Failing.fails:
            raise ZeroDivisionError
        return gradient * 2 + 0 * x


def test_an_exception_in_backward(budgets: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a graph that is kept and used again, and on one that is thrown away."""
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            value = model[4:](Failing.apply(model[:4](x * 1))).square().mean()
            thrown_away = model(Failing.apply(x * 2)).sum()
        monkeypatch.setattr(Failing, "fails", True)
        for graph in (thrown_away, value, value):
            with pytest.raises(ZeroDivisionError):
                graph.backward(retain_graph=graph is value)
        monkeypatch.setattr(Failing, "fails", False)
        model.zero_grad()
        value.backward()
        return on_host(x.grad, *gradients_of(model))

    check_equal(run, steps=2, **budgets)


def test_a_second_backward_raises_as_torch_does() -> None:
    def message(context: Context) -> str:
        with context:
            value = make_mlp(depth=1)(make_leaf() * 1).sum()
        value.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time") as error:
            value.backward()
        return str(error.value)

    assert message(offloading()) == message(contextlib.nullcontext())


# ---- how the context is used ----


def test_nested_contexts_of_different_options(budgets: dict[str, Any]) -> None:
    model = make_mlp()
    outer, inner = offloading(**budgets), offloading(**TIGHT)

    def run(context: Context, within: Context) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        with context:
            hidden = model[:2](x * 1)
            with within:
                hidden = model[2:4](hidden)
                with context:
                    hidden = model[4:6](hidden)
            value = model[6:](hidden).square().mean()
        value.backward()
        return on_host(x.grad, *gradients_of(model))

    expected = run(contextlib.nullcontext(), contextlib.nullcontext())
    assert_same(run(outer, inner), expected)
    assert_same(run(outer, outer), expected)
    assert offloaded_bytes(inner) > 0
    assert offloaded_bytes(outer) > offloaded_bytes(inner)


def test_contexts_are_closed_in_another_order() -> None:
    """Context managers that live in generators or exit stacks may end so."""
    model, x = make_mlp(), make_leaf()
    expected = gradients(model, x)
    context = offloading(**TIGHT)

    def stages() -> Iterator[torch.Tensor]:
        hidden = yield
        with context:
            for start in range(0, len(model), 2):
                hidden = yield model[start : start + 2](hidden)

    def run(value: torch.Tensor) -> torch.Tensor:
        walk = stages()
        next(walk)
        for _ in range(4):
            value = walk.send(value)
        walk.close()
        return value

    wrapper = nn.Module()
    wrapper.inner = model
    wrapper.forward = run
    assert_same(gradients(wrapper, x), expected)
    assert offloaded_tensors(context) > 0
    before = offloaded_tensors(context)
    gradients(model, x)
    assert offloaded_tensors(context) == before, "the generator's context is still open"


def test_a_decorated_method(budgets: dict[str, Any]) -> None:
    model = make_mlp()
    context = offloading(**budgets)

    class Trainer:
        @context
        def loss(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return model(x * 1).square().mean() * scale

    def run(loss: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        loss(x, scale=2.0).backward()
        return on_host(x.grad, *gradients_of(model))

    expected = run(lambda x, scale: model(x * 1).square().mean() * scale)
    assert_same(run(Trainer().loss), expected)
    assert offloaded_bytes(context) > 0


def test_a_decorated_generator_is_in_the_context_while_it_runs(budgets: dict[str, Any]) -> None:
    model, others = make_mlp(), make_mlp()
    context = offloading(**budgets)

    def stages(value: torch.Tensor, step: int = 2) -> Iterator[torch.Tensor]:
        """Whoever gets a stage's output may send another, or an error."""
        try:
            for start in range(0, len(model), step):
                value = model[start : start + step](value)
                with contextlib.suppress(KeyError):
                    sent = yield value
                    value = value if sent is None else sent
        finally:
            ended.append(step)
        return value * 1

    def run(function: Callable[..., Iterator[torch.Tensor]]) -> list[torch.Tensor]:
        model.zero_grad()
        x = make_leaf()
        walk = function(x * 1, step=2)
        first = next(walk)
        before = offloaded_bytes(context)
        others(first)
        assert offloaded_bytes(context) == before, "the caller's code is in the context"
        second = walk.send(first * 2)
        walk.throw(KeyError())
        last = None
        while last is None:
            try:
                next(walk)
            except StopIteration as end:
                last = end.value
        (last.square().mean() + second.mean()).backward()
        return on_host(x.grad, *gradients_of(model))

    ended: list[int] = []
    expected = run(stages)
    assert_same(run(context(stages)), expected)
    assert offloaded_bytes(context) > 0
    assert context(stages).__name__ == "stages"
    walk = context(stages)(make_leaf() * 1, step=4)
    next(walk)
    walk.close()
    assert ended == [2, 2, 4]
    walk = context(stages)(make_leaf() * 1, step=4)
    next(walk)
    with pytest.raises(KeyboardInterrupt):
        walk.throw(KeyboardInterrupt())
    assert ended == [2, 2, 4, 4]


def test_a_decorated_generator_may_be_a_method_with_arguments_of_any_name() -> None:
    context = offloading()

    class Trainer:
        @context
        def stages(self, function: torch.Tensor, context: float) -> Iterator[torch.Tensor]:
            yield function.exp() * context

    before = offloaded_bytes(context)
    x = make_leaf()
    (out,) = Trainer().stages(function=x * 1, context=2.0)
    assert offloaded_bytes(context) > before
    out.sum().backward()
    assert torch.equal(x.grad, x.detach().exp() * 2)


def test_a_decorated_generator_does_not_keep_what_was_thrown_into_it() -> None:
    class OddError(Exception):
        """Unlike those of Python, it can be referred to weakly."""

    @offloading()
    def stages() -> Iterator[None]:
        with contextlib.suppress(OddError):
            yield
        yield

    walk = stages()
    next(walk)
    error = OddError()
    gone = weakref.ref(error)
    walk.throw(error)
    del error
    assert gone() is None


def test_a_decorated_coroutine_is_refused() -> None:
    async def loss() -> None:
        """Would be in the context while it waits."""

    async def losses() -> AsyncIterator[None]:
        yield

    for function in (loss, losses):
        with pytest.raises(ConfigError, match=f"cannot decorate {function.__name__}, a coroutine"):
            offloading()(function)


def test_no_grad_and_inference_save_nothing() -> None:
    model, x = make_mlp(), make_leaf()
    context = offloading()
    with context, torch.no_grad():
        model(x * 1)
    with context, torch.inference_mode():
        model(x * 1)
    assert offloaded_tensors(context) == 0
    with torch.inference_mode():
        constant = torch.randn(48, 64, device="cuda")
    with context:
        value = (constant.clone() * x.exp()).sum()
    value.backward()

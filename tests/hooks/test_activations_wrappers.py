"""Activation offloading under what training code wraps around a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler_that_skips_steps(
    dtype: torch.dtype, budgets: dict[str, Any]
) -> None:
    """A scale that overflows at first, clipping, and accumulation over two micro-steps."""

    def run(context: Context) -> list[torch.Tensor]:
        model = make_gpt(depth=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20, growth_interval=2)
        for step in range(4):
            for micro_step in range(2):
                torch.manual_seed(2 * step + micro_step)
                x = torch.randn(2, 8, 32, device="cuda")
                with context, torch.autocast("cuda", dtype=dtype):
                    value = model(x * 1).float().square().mean()
                scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [torch.tensor(scaler.get_scale()), *on_host(*model.parameters())]

    check_equal(run, **budgets)


def test_weights_that_autocast_has_cast_are_shared_by_their_uses() -> None:
    """The cast copy is cached by autocast, and saved by each layer that uses it."""
    layer = nn.Linear(64, 64, bias=False).cuda()
    context = offloading()
    with context, torch.autocast("cuda", dtype=torch.bfloat16):
        x = make_leaf()
        value = layer(layer(layer(x)))
    low = 2 * 64 * 64
    assert offloaded_bytes(context) == low + 3 * 48 * 64 * 2
    value.float().sum().backward()


# ---- adapters ----


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, as peft wraps it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.up(self.down(self.dropout(x)))


def test_adapters_over_frozen_weights(budgets: dict[str, Any]) -> None:
    model = make_mlp()
    for index in range(0, len(model), 2):
        model[index] = Adapted(model[index]).cuda()

    def run(context: Context) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(48, 64, device="cuda")  # Not trained, as an embedding's output.
        with context:
            value = model(x).square().mean()
        value.backward()
        return on_host(*gradients_of(model))

    context = check_equal(run, steps=2, **budgets)
    assert context.stats().kept_tensors > 0


# ---- process groups ----


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        settle()
        dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "wrapping",
    [{}, {"static_graph": True}, {"gradient_as_bucket_view": True, "find_unused_parameters": True}],
    ids=["plain", "static_graph", "views"],
)
def test_distributed_data_parallel(wrapping: dict[str, Any]) -> None:
    def run(context: Context) -> list[torch.Tensor]:
        module = make_mlp()
        model = DistributedDataParallel(module, bucket_cap_mb=0.01, **wrapping)
        leaves = [make_leaf(seed=seed) for seed in range(4)]
        for step, leaf in enumerate(leaves):
            is_last = step % 2 == 1 or "static_graph" in wrapping
            with contextlib.nullcontext() if is_last else model.no_sync(), context:
                value = model(leaf * 1).square().mean()
                value.backward()
        return on_host(*(leaf.grad for leaf in leaves), *gradients_of(module))

    check_equal(run, **TIGHT)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("reshard", [True, False])
def test_fully_sharded_data_parallel(reshard: bool) -> None:
    """FSDP2, in float32 and with bfloat16 compute: unsharded weights stay, activations leave."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cuda", (1,))

    def run(context: Context) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for dtype in (None, torch.bfloat16):
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            model = make_gpt(depth=2)
            for layer in (*model, model):
                fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
            torch.manual_seed(1)
            for _ in range(2):
                x = torch.randn(2, 8, 32, device="cuda")
                with context:
                    value = model(x * 1).float().square().mean()
                value.backward()
            found += on_host(value, *(p.grad.to_local() for p in model.parameters()))
        return found

    context = check_equal(run, **TIGHT)
    # 15 tensors of a block that are not the block's weights, and what is around it.
    assert 0 < offloaded_tensors(context) < 4 * 2 * 30


# ---- torch.compile ----


def small(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.gelu((x @ weight).exp().sigmoid() @ weight).square()


def step_of(
    compiled: Callable[..., torch.Tensor], weight: torch.Tensor, context: Context
) -> list[torch.Tensor]:
    """One step of a compiled function."""
    weight.grad = None
    x = make_leaf()
    with context:
        value = compiled(x * 1, weight).mean()
    value.backward()
    return on_host(value, x.grad, weight.grad)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_inside_of_the_context() -> None:
    """The graph's saved tensors leave; the next call makes no new graph."""
    weight = torch.randn(64, 64, device="cuda").div_(8).requires_grad_()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(small, backend=counter, fullgraph=True)

    context = check_equal(partial(step_of, compiled, weight), steps=3, **TIGHT)
    assert offloaded_bytes(context) > 3 * 48 * 64 * 4
    # Without and with hooks.
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
def test_no_stream_is_entered_around_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have them keep the stream that they began on; opaque operators would hide it."""
    weight = torch.randn(64, 64, device="cuda").div_(8).requires_grad_()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a stream was entered")

    expected = step_of(compiled, weight, contextlib.nullcontext())
    context = offloading(**TIGHT)
    for name in ("set_stream", "stream", "StreamContext"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch._C, "_cuda_setStream", refuse)
    for _ in range(3):
        assert_same(step_of(compiled, weight, context), expected)
    assert offloaded_bytes(context) > 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("is_decorator", [False, True])
def test_a_context_inside_of_a_compiled_function(is_decorator: bool) -> None:
    """It breaks the graph, and nothing else."""
    weight = torch.randn(64, 64, device="cuda").div_(8).requires_grad_()
    context = offloading(**TIGHT)
    decorated = context(small)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin() * 2
        if is_decorator:
            y = decorated(y, weight)
        else:
            with context:
                y = small(y, weight)
        return y.cos().mean()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return small(x.sin() * 2, weight).cos().mean()

    def run(forward: Any) -> list[torch.Tensor]:
        weight.grad = None
        x = make_leaf()
        value = forward(x * 1)
        value.backward()
        return on_host(value, x.grad, weight.grad)

    compiled = torch.compile(function, backend="aot_eager")
    expected = run(plain)
    for _ in range(2):
        assert_same(run(compiled), expected)
    assert offloaded_bytes(context) > 0


@pytest.mark.xfail(reason="the compiler traces the unpack hook", strict=False)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.soak
def test_compiled_autograd() -> None:
    weight = torch.randn(64, 64, device="cuda").div_(8).requires_grad_()

    def run(context: Context) -> list[torch.Tensor]:
        weight.grad = None
        x = make_leaf()
        with context:
            value = small(x * 1, weight).mean()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            value.backward()
        return on_host(value, x.grad, weight.grad)

    check_equal(run, **TIGHT)


# ---- CUDA graphs ----


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("is_settled", [True, False])
def test_a_whole_step_captured_in_a_cuda_graph(is_settled: bool) -> None:
    """What is saved in a capture stays on the device, in the graph's pool."""
    model = make_mlp(depth=2)
    x = make_leaf().detach().requires_grad_()
    expected = gradients(model, x)
    context = offloading()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), context:
        model(x * 1).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    model.zero_grad()
    x.grad = None
    if is_settled:
        settle()
    else:  # What is on its way out may not be asked about in a capture.
        gradients(model, x, context)
        model.zero_grad()
    before = offloaded_tensors(context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), context:
        value = model(x * 1).square().mean()
        value.backward()
    assert offloaded_tensors(context) == before
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(on_host(value, x.grad, *gradients_of(model)), expected)
    assert_same(gradients(model, x, context), expected)


def test_graphed_callables_inside_of_the_context() -> None:
    model = make_mlp(depth=2)
    graphed = torch.cuda.make_graphed_callables(make_mlp(depth=2), (make_leaf(),))

    def run(middle: nn.Module, context: Context) -> list[torch.Tensor]:
        for module in (model, middle):
            module.zero_grad()
        x = make_leaf()
        with context:
            value = model(middle(model(x * 1)).exp()).square().mean()
        value.backward()
        return on_host(value, x.grad, *gradients_of(model), *gradients_of(middle))

    expected = run(make_mlp(depth=2), contextlib.nullcontext())
    context = offloading(**TIGHT)
    for _ in range(2):
        assert_same(run(graphed, context), expected)
    assert offloaded_bytes(context) > 0


def test_backward_in_a_capture_of_what_left_before_it() -> None:
    """Either right at each replay, or an error that says why, after which all goes on."""
    model = make_mlp(depth=2)
    x = make_leaf()
    expected = gradients(model, x)
    context = offloading()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), context:
        value = model(x * 1).square().mean()
    torch.cuda.synchronize()
    settle()
    graph = torch.cuda.CUDAGraph()
    error: BaseException | None = None
    try:
        with torch.cuda.graph(graph, stream=stream):
            found = torch.autograd.grad(value, list(model.parameters()))
    except RuntimeError as caught:
        error = caught
        torch.cuda.set_stream(torch.cuda.default_stream())
    if error is None:
        graph.replay()
        torch.cuda.synchronize()
        assert_same(on_host(*found), expected[2:])
    else:
        # The end of the capture raises an error of its own over ours.
        reasons = [str(error), str(error.__context__)]
        assert any("offload" in reason and "captur" in reason for reason in reasons), reasons
    del value, error
    torch.cuda.synchronize()
    assert_same(gradients(model, x, context), expected)

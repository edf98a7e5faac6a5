"""Activation offload by module: as the context around each of its forwards, and only there."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
from activation_contexts import TIGHT, living_devices, offloading, on_disk, on_host, settle
from activation_models import assert_same, gradients, gradients_of, make_gpt, make_leaf, make_mlp
from test_activations_memory import MIB, memory_limit
from torch import nn
from torch.utils.checkpoint import checkpoint

from spillover import ConfigError, StateError, offload_activations_of
from spillover._core import HostPool
from spillover._sources import source_stats
from spillover.hooks import OffloadedModules


def wrapped(modules: Any, **options: Any) -> OffloadedModules:
    """All that the modules save leaves, of whatever size, but for what options say."""
    return offload_activations_of(modules, **{"min_bytes": 1, "keep_on_device": 0, **options})


def has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@pytest.fixture(autouse=True)
def no_hooks_are_left() -> Iterator[None]:
    yield
    assert not has_hooks()


def words(seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 24, 32, device="cuda")


# ---- gradients ----


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_gradients_are_bitwise_equal(
    tier: str, each: bool, budgets: dict[str, Any], tmp_path: Any
) -> None:
    model, x = make_gpt(), words()
    expected = gradients(model, x)
    more = on_disk(tmp_path) if tier == "disk" else {}
    with wrapped(model.children() if each else model, **budgets, **more) as handle:
        for step in range(1, 4):
            assert_same(gradients(model, x), expected)
            assert not has_hooks()
            stats = handle.stats()
            assert stats.offloaded_bytes >= step * 3 * 6 * x.nbytes
            assert stats.bytes_out > 0
    assert_same(gradients(model, x), expected)
    assert handle.stats() == stats


def test_memory_falls_as_with_the_context() -> None:
    model, x = make_mlp(depth=8), make_leaf(4096)
    held: dict[str, int] = {}
    for name in ("plain", "context", "modules"):
        context = offloading() if name == "context" else contextlib.nullcontext()
        handle = wrapped(model.children()) if name == "modules" else None
        settle()
        before = torch.cuda.memory_allocated()
        with context:
            out = model(x * 1)
        settle()
        held[name] = torch.cuda.memory_allocated() - before
        out.sum().backward()
        del out
        if handle is not None:
            handle.remove()
    assert held["plain"] > 8 * x.nbytes
    assert held["modules"] <= held["context"] + x.nbytes < held["plain"] / 2


def test_what_was_learnt_is_followed() -> None:
    """From the second step on all that backward asks for has been brought ahead, but the first."""
    model, x = make_mlp(depth=12), make_leaf(512)
    expected = gradients(model, x)
    handle = wrapped(model, pool=HostPool(limit_bytes=64 * MIB))
    for _ in range(2):
        assert_same(gradients(model, x), expected)
    before = handle.stats().prefetch_misses
    for _ in range(3):
        assert_same(gradients(model, x), expected)
    assert handle.stats().prefetch_misses - before <= 3
    handle.remove()


def test_a_measured_budget() -> None:
    """Where all fits nothing leaves once that is known; where it does not, the rest leaves."""
    model = make_mlp(depth=16)
    batches = [make_leaf(rows) for rows in [96] * 5 + [8192] * 5]
    expected = [gradients(model, batch) for batch in batches]
    model.zero_grad()
    settle()
    # A pool of its own, so that it learns nothing from other tests.
    pool = HostPool(limit_bytes=128 * MIB)
    moved: list[int] = []
    with (
        wrapped(model.children(), keep_on_device=None, pool=pool) as handle,
        memory_limit(64 * MIB),
    ):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same(gradients(model, batch), wanted)
            moved.append(handle.stats().offloaded_bytes)
    assert 0 < moved[0] < moved[1]
    assert moved[2] == moved[4]
    assert moved[-1] > moved[-2]


def test_own_parameters_and_buffers_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(64, device="cuda"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    module, x = Scaled(), make_leaf()
    with wrapped(module) as handle:
        for _ in range(2):
            (x * 1 * module.scale.new_ones(1)).mul(1)
            module(x * 1).sum().backward()
            module.scale = module.scale.clone()
        assert handle.stats().offloaded_bytes == 0
        assert handle.stats().kept_tensors > 0


def test_out_proj_of_multihead_attention_is_never_called() -> None:
    """Name the attention; the projection within it is not run by a call."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(64, 4, batch_first=True).cuda()
    x = torch.randn(2, 16, 64, device="cuda")

    def run() -> list[torch.Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf * 1, leaf * 1, leaf * 1)[0].square().mean().backward()
        return on_host(leaf.grad, *gradients_of(layer))

    expected = run()
    with wrapped([layer.out_proj]) as handle:
        assert_same(run(), expected)
        assert handle.stats().offloaded_bytes == 0
    with wrapped(layer) as handle:
        assert_same(run(), expected)
        assert handle.stats().offloaded_bytes > 0


# ---- rounds ----


def present_round_sizes() -> list[int]:
    return [len(device._round.views) for device in living_devices()]


@pytest.mark.parametrize("keep", [0, "32KiB"])
def test_pipelines(keep: int | str, budgets: dict[str, Any]) -> None:
    """All forwards before a backward, and forwards between backwards."""
    model = make_mlp()

    def run() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for order in ("abcABC", "abcCAB", "abAcBdCD"):
            model.zero_grad()
            leaves = {name: make_leaf(seed=ord(name)) for name in "abcd"}
            values: dict[str, torch.Tensor] = {}
            for name in order:
                if name.islower():
                    values[name] = model(leaves[name] * 1).square().mean()
                else:
                    values.pop(name.lower()).backward()
            found += on_host(*(leaf.grad for leaf in leaves.values()), *gradients_of(model))
        return found

    expected = run()
    with wrapped(model.children(), **{**budgets, "keep_on_device": keep}) as handle:
        for _ in range(4):
            assert_same(run(), expected)
    assert handle.stats().offloaded_bytes > 0


@pytest.mark.parametrize("kind", ["rest of a graph", "forward alone"])
def test_rounds_do_not_grow(kind: str) -> None:
    """With old graphs that somebody holds, and without any backward."""
    model, x = make_mlp(depth=3), make_leaf()
    handle = wrapped(model.children(), pool=HostPool(limit_bytes=16 * MIB))
    held: list[torch.Tensor] = []
    sizes: list[int] = []
    out = None
    for _ in range(8):
        out = model(x * 1)
        held.append(model[1](x * 1))
        if kind == "rest of a graph":
            out.sum().backward()
        sizes.append(max(present_round_sizes()))
    assert sizes[-1] <= 3 * sizes[0]
    del out
    handle.remove()


# ---- surroundings ----


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", ["call", "forward", "inside"])
def test_checkpoints(use_reentrant: bool, around: str) -> None:
    """Around the call as Transformers does, around forward, and within it."""

    class Checkpointed(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = (
                    checkpoint(layer, x, use_reentrant=use_reentrant)
                    if around == "call"
                    else layer(x)
                )
            return x

    layers = make_gpt(mode="plain")
    model, x = Checkpointed(layers), words()
    for layer in layers:
        if around == "inside":
            layer.mode = "reentrant" if use_reentrant else "not"
        if around == "forward":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    expected = gradients(model, x)
    with wrapped(layers.children(), **TIGHT) as handle:
        for step in range(1, 4):
            assert_same(gradients(model, x), expected)
            # The inputs of regions inside of a module; nothing of regions around it.
            inside = 0 if around == "call" else 3 * x.nbytes
            assert handle.stats().offloaded_bytes == step * inside


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_wrapped_part_of_a_region(use_reentrant: bool) -> None:
    model, x = make_gpt(mode="reentrant" if use_reentrant else "not"), words()
    expected = gradients(model, x)
    with wrapped([block.mlp for block in model]) as handle:
        for _ in range(2):
            assert_same(gradients(model, x), expected)
        assert handle.stats().offloaded_bytes == 0


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole: bool) -> None:
    torch.compiler.reset()
    model, x = make_mlp(), make_leaf()
    expected = gradients(model, x)
    with wrapped(model if whole else model.children(), **TIGHT) as handle:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            assert_same(gradients(compiled, x), expected)
            assert not has_hooks()
        assert handle.stats().offloaded_bytes > 0
    torch.compiler.reset()


def test_function_transforms() -> None:
    """They allow no hooks."""
    model, x = make_mlp(), make_leaf()
    weights = dict(model.named_parameters())

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().mean()

    expected = torch.func.grad(loss)(weights)
    with wrapped(model.children()):
        found = torch.func.grad(loss)(weights)
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_inside_of_a_context_and_of_one_another() -> None:
    model, x = make_gpt(), words()
    expected = gradients(model, x)
    context = offloading(**TIGHT)
    with wrapped(model) as outer, wrapped([block.mlp for block in model], **TIGHT) as inner:
        for _ in range(3):
            assert_same(gradients(model, x, context), expected)
        for stats in (outer.stats(), inner.stats(), context.stats()):
            assert stats.offloaded_bytes > 0


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)
        self.error: type[BaseException] | None = None

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        x = self.layer(x).sigmoid()
        if depth > 0:
            return self(x, depth - 1).exp()
        if self.error is not None:
            raise self.error
        return x


def test_a_module_that_calls_itself() -> None:
    model, x = Recursive().cuda(), make_leaf()
    expected = gradients(model, x)
    with wrapped(model, **TIGHT) as handle:
        for _ in range(3):
            assert_same(gradients(model, x), expected)
    assert handle.stats().offloaded_bytes > 0


@pytest.mark.parametrize("ends", ["next call", "remove"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_in_forward(error: type[BaseException], ends: str) -> None:
    """Torch does not call hooks after an interrupt: then the next one to come cleans up."""
    model, x = Recursive().cuda(), make_leaf()
    expected = gradients(model, x)
    with wrapped(model, **TIGHT) as handle:
        model.error = error
        with pytest.raises(error):
            model(x * 1)
        assert has_hooks() == (error is KeyboardInterrupt)
        model.error = None
        if ends == "next call":
            assert_same(gradients(model, x), expected)
            assert not has_hooks()
        handle.remove()
        assert not has_hooks()
    assert not model._forward_hooks


def test_a_hook_before_ours_raises() -> None:
    model, x = make_mlp(depth=1), make_leaf()
    with wrapped(model):
        hook = model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):
            model(x)
        hook.remove()
        model(x).sum().backward()


def test_threads() -> None:
    model = make_mlp()
    leaves = [make_leaf(seed=seed) for seed in range(4)]

    def step(leaf: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(model(leaf * 1).square().mean(), leaf)
        return gradient.cpu()

    expected = [step(leaf) for leaf in leaves]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def work(index: int) -> None:
        for turn in range(5):
            found[index, turn] = step(leaves[index])

    with wrapped(model.children(), **TIGHT):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 20
    assert all(torch.equal(each, expected[index]) for (index, _), each in found.items())


# ---- the handle ----


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_wrapped(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = make_mlp(), make_leaf()
    expected = gradients(model, x)
    with wrapped(model.children()) as handle:
        other = copied(model)
        assert_same(gradients(other, x), expected)
        assert handle.stats().tensors == handle.stats().kept_tensors == 0
        with wrapped(other.children()) as second:
            assert_same(gradients(other, x), expected)
            assert second.stats().offloaded_bytes > 0
        assert_same(gradients(model, x), expected)
    assert handle.stats().offloaded_bytes > 0
    assert_same(gradients(other, x), expected)


def test_remove_restores() -> None:
    model, x = make_mlp(), make_leaf()
    expected = gradients(model, x)
    handle = wrapped(model.children())
    model.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    value = model(leaf * 1).square().mean()
    handle.remove()
    handle.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    value.backward()  # Of what was saved before.
    assert_same(on_host(value, leaf.grad, *gradients_of(model)), expected)
    before = handle.stats()
    assert_same(gradients(model, x), expected)
    assert handle.stats() == before


def test_removed_while_forward_runs() -> None:
    model, x = make_mlp(), make_leaf()
    handle = wrapped(model)
    model[2].register_forward_hook(lambda *_: handle.remove())
    for _ in range(2):
        model(x * 1).sum().backward()
        assert not has_hooks()
        assert not model._forward_hooks


def test_the_handle_may_go_and_the_model_too() -> None:
    model, x = make_mlp(), make_leaf()
    handle = wrapped(model.children())
    del handle
    gc.collect()
    gradients(model, x)
    assert any(each.offloaded_bytes > 0 for each in cast(Any, source_stats()["activations"]))
    handle = wrapped(model)
    settle()
    with_model = torch.cuda.memory_allocated()
    size = sum(each.nbytes for each in model.parameters())
    gc.disable()
    try:
        del model  # By reference counts alone.
        assert torch.cuda.memory_allocated() <= with_model - size
    finally:
        gc.enable()
    handle.remove()


def test_wrapped_twice() -> None:
    model = make_mlp(depth=2)
    handle = wrapped(model.children())
    with pytest.raises(StateError, match=r"Linear are offloaded already; call remove\(\)"):
        wrapped([nn.Linear(1, 1), model[0]])
    handle.remove()
    wrapped([model[0], model[0]]).remove()


def test_lists_and_dicts_of_modules() -> None:
    layers = nn.ModuleList([nn.ModuleDict({"a": nn.ReLU()}), nn.Sigmoid()])
    with wrapped(layers):
        assert [len(m._forward_hooks) for m in layers.modules()] == [0, 0, 1, 1]


def test_wrong_arguments() -> None:
    model = nn.Linear(2, 2)
    wrong: list[tuple[Any, str]] = [
        (3, "modules must be a torch.nn.Module or an iterable"),
        ("layers", "modules must be a torch.nn.Module or an iterable"),
        ([model, 3], "one is 3"),
        ({"a": model}, "one is 'a'"),
        ([], "modules has none in it"),
        (nn.ModuleList(), "modules has none in it"),
    ]
    for modules, message in wrong:
        with pytest.raises(ConfigError, match=message):
            offload_activations_of(modules)
    with pytest.raises(ConfigError, match="tier='tape' is not known"):
        offload_activations_of(model, tier="tape")
    assert not model._forward_pre_hooks


def test_spillover_0_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    model = nn.Linear(2, 2)
    with offload_activations_of(model) as handle:
        assert not model._forward_pre_hooks
        assert handle.stats().tensors == 0

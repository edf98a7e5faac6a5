"""What stays on the device, what a predicate leaves out, and what a codec may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_contexts import (
    TIGHT,
    Context,
    check_equal,
    offloaded_bytes,
    offloading,
    on_disk,
    on_host,
    settle,
)
from activation_models import assert_same, gradients, gradients_of, make_leaf, make_mlp
from activation_networks import NETWORKS, step_of
from test_activations_memory import MIB, memory_limit
from test_activations_tensors import Saving, bits, patterned

from spillover._core import HostPool

KIB = 1 << 10


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_part_stays_and_gradients_are_bitwise_equal(name: str, tier: str, tmp_path: Any) -> None:
    step = step_of(name)
    more = on_disk(tmp_path) if tier == "disk" else {}
    budgets = {**TIGHT, **more, "model": step.model}  # type: ignore[attr-defined]
    context = check_equal(step, steps=4, keep_on_device="24KiB", **budgets)
    stats = context.stats()
    assert 0 < stats.stayed_bytes <= 4 * 24 * KIB


def test_what_stays_is_what_backward_needs_first() -> None:
    model, x = make_mlp(depth=6), make_leaf(128)
    size = x.nbytes
    context = offloading(keep_on_device=4 * size)
    for _ in range(3):
        gradients(model, x, context)
    before = context.stats()
    seen: list[int] = []
    value = x * 1
    with context:
        for layer in model:
            value = layer(value)
            seen.append(context.stats().stayed_bytes - before.stayed_bytes)
    value.sum().backward()
    after = context.stats()
    assert after.stayed_bytes - before.stayed_bytes <= 4 * size
    # Nothing of the first half of forward stayed.
    assert seen[len(seen) // 2 - 1] == 0
    assert after.stayed_bytes > before.stayed_bytes


def test_nothing_leaves_where_all_fits() -> None:
    """Two steps are measured; from then on nothing is copied."""
    model, x = make_mlp(depth=6), make_leaf(96)
    expected = gradients(model, x)
    context = offloading(keep_on_device=None)
    moved = []
    for _ in range(6):
        assert_same(gradients(model, x, context), expected)
        moved.append(offloaded_bytes(context))
    assert moved[0] > 0
    assert moved[-1] == moved[-3]


def check_sizes(sizes: list[int], *, ballast_step: int | None = None) -> None:
    """Steps of batches of these sizes, where their activations do not fit.

    From ``ballast_step`` on something else holds memory, too.
    """
    model = make_mlp(depth=16)
    batches = [make_leaf(rows) for rows in sizes]
    expected = [gradients(model, batch) for batch in batches]
    model.zero_grad()
    settle()
    # With a pool of its own it learns nothing from other tests' contexts.
    context = offloading(keep_on_device=None, pool=HostPool(limit_bytes=128 * MIB))
    ballast: list[torch.Tensor] = []
    with memory_limit(64 * MIB):
        for step, (batch, wanted) in enumerate(zip(batches, expected, strict=True)):
            if step == ballast_step:
                ballast.append(torch.empty(20 * MIB, dtype=torch.uint8, device="cuda"))
            assert_same(gradients(model, batch, context), wanted)
    assert offloaded_bytes(context) > 0


def test_as_much_stays_as_fits() -> None:
    check_sizes([8192] * 6)


def test_a_larger_batch_after_what_stays_was_learnt() -> None:
    """With nothing kept it fits."""
    check_sizes([4096] * 4 + [10240] * 2 + [4096])


def test_less_memory_after_what_stays_was_learnt() -> None:
    check_sizes([8192] * 6, ballast_step=4)


def test_kept_graphs_and_pipelines_where_a_part_stays() -> None:
    model = make_mlp()

    def run(context: Context) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for order in ([0, 1, 2], [2, 0, 1]):
            model.zero_grad()
            leaves = [make_leaf(seed=seed) for seed in range(3)]
            values = []
            for leaf in leaves:
                with context:
                    values.append(model(leaf * 1).square().mean())
            for index in order:
                values[index].backward(retain_graph=True)
            values[1].backward()
            found += on_host(*(leaf.grad for leaf in leaves), *gradients_of(model))
        return found

    check_equal(run, steps=3, **TIGHT, keep_on_device="32KiB")


# ---- where ----


def test_a_predicate_chooses() -> None:
    seen: list[torch.Size] = []

    def is_wide(tensor: torch.Tensor) -> bool:
        seen.append(tensor.shape)
        return tensor.shape[-1] == 64

    x = make_leaf()
    context = offloading(where=is_wide)
    with context:
        wide = (x * 1).exp()
        narrow = wide[:, :10].sin().exp()
        value = wide.square().sum() + narrow.square().sum()
    # The result of exp, which square saves as well; sin's input is a view of it.
    assert offloaded_bytes(context) == wide.nbytes
    assert torch.Size([48, 10]) in seen
    value.backward()
    assert x.grad is not None


def test_a_predicate_that_raises() -> None:
    """The error reaches the caller, and the context can be used again."""
    fails = True

    def choose(tensor: torch.Tensor) -> bool:
        return bool(1 / 0) if fails else True

    model, x = make_mlp(depth=2), make_leaf()
    expected = gradients(model, x)
    context = offloading(where=choose)
    with pytest.raises(ZeroDivisionError):
        gradients(model, x, context)
    fails = False
    assert_same(gradients(model, x, context), expected)


# ---- codecs ----


def through(codec: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """What backward gets of tensors that were sent with a codec."""
    found: list[torch.Tensor] = []
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    with offloading(codec=codec):
        value = Saving.apply(leaf, found, *[tensor.cuda() for tensor in tensors])
    value.backward(torch.ones(1, device="cuda"))
    return on_host(*found)


def test_bfloat16_rounds_float32_alone() -> None:
    torch.manual_seed(0)
    wide = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    half, exact = torch.randn(300).half(), torch.randn(300).double()
    found = through("bfloat16", wide, half, exact)
    assert torch.equal(found[0], wide.bfloat16().float())
    assert ((found[0] - wide).abs() <= wide.abs() * 2**-8).all()
    assert torch.equal(found[1], half)
    assert torch.equal(found[2], exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blockwise_8_bits_are_within_their_error(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    data = (torch.randn(11, 256) * torch.logspace(-3, 3, 11).unsqueeze(1)).to(dtype)
    data[3] = 0
    ragged = torch.randn(1000).to(dtype)
    found = through("blockwise8", data, ragged)
    for sent, got in ((data.flatten(), found[0].flatten()), (ragged, found[1])):
        for block, back in zip(sent.split(256), got.split(256), strict=True):
            greatest = block.float().abs().max()
            # Rounding to the dtype of the tensor comes on top.
            slack = greatest * torch.finfo(dtype).eps
            assert ((back.float() - block.float()).abs() <= greatest / 254 + slack).all()
    assert found[0].dtype is dtype


def test_codecs_leave_other_dtypes_and_what_is_not_finite() -> None:
    others = [patterned(dtype, 300).cpu() for dtype in (torch.int64, torch.bool, torch.uint8)]
    found = through("blockwise8", *others)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, others, strict=True))
    data = torch.ones(1024)
    data[300], data[600] = float("inf"), float("nan")
    (back,) = through("blockwise8", data)
    assert back[256:768].isnan().all()
    assert torch.allclose(torch.cat([back[:256], back[768:]]), torch.ones(512), rtol=1 / 254)


@pytest.mark.parametrize("codec", ["bfloat16", "blockwise8"])
def test_gradients_with_a_codec_are_close(codec: str) -> None:
    """Views and aliases of encoded tensors, retained graphs and in-place checks work as ever."""
    model = make_mlp()
    x = make_leaf()
    expected = gradients(model, x)
    for found in (gradients(model, x, offloading(codec=codec, **more)) for more in ({}, TIGHT)):
        assert torch.equal(found[0], expected[0])  # Forward is untouched.
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max() + 1e-8
    with offloading(codec=codec):
        y = (x * 1).exp()
        value = (y.t() @ y).sum()
    torch.cuda.synchronize()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()

"""Saved tensors of every dtype, layout and kind come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_contexts import (
    Context,
    check_equal,
    offloaded_bytes,
    offloaded_tensors,
    offloading,
    on_disk,
    on_host,
    settle,
)
from activation_models import make_leaf, make_mlp
from torch import nn
from torch.utils._pytree import tree_map


class Saving(torch.autograd.Function):
    """Saves tensors, and hands to a list what backward gets."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, found: list[torch.Tensor], *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.found.extend(ctx.saved_tensors)
        return (gradient, None, *[None for _ in ctx.saved_tensors])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bytes, on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    return plain.reshape(-1).view(torch.uint8)


def brought_back(
    tensors: list[torch.Tensor], context: Context, *, is_lost: bool = True
) -> list[torch.Tensor]:
    """What backward gets for tensors whose device memory was used for other things meanwhile.

    The list is emptied, so that nothing else holds them.
    """
    found: list[torch.Tensor] = []
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    with context:
        value = Saving.apply(leaf, found, *tensors)
    if is_lost:
        settle()
        tensors.clear()
        _ = [torch.full((1 << 14,), 0x55, dtype=torch.uint8, device="cuda") for _ in range(32)]
    value.backward(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    return found


def patterned(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern, so NaNs with payloads, denormals and negative zeros as well."""
    count = torch.Size(shape).numel()
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
    raw = raw % 2 if dtype is torch.bool else raw
    return raw.view(dtype).view(shape).cuda()


FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype(budgets: dict[str, Any]) -> None:
    context = offloading(**budgets)
    tensors = [patterned(dtype, 24, 32) for dtype in DTYPES]
    expected = [bits(tensor) for tensor in tensors]
    sizes = sum(tensor.nbytes for tensor in tensors)
    found = brought_back(tensors, context)
    assert [tensor.dtype for tensor in found] == DTYPES
    for tensor, raw in zip(found, expected, strict=True):
        assert torch.equal(bits(tensor), raw), tensor.dtype
        assert tensor.is_cuda
    assert offloaded_bytes(context) == sizes


def layouts() -> dict[str, torch.Tensor]:
    """Tensors over storages of their own."""

    def base(*shape: int) -> torch.Tensor:
        return patterned(torch.int32, *shape)

    return {
        "contiguous": base(24, 32),
        "scalar": base(1)[0],
        "offset": base(4000)[777:1500],
        "one element far away": base(4000)[3999:],
        "transposed": base(24, 32).t(),
        "every third": base(24, 33)[:, ::3],
        "a column": base(24, 32)[:, 7],
        "permuted": base(4, 6, 8, 2).permute(3, 0, 2, 1),
        "channels last": base(2, 8, 4, 6).to(memory_format=torch.channels_last),
        "expanded": base(24, 1).expand(24, 32),
        "expanded from one": base(1).expand(24, 32),
        "expanded and offset": base(4, 24)[2].unsqueeze(1).expand(24, 5),
        "overlapping": base(100).as_strided((8, 8), (3, 5)),
        "overlapping with an offset": base(100).as_strided((5, 4), (1, 2), 31),
        "a diagonal": base(24, 24).diagonal(3),
        "unfolded": base(64).unfold(0, 16, 8),
        "narrow in large": base(1 << 14).view(128, 128)[40:44, 3:],
        "zero-size": torch.empty(0, 7, dtype=torch.int32, device="cuda"),
        "zero-size in a storage": base(24, 32)[:, 5:5],
        "no dimensions": torch.tensor(5, dtype=torch.int32, device="cuda"),
        "strides of ones": torch.empty_strided((1, 24, 1), (77, 1, 5), device="cuda").fill_(2),
    }


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_every_layout(tier: str, tmp_path: Any) -> None:
    context = offloading(**(on_disk(tmp_path) if tier == "disk" else {}))
    names = list(layouts())
    expected = [
        (item.shape, item.stride(), item.storage_offset() % 128, item.cpu())
        for item in layouts().values()
    ]
    found = brought_back(list(layouts().values()), context)
    for name, tensor, (shape, stride, offset, values) in zip(names, found, expected, strict=True):
        assert tensor.shape == shape, name
        assert tensor.stride() == stride, name
        assert tensor.storage_offset() % 128 == offset, name  # Kernels choose by alignment.
        assert torch.equal(tensor.cpu(), values), name


def test_all_layouts_of_one_storage_at_once() -> None:
    """One copy, whatever the views' shapes and dtypes."""
    base = patterned(torch.int32, 64, 64)
    views = [base, base.t(), base[3:], base.view(torch.int16), base.view(torch.float32)[:, ::2]]
    views += [base.view(-1)[5:].as_strided((9, 9), (7, 3)), base.detach()]
    expected = [bits(view) for view in views]
    context = offloading()
    size = base.nbytes
    del base
    found = brought_back(views, context)
    assert offloaded_bytes(context) == size
    for tensor, raw in zip(found, expected, strict=True):
        assert torch.equal(bits(tensor), raw)


def test_conjugated_and_negated_views() -> None:
    def run(context: Context) -> list[torch.Tensor]:
        torch.manual_seed(1)
        leaf = torch.randn(24, 24, dtype=torch.complex64, device="cuda", requires_grad=True)
        with context:
            z = leaf * 1
            value = (
                (z.conj() @ z).abs().sum() + (z.conj().imag * z.real).sum() + z.H[3:].angle().sum()
            )
        value.backward()
        return on_host(value, leaf.grad)

    check_equal(run, steps=2)


def test_complex_and_bool_in_a_graph() -> None:
    def run(context: Context) -> list[torch.Tensor]:
        x = make_leaf()
        with context:
            spectrum = torch.fft.rfft(x * 1, dim=1)
            mask = x > 0.3
            part = torch.view_as_real(spectrum * spectrum.conj()).sum(-1)
            value = part.sqrt().mean() + torch.where(mask, x.exp(), x.sin()).sum()
            value = value + (x * 2).masked_fill(mask, 1.0).square().sum() + (x * 1)[mask].prod()
        value.backward()
        return on_host(value, x.grad)

    check_equal(run, steps=2)


def test_float8_in_a_graph() -> None:
    """Scaled casts, as low-precision training saves them."""

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            scale = x.abs().amax() / 448
            low = (x / scale).to(torch.float8_e4m3fn)
            ctx.save_for_backward(low, scale, weight)
            return (low.float() * scale) @ weight

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            low, scale, weight = ctx.saved_tensors
            return gradient @ weight.t(), (low.float() * scale).t() @ gradient

    def run(context: Context) -> list[torch.Tensor]:
        x, weight = make_leaf(), make_leaf(64, seed=2)
        with context:
            value = Cast.apply(Cast.apply(x * 1, weight), weight).square().mean()
        value.backward()
        return on_host(value, x.grad, weight.grad)

    check_equal(run, steps=2)


# ---- what passes through ----


class Logged(torch.Tensor):
    """A subclass that shares its bytes with a plain tensor."""


class Pair(torch.Tensor):
    """A wrapper: its bytes are in two other tensors, and it has no storage of its own."""

    first: torch.Tensor
    second: torch.Tensor

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor) -> Pair:
        made = torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device
        )
        made.first, made.second = first, second
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def part(name: str) -> Any:
            def get(item: Any) -> Any:
                return getattr(item, name) if isinstance(item, Pair) else item

            return func(*tree_map(get, args), **tree_map(get, kwargs))

        first = part("first")
        return Pair(first, part("second")) if isinstance(first, torch.Tensor) else first


def test_tensor_subclasses_pass_through() -> None:
    x = make_leaf()
    logged = x.detach().clone().as_subclass(Logged)
    pair = Pair(x.detach() + 1, x.detach() + 2)
    context = offloading()
    found = brought_back([logged, pair], context, is_lost=False)
    assert type(found[0]) is Logged
    assert type(found[1]) is Pair
    assert torch.equal(found[0].as_subclass(torch.Tensor), x)
    assert torch.equal(found[1].second, x + 2)
    assert offloaded_tensors(context) == 0


def test_a_wrapper_subclass_in_a_graph() -> None:
    def run(context: Context) -> list[torch.Tensor]:
        first, second = make_leaf(), make_leaf(seed=2)
        pair = Pair(first.detach(), second.detach()).requires_grad_()
        with context:
            value = (pair * 2).exp() * pair
            plain = make_mlp(depth=1)(first * 1).sum()
        value.backward(Pair(torch.ones_like(first), torch.ones_like(first)))
        plain.backward()
        assert isinstance(pair.grad, Pair)
        return on_host(pair.grad.first, pair.grad.second, first.grad)

    check_equal(run)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_pass_through() -> None:
    dense = torch.randn(24, 32).relu()
    for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
        (found,) = brought_back([sparse.cuda()], offloading())
        assert found.layout is sparse.layout
        assert torch.equal(found.cpu().to_dense(), dense)


def test_sparse_products_in_a_graph() -> None:
    torch.manual_seed(0)
    sparse = torch.randn(24, 48).relu().to_sparse().cuda()

    def run(context: Context) -> list[torch.Tensor]:
        x = make_leaf()
        embedding = nn.Embedding(30, 8, sparse=True).cuda()
        embedding.weight.data.copy_(torch.arange(240.0).view(30, 8))
        tokens = torch.arange(12, device="cuda") % 5
        with context:
            value = torch.sparse.mm(sparse, (x * 1).exp()).square().sum()
            value = value + (embedding(tokens) * 1).square().sum()
        value.backward()
        assert embedding.weight.grad is not None
        return on_host(value, x.grad, embedding.weight.grad.to_dense())

    check_equal(run)


def test_nested_tensors() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(length, 8, device="cuda") for length in (3, 7, 5)]

    def run(context: Context) -> list[torch.Tensor]:
        leaves = [row.clone().requires_grad_() for row in rows]
        with context:
            jagged = torch.nested.as_nested_tensor(leaves, layout=torch.jagged)
            value = (jagged.exp() * jagged).values().square().mean()
        value.backward()
        return on_host(value, *(leaf.grad for leaf in leaves))

    check_equal(run)


def test_tensors_of_other_devices_stay() -> None:
    host = torch.randn(64, 64)
    meta = torch.empty(64, 64, device="meta")
    context = offloading()
    found = brought_back([host, meta], context, is_lost=False)
    assert found[0].data_ptr() == host.data_ptr()
    assert found[1].is_meta
    assert offloaded_tensors(context) == 0


def test_memory_that_torch_did_not_allocate() -> None:
    """Tensors over memory of others, by DLPack, are copied and freed as any."""
    owner = patterned(torch.float32, 48, 64)
    expected = bits(owner)
    foreign = torch.from_dlpack(torch.utils.dlpack.to_dlpack(owner))
    del owner
    (found,) = brought_back([foreign], offloading())
    assert torch.equal(bits(found), expected)


@pytest.mark.parametrize("has_left", [True, False])
def test_a_storage_that_its_owner_emptied(has_left: bool) -> None:
    """What left is still there; what has not may be refused, and is never read."""
    data = patterned(torch.float32, 64, 64)
    expected = bits(data)
    found: list[torch.Tensor] = []
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    with offloading():
        value = Saving.apply(leaf, found, data)
        if not has_left:
            torch.cuda.synchronize()
            data.untyped_storage().resize_(0)
    settle()
    if has_left:
        data.untyped_storage().resize_(0)
    try:
        value.backward(torch.ones(1, device="cuda"))
    except RuntimeError:
        assert not has_left
    else:
        assert torch.equal(bits(found[0]), expected)


def test_a_storage_that_its_owner_emptied_and_filled_again() -> None:
    """Backward gets what is there, as without offloading: the version says that it is the same."""
    data = patterned(torch.float32, 64, 64)
    copied = data.clone()
    expected = bits(data)
    found: list[torch.Tensor] = []
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    with offloading():
        value = Saving.apply(leaf, found, data)
    settle()
    data.untyped_storage().resize_(0)
    _ = torch.zeros(64, 64, device="cuda")
    data.untyped_storage().resize_(copied.nbytes)
    with torch.autograd._unsafe_preserve_version_counter(data):
        data.copy_(copied)
    value.backward(torch.ones(1, device="cuda"))
    assert torch.equal(bits(found[0]), expected)

"""Each way in which a placeholder ``.grad`` could tell less than the truth, by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_models import (
    Gpt,
    all_offloaded,
    assert_gradients_equal,
    is_offloaded,
    make_gpt,
)
from torch import nn

from spillover._transfer import TransferTicket
from spillover.optim import AdamW, OffloadedGradients, offload_gradients

Twins = tuple[Gpt, Gpt, OffloadedGradients]


@pytest.fixture
def twins() -> Iterator[Twins]:
    """A model, and one with its weights whose gradients are offloaded; both have gradients."""
    plain, offloaded = make_gpt(), make_gpt()
    with offload_gradients(offloaded.named_parameters()) as handle:
        backward(plain, offloaded)
        yield plain, offloaded, handle


def backward(*models: Gpt, seed: int = 0) -> None:
    for model in models:
        model.loss(seed).backward()


def assert_equal(twins: Twins, **tolerance: float) -> None:
    plain, offloaded, _ = twins
    assert_gradients_equal(offloaded.parameters(), plain.parameters(), **tolerance)


Change = Callable[[torch.Tensor], object]

CHANGES: dict[str, Change] = {
    "mul_": lambda g: g.mul_(0.5),
    "mul_ by a tensor": lambda g: g.mul_(torch.full((), 0.5, device="cuda")),
    "mul_ by an array": lambda g: g.mul_(torch.full_like(g, 0.5)),
    "div_": lambda g: g.div_(4),
    "div_ by zero": lambda g: g.div_(0),
    "imul": lambda g: g.__imul__(2),
    "neg_": lambda g: g.neg_(),
    "zero_": lambda g: g.zero_(),
    "fill_": lambda g: g.fill_(3.0),
    "add_ a number": lambda g: g.add_(1.0),
    "add_ a tensor": lambda g: g.add_(torch.ones_like(g)),
    "add_ with alpha": lambda g: g.add_(torch.ones_like(g), alpha=0.25),
    "add_ a row": lambda g: g.add_(torch.ones(g.shape[-1], device="cuda")),
    "add_ itself": lambda g: g.add_(g),
    "sub_": lambda g: g.sub_(torch.ones_like(g)),
    "copy_": lambda g: g.copy_(torch.ones_like(g)),
    "copy_ from the host": lambda g: g.copy_(torch.ones(g.shape)),
    "copy_ a number": lambda g: g.copy_(torch.tensor(2.0)),
    "copy_ itself": lambda g: g.copy_(g),
    "clamp_": lambda g: g.clamp_(-1e-3, 1e-3),
    "clamp_ after mul_": lambda g: g.mul_(0.5).clamp_(-1e-3, 1e-3),
    "mul_ twice, add_": lambda g: g.mul_(0.5).mul_(0.5).add_(torch.ones_like(g)),
    "mul_ of zeros": lambda g: g.zero_().mul_(2.0).add_(torch.ones_like(g)),
    "nan of zeros": lambda g: g.zero_().mul_(float("nan")),
    "lerp_": lambda g: g.lerp_(torch.ones_like(g), 0.1),
    "masked_fill_": lambda g: g.masked_fill_(g > 0, 0.0),
    "index_fill_": lambda g: g.index_fill_(0, torch.tensor([0], device="cuda"), 5.0),
    "nan_to_num_": lambda g: g.nan_to_num_(),
    "setitem": lambda g: g.__setitem__(0, 7.0),
    "through a view": lambda g: g.view(-1).mul_(0.5),
    "through a transposed view": lambda g: g.t().add_(1.0) if g.ndim == 2 else None,
    "through data": lambda g: g.data.mul_(0.5),
    "through detach": lambda g: g.detach().clamp_(-1e-3, 1e-3),
    "through a view of data": lambda g: g.data.view(-1)[:2].zero_(),
    "norm, then mul_": lambda g: g.mul_(1.0 / (g.norm() + 1.0)),
    "an ema": lambda g: g.mul_(0.9).add_(torch.ones_like(g), alpha=0.1),
    "foreach_mul_": lambda g: torch._foreach_mul_([g], 0.5),
    "foreach_mul_ by a tensor": lambda g: torch._foreach_mul_([g], torch.tensor(0.5)),
    "foreach_mul_ by a list": lambda g: torch._foreach_mul_([g], [0.5]),
    "foreach_div_": lambda g: torch._foreach_div_([g], 2.0),
    "foreach_add_": lambda g: torch._foreach_add_([g], [torch.ones_like(g)], alpha=2.0),
    "foreach_add_ a number": lambda g: torch._foreach_add_([g], 1.0),
    "foreach_zero_": lambda g: torch._foreach_zero_([g]),
    "foreach_sqrt_ of abs": lambda g: (torch._foreach_abs_([g]), torch._foreach_sqrt_([g])),
    "foreach_copy_": lambda g: torch._foreach_copy_([g], [torch.ones_like(g)]),
    "foreach_clamp": lambda g: torch._foreach_clamp_max_([g], 1e-3),
    "an out argument": lambda g: torch.mul(g, 2.0, out=g),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_written_to_a_gradient_is_in_it(twins: Twins, change: Change) -> None:
    for model in twins[:2]:
        for parameter in model.parameters():
            change(parameter.grad)
    assert_equal_with_nan(twins)
    backward(*twins[:2], seed=1)
    assert_equal_with_nan(twins, atol=1e-6)


def assert_equal_with_nan(twins: Twins, atol: float = 1e-7) -> None:
    for found, expected in zip(twins[1].parameters(), twins[0].parameters(), strict=True):
        torch.testing.assert_close(
            found.grad.cpu(), expected.grad.cpu(), rtol=1e-5, atol=atol, equal_nan=True
        )


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "norm": lambda g: g.norm(),
    "norm of float": lambda g: g.float().norm(2),
    "norm by rows": lambda g: g.norm(dim=-1),
    "max norm": lambda g: g.norm(float("inf")),
    "vector_norm in double": lambda g: torch.linalg.vector_norm(g, dtype=torch.float64),
    "foreach_norm": lambda g: torch._foreach_norm([g, g])[1],
    "sum": lambda g: g.sum(),
    "abs max": lambda g: g.abs().max(),
    "isnan": lambda g: torch.isnan(g),
    "isinf": lambda g: torch.isinf(g),
    "isfinite": lambda g: torch.isfinite(g).all(),
    "matmul": lambda g: g @ g.T if g.ndim == 2 else g.dot(g),
    "item": lambda g: g.sum().item(),
    "getitem": lambda g: g[0],
    "cpu": lambda g: g.cpu(),
    "numpy": lambda g: g.cpu().numpy(),
    "numpy of a detached one": lambda g: g.detach().to("cpu", torch.float64).numpy(),
    "tolist": lambda g: g.tolist(),
    "double": lambda g: g.double(),
    "clone": lambda g: g.clone(),
    "clone in a format": lambda g: g.clone(memory_format=torch.contiguous_format),
    "cat": lambda g: torch.cat([g.flatten(), g.flatten()]),
    "stack": lambda g: torch.stack([g, g]),
    "equal": lambda g: torch.equal(g, g.clone()),
    "allclose": lambda g: torch.allclose(g, g.cpu().cuda()),
    "repr": repr,
    "str": str,
    "format": lambda g: f"{g.sum()}",
    "histogram": lambda g: torch.histc(g, 4),
    "flatten_dense_tensors": lambda g: torch._utils._flatten_dense_tensors([g, g]),
    "shape": lambda g: (g.shape, g.stride(), g.dtype, g.device, g.numel(), g.nbytes, g.ndim),
    "properties": lambda g: (g.is_cuda, g.is_sparse, g.layout, g.requires_grad, g.grad_fn),
    "is_leaf": lambda g: (g.is_leaf, len(g), g.is_contiguous(), isinstance(g, torch.Tensor)),
    "new_zeros": lambda g: g.new_zeros(3),
    "zeros_like": lambda g: torch.zeros_like(g),
    "deepcopy": lambda g: copy.deepcopy(g),
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "memory": lambda g: torch.as_tensor(g.untyped_storage().nbytes()),
    "dlpack": lambda g: torch.from_dlpack(g),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("state", ["arrived", "summed", "scaled", "zero"])
def test_what_is_read_of_a_gradient_is_the_truth(twins: Twins, read: Any, state: str) -> None:
    if state == "summed":
        backward(*twins[:2], seed=1)
    for model in twins[:2]:
        for parameter in model.parameters():
            if state == "scaled":
                parameter.grad.mul_(0.25)
            elif state == "zero":
                parameter.grad.zero_()
    for found, expected in zip(twins[1].parameters(), twins[0].parameters(), strict=True):
        assert is_offloaded(found.grad)
        one, other = read(found.grad), read(expected.grad)
        if isinstance(other, (str, tuple)):
            assert one == other
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert not isinstance(one, torch.Tensor) or not is_offloaded(one)


def test_data_ptr_is_of_the_gradient(twins: Twins) -> None:
    gradient = next(twins[1].parameters()).grad
    address = gradient.data_ptr()
    assert address != 0
    assert gradient.data_ptr() == address == gradient.__cuda_array_interface__["data"][0]
    assert_equal(twins)


# ---- zero_grad ---------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["model", "optimizer"])
def test_zero_grad(twins: Twins, set_to_none: bool, by: str) -> None:
    for model in twins[:2]:
        zeroing = model if by == "model" else torch.optim.SGD(model.parameters(), lr=1.0)
        zeroing.zero_grad(set_to_none=set_to_none)
        for parameter in model.parameters():
            assert (parameter.grad is None) == set_to_none
            assert set_to_none or not parameter.grad.any()
    assert_equal(twins)
    backward(*twins[:2], seed=2)
    assert_equal(twins)


def test_zero_grad_costs_nothing_and_lets_the_memory_be_used_again(twins: Twins) -> None:
    _, offloaded, handle = twins
    before = handle.stats()
    for set_to_none in (False, True, False):
        offloaded.zero_grad(set_to_none=set_to_none)
        backward(offloaded)
    after = handle.stats()
    assert after.host_bytes == before.host_bytes
    assert after.added_bytes == after.fetched == 0


# ---- torch's clipping and GradScaler -----------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("clip", ["norm", "value", "total"])
@pytest.mark.parametrize("twice", [False, True])
def test_torchs_clipping_sees_the_truth(
    twins: Twins, foreach: bool | None, clip: str, twice: bool
) -> None:
    if twice:
        backward(*twins[:2], seed=1)
    results = []
    for model in twins[:2]:
        if clip == "norm":
            results.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach))
        elif clip == "value":
            nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
            results.append(torch.zeros(()))
        else:
            gradients = [one.grad for one in model.parameters()]
            results.append(nn.utils.get_total_norm(gradients, foreach=foreach))
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, results[-1], foreach=foreach)
    torch.testing.assert_close(*results, rtol=1e-5, atol=0.0)
    assert twins[2].stats().fetched == 0
    assert_equal(twins, rtol=1e-5, atol=1e-9)


def test_grad_scaler_skips_a_step_with_infinity_and_changes_nothing() -> None:
    def run(offloads: bool) -> tuple[Gpt, list[float]]:
        model = make_gpt()
        optimizer = AdamW(model.parameters(), lr=1e-2, offload_gradients=offloads)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        scales = []
        for seed in range(6):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            loss = model.loss(seed)
            scaler.scale(loss * float("inf") if seed == 2 else loss).backward()
            assert all_offloaded(model) == offloads
            if seed % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            same = all(map(torch.equal, model.parameters(), before))
            assert same == (seed == 2)
        return model, scales

    (plain, expected), (offloaded, found) = run(False), run(True)
    assert found == expected
    for one, other in zip(offloaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_grad_scaler_with_gradients_in_both_places(twins: Twins) -> None:
    _, offloaded, _ = twins
    here = nn.Parameter(torch.ones(3, device="cuda"))
    here.grad = torch.full_like(here, 2.0)
    optimizer = torch.optim.SGD([*offloaded.parameters(), here], lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    scaler.scale(torch.ones((), device="cuda"))
    norm = offloaded.embedding.weight.grad.norm().item()
    scaler.unscale_(optimizer)
    assert here.grad.tolist() == [1.0] * 3
    assert offloaded.embedding.weight.grad.norm().item() == pytest.approx(norm / 2)


def test_a_norm_too_large_for_its_type_is_not_infinity() -> None:
    parameter = nn.Parameter(torch.zeros(4, device="cuda"))
    with offload_gradients([parameter], anomalies="raise") as handle:
        parameter.backward(torch.full((4,), 1e38, device="cuda"))
        assert parameter.grad.norm().item() == float("inf")
        handle.check()
        assert not torch.isinf(parameter.grad).any()


# ---- what autograd may do ----------------------------------------------------------------------


def test_tied_weights_have_one_gradient(twins: Twins) -> None:
    plain, offloaded, handle = twins
    assert offloaded.head.weight is offloaded.embedding.weight
    assert handle.stats().left == len(list(plain.parameters()))


def test_frozen_weights_have_none() -> None:
    model = make_gpt()
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    with offload_gradients(model.parameters()) as handle:
        free = [one for one in model.parameters() if one.requires_grad]
        assert handle.stats().host_bytes == sum(one.nbytes for one in free)
        backward(model)
        assert handle.stats().left == len(free)
        assert all(one.grad is None for one in model.blocks.parameters())


def test_parameters_without_a_gradient_this_step(twins: Twins) -> None:
    plain, offloaded, _ = twins
    for model in (plain, offloaded):
        model.zero_grad()
        model.embedding(torch.tensor([1], device="cuda")).sum().backward()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        optimizer.step()
        assert len(optimizer.state) == 1
    assert_equal(twins)
    assert torch.equal(plain.embedding.weight, offloaded.embedding.weight)


def test_requires_grad_that_changes() -> None:
    plain, offloaded = make_gpt(), make_gpt()
    optimizers = []
    for model, offloads in ((plain, False), (offloaded, True)):
        model.embedding.weight.requires_grad_(False)
        optimizers.append(AdamW(model.parameters(), lr=1e-2, offload_gradients=offloads))
    for step in range(6):
        for model, optimizer in zip((plain, offloaded), optimizers, strict=True):
            model.embedding.weight.requires_grad_(step >= 2)
            model.blocks[0].linear1.weight.requires_grad_(step % 2 == 0)
            backward(model, seed=step)
            optimizer.step()
            if step == 5:
                assert is_offloaded(offloaded.embedding.weight.grad) == (model is offloaded)
            optimizer.zero_grad()
    assert all(map(torch.equal, plain.parameters(), offloaded.parameters()))


def test_checkpointed_activations() -> None:
    plain, offloaded = make_gpt(), make_gpt()
    with offload_gradients(offloaded.parameters()) as handle:
        for model in (plain, offloaded):
            model.mode = "checkpoint"
            backward(model)
            backward(model, seed=1)
        assert all_offloaded(offloaded)
        assert_equal((plain, offloaded, handle))


def test_a_compiled_forward() -> None:
    plain, offloaded = make_gpt(), make_gpt()
    with offload_gradients(offloaded.parameters()) as handle:
        for model in (plain, offloaded):
            compiled = torch.compile(model, backend="aot_eager")
            for seed in range(2):
                tokens = torch.randint(
                    0, 61, (4, 8), generator=torch.Generator().manual_seed(seed)
                ).cuda()
                compiled(tokens).square().mean().backward()
        assert all_offloaded(offloaded)
        assert_equal((plain, offloaded, handle), atol=1e-6)


def test_gradients_that_are_expanded_or_not_contiguous() -> None:
    for make in (
        lambda p: p.sum(),
        lambda p: p.t().sum(0).square().sum(),
        lambda p: (p[:, ::2] * 2).sum(),
        lambda p: p.expand(3, *p.shape).sum(),
    ):
        gradients = []
        for offloads in (False, True):
            parameter = nn.Parameter(torch.arange(24.0, device="cuda").view(4, 6))
            handle = offload_gradients([parameter] if offloads else [])
            for _ in range(2):
                make(parameter).backward()
            assert is_offloaded(parameter.grad) == offloads
            gradients.append(parameter.grad.clone())
            handle.remove()
        assert torch.equal(*gradients)
        assert gradients[0].stride() == gradients[1].stride()


@pytest.mark.parametrize(
    "shape_of",
    [
        lambda: torch.ones((), device="cuda"),
        lambda: torch.ones(1, device="cuda"),
        lambda: torch.ones(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last),
        lambda: torch.ones(6, 4, device="cuda").t(),
        lambda: torch.ones(6, 4, device="cuda")[:, :3],
        lambda: torch.ones(0, 4, device="cuda"),
        lambda: torch.ones(5, dtype=torch.float64, device="cuda"),
    ],
    ids=["scalar", "one", "channels_last", "transposed", "gaps", "empty", "double"],
)
def test_parameters_of_any_layout(shape_of: Callable[[], torch.Tensor]) -> None:
    parameter = nn.Parameter(shape_of())
    with offload_gradients([parameter]):
        for _ in range(2):
            (parameter * parameter).sum().backward()
        assert is_offloaded(parameter.grad) == (parameter.numel() > 0)
        assert torch.equal(parameter.grad.clone(), torch.full_like(parameter, 4.0))


def test_backward_twice_through_one_graph(twins: Twins) -> None:
    for model in twins[:2]:
        loss = model.loss(3)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal(twins)


def test_create_graph_keeps_gradients_on_the_device() -> None:
    gradients = []
    for offloads in (False, True):
        weight = nn.Parameter(torch.tensor([1.0, 2.0], device="cuda"))
        handle = offload_gradients([weight] if offloads else [])
        if offloads:
            (weight**2).sum().backward()
            assert is_offloaded(weight.grad)
        else:
            weight.grad = (2 * weight).detach()
        (weight**3).sum().backward(create_graph=True)
        assert not is_offloaded(weight.grad)
        penalty = weight.grad.square().sum()
        weight.grad = None
        penalty.backward()
        assert is_offloaded(weight.grad) == offloads
        gradients.append(weight.grad.clone())
        handle.remove()
    assert torch.equal(*gradients)


def test_autograd_grad_is_not_touched(twins: Twins) -> None:
    plain, offloaded, handle = twins
    before = handle.stats()
    found, expected = (
        torch.autograd.grad(model.loss(4), list(model.parameters())) for model in (offloaded, plain)
    )
    assert all(map(torch.equal, found, expected))
    assert not any(map(is_offloaded, found))
    assert handle.stats() == before


@pytest.mark.parametrize("backs_up", [False, True])
def test_an_exception_in_backward(twins: Twins, backs_up: bool) -> None:
    plain, offloaded, _ = twins

    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError

    for model in (plain, offloaded):
        if backs_up:
            model.zero_grad()
        handle = model.blocks[0].norm1.weight.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            backward(model, seed=1)
        handle.remove()
    assert_equal((plain, offloaded, twins[2]))
    backward(plain, offloaded, seed=2)
    assert all_offloaded(offloaded)
    assert_equal((plain, offloaded, twins[2]))


# ---- what programs do with gradients -----------------------------------------------------------


def halve(parameter: torch.Tensor) -> None:
    parameter.grad.mul_(0.5)  # Not returned: the next hook would get it.


def test_hooks_of_the_user() -> None:
    seen: dict[bool, list[float]] = {False: [], True: []}
    models = []
    for offloads in (False, True):
        model = make_gpt()
        weight = model.blocks[0].linear1.weight
        bias = model.blocks[0].linear1.bias
        weight.register_hook(lambda gradient: gradient * 2)
        weight.register_post_accumulate_grad_hook(halve)
        handle = offload_gradients(model.parameters() if offloads else [])
        # After ours: they see the placeholder.
        weight.register_post_accumulate_grad_hook(
            lambda one, offloads=offloads: seen[offloads].append(one.grad.norm().item())
        )
        bias.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        backward(model)
        backward(model, seed=1)
        models.append((model, handle))
    assert seen[True] == pytest.approx(seen[False])
    (plain, _), (offloaded, handle) = models
    assert_equal((plain, offloaded, handle), rtol=1e-6, atol=1e-8)


def test_a_gradient_that_the_user_assigns(twins: Twins) -> None:
    plain, offloaded, _ = twins
    for model in (plain, offloaded):
        mine = torch.ones_like(model.head.bias)
        model.head.bias.grad = mine
        backward(model, seed=1)
        # It is the user's, who may write to it once backward is over.
        mine.zero_()
    torch.cuda.synchronize()
    assert is_offloaded(offloaded.head.bias.grad)
    backward(make_gpt())
    expected = make_gpt()
    expected.head.bias.grad = torch.ones_like(expected.head.bias)
    backward(expected, seed=1)
    assert torch.equal(offloaded.head.bias.grad.clone(), expected.head.bias.grad)


def test_a_gradient_of_another_parameter_is_assigned(twins: Twins) -> None:
    _, offloaded, _ = twins
    first, second = offloaded.blocks[0].linear1, offloaded.blocks[1].linear1
    first.weight.grad = second.weight.grad
    assert torch.equal(first.weight.grad.clone(), second.weight.grad.clone())


def test_plus_equals(twins: Twins) -> None:
    for model in twins[:2]:
        for parameter in model.parameters():
            parameter.grad += parameter.detach() * 0.5
            parameter.grad *= 2
            parameter.grad /= 3
    assert all_offloaded(twins[1])
    assert_equal(twins, rtol=1e-5, atol=1e-7)


def test_an_ema_of_gradients(twins: Twins) -> None:
    averages = []
    for model in twins[:2]:
        average = [torch.zeros_like(one) for one in model.parameters()]
        for seed in range(3):
            model.zero_grad()
            backward(model, seed=seed)
            gradients = [one.grad for one in model.parameters()]
            for kept, gradient in zip(average, gradients, strict=True):
                kept.mul_(0.9).add_(gradient, alpha=0.1)
            torch._foreach_lerp_(average, gradients, 0.5)
        averages.append(average)
    for one, other in zip(*averages, strict=True):
        torch.testing.assert_close(one, other)


def test_a_kept_gradient_is_that_of_its_step(twins: Twins) -> None:
    kept = [[one.grad for one in model.parameters()] for model in twins[:2]]
    for model in twins[:2]:
        model.zero_grad()
        backward(model, seed=1)
        backward(model, seed=2)
    for found, expected in zip(kept[1], kept[0], strict=True):
        assert torch.equal(found.clone(), expected)
    assert_equal(twins)


def test_copies_of_the_model(twins: Twins) -> None:
    _, offloaded, _ = twins
    twin = copy.deepcopy(offloaded)
    assert all(one.grad is None for one in twin.parameters())
    file = io.BytesIO()
    torch.save(offloaded, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    backward(loaded, twin)
    assert_gradients_equal(loaded.parameters(), twin.parameters())
    assert not any(is_offloaded(one.grad) for one in loaded.parameters())


def test_copies_of_gradients(twins: Twins) -> None:
    gradients = [[one.grad for one in model.parameters()] for model in twins[:2]]
    for copied in (copy.deepcopy(gradients[1]), pickle.loads(pickle.dumps(gradients[1]))):
        assert not any(map(is_offloaded, copied))
        assert all(map(torch.equal, copied, gradients[0]))


def test_copies_of_the_optimizer_offload_too() -> None:
    model = make_gpt()
    optimizer = AdamW(model.parameters(), lr=1e-2, offload_gradients=True)
    backward(model)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    optimizer.step()
    optimizer.zero_grad()
    backward(twin)
    assert all_offloaded(twin)
    twin_optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    twin_optimizer.load_state_dict(optimizer.state_dict())
    assert twin_optimizer.gradients is not None


@pytest.mark.parametrize("change", ["double", "bfloat16", "cpu"])
def test_a_model_that_changes_its_type_or_device(twins: Twins, change: str) -> None:
    for model in twins[:2]:
        getattr(model, change)()
    assert_equal(twins)
    for model in twins[:2]:
        model.cuda().float()
        backward(model, seed=1)
    assert_equal(twins)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("foreach", [True, False])
def test_torchs_optimizers_read_them(
    twins: Twins, optimizer: type[torch.optim.Optimizer], foreach: bool
) -> None:
    for model in twins[:2]:
        optimizer(model.parameters(), lr=1e-2, foreach=foreach).step()
    for one, other in zip(twins[1].parameters(), twins[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_leaves_the_gradient_to_be_read(twins: Twins) -> None:
    plain, offloaded, _ = twins
    optimizers = [AdamW(model.parameters(), lr=1e-2) for model in (plain, offloaded)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
        assert_equal(twins)
        # Without zero_grad() it goes on to add up.
        backward(plain, offloaded, seed=1)
        assert_equal(twins, rtol=1e-4, atol=1e-6)


def test_a_step_takes_what_became_of_gradients_on_the_device(twins: Twins) -> None:
    for model in twins[:2]:
        for parameter in model.parameters():
            parameter.grad.view(-1).mul_(0.5)
        AdamW(model.parameters(), lr=1e-2).step()
    assert all(map(torch.equal, twins[0].parameters(), twins[1].parameters()))


def test_a_side_stream(twins: Twins) -> None:
    plain, offloaded, _ = twins
    for model in (plain, offloaded):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model.zero_grad()
            backward(model, seed=1)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            AdamW(model.parameters(), lr=1e-2).step()
        torch.cuda.current_stream().wait_stream(side)
    for one, other in zip(offloaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_leave_stays() -> None:
    table = nn.Embedding(7, 3, sparse=True).cuda()
    phase = nn.Parameter(torch.ones(3, dtype=torch.complex64, device="cuda"))
    host = nn.Parameter(torch.ones(3))
    with offload_gradients([table.weight, phase, host]) as handle:
        table(torch.tensor([1], device="cuda")).sum().backward()
        (phase.abs().sum().cpu() + host.sum()).backward()
        assert table.weight.grad.is_sparse
        assert not any(is_offloaded(one.grad) for one in (table.weight, phase, host))
        assert handle.stats().left == 0


# ---- memory that others may write to -----------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What streams were made to wait for."""
    found: list[object] = []
    wait = TransferTicket.stream_wait

    def stream_wait(ticket: TransferTicket, stream: Any = None) -> None:
        found.append(ticket)
        wait(ticket, stream)

    monkeypatch.setattr(TransferTicket, "stream_wait", stream_wait)
    return found


def test_backward_waits_for_no_copy(waits: list[object]) -> None:
    model = make_gpt()
    conv = nn.Conv2d(1, 2, 3).cuda()
    with offload_gradients([*model.parameters(), *conv.parameters()]) as handle:
        for mode in ("plain", "plain", "checkpoint"):
            model.mode = mode
            backward(model)
            conv(torch.ones(1, 1, 5, 5, device="cuda")).sum().backward()
        assert handle.stats().left == 3 * (2 + len(list(model.parameters())))
    assert not waits


@pytest.mark.parametrize("micro_step", [0, 1])
@pytest.mark.parametrize("holds", ["tensor", "view", "base", "alias", "argument", "grad"])
def test_what_a_program_writes_to_a_gradient_that_it_holds(
    waits: list[object], micro_step: int, holds: str
) -> None:
    layer = nn.Linear(300, 300, bias=False).cuda()
    weight = layer.weight
    value = torch.ones(2, 300, device="cuda")
    kept: list[torch.Tensor] = []
    take: dict[str, Callable[[torch.Tensor], object]] = {
        "tensor": kept.append,
        "view": lambda gradient: kept.append(gradient.view(-1)),
        "base": lambda gradient: kept.append(gradient._base),
        "alias": lambda gradient: kept.append(gradient.detach()),
    }
    with offload_gradients([weight]):
        for _ in range(micro_step):
            layer(value).sum().backward()
        assert not waits
        if holds == "argument":
            kept.append(torch.full_like(weight, 2.0))
            weight.backward(kept[0])
        elif holds == "grad" and micro_step == 0:
            kept.append(torch.zeros(90_000, device="cuda"))
            weight.grad = kept[0].view(300, 300)
            layer(value).sum().backward()
        elif holds != "grad":
            hook = weight.register_hook(lambda gradient: take[holds](gradient) and None)
            layer(value).sum().backward()
            hook.remove()
        for tensor in kept:
            tensor.fill_(77.0)
        torch.cuda.synchronize()
        expected = 2.0 * micro_step + 2.0 * bool(kept)
        assert torch.equal(weight.grad.cpu(), torch.full((300, 300), expected))


@pytest.mark.parametrize("how", ["clamp_", "another micro-step", "another step", "a side stream"])
def test_memory_that_a_fetch_still_reads_is_not_written_to(how: str) -> None:
    parameter = nn.Parameter(torch.ones(5000, device="cuda"))
    with offload_gradients([parameter]):
        (parameter * 3).sum().backward()
        (parameter * 4).sum().backward()
        fetched = parameter.grad.clone()  # Its copy has not run yet on a late schedule.
        if how == "clamp_":
            parameter.grad.clamp_(max=1.0)
        elif how == "another micro-step":
            (parameter * 5).sum().backward()
            parameter.grad._host.wait()
        elif how == "another step":
            parameter.grad = None
            (parameter * 5).sum().backward()
            parameter.grad._host.wait()
        else:
            parameter.grad = None
            with torch.cuda.stream(torch.cuda.Stream()):
                parameter.backward(torch.full((5000,), 9.0, device="cuda"))
                parameter.grad._host.wait()
        assert torch.equal(fetched.cpu(), torch.full((5000,), 7.0))

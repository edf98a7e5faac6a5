"""What autograd may do with parameters whose gradients leave: what it would do without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradient_models import (
    Twins,
    all_offloaded,
    assert_twins_equal,
    backward,
    is_offloaded,
    make_gpt,
)
from torch import nn

from spillover.optim import AdamW, offload_gradients


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
    assert_twins_equal(twins)
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
        assert_twins_equal((plain, offloaded, handle))


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
        assert_twins_equal((plain, offloaded, handle), atol=1e-6)


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
    assert_twins_equal(twins)


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
    assert_twins_equal((plain, offloaded, twins[2]))
    backward(plain, offloaded, seed=2)
    assert all_offloaded(offloaded)
    assert_twins_equal((plain, offloaded, twins[2]))

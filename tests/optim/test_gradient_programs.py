"""What programs do with gradients, when those are placeholders."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from gradient_models import (
    Twins,
    all_offloaded,
    assert_gradients_equal,
    assert_twins_equal,
    backward,
    is_offloaded,
    make_gpt,
)
from torch import nn

from spillover.optim import AdamW, offload_gradients


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
    assert_twins_equal((plain, offloaded, handle), rtol=1e-6, atol=1e-8)


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
    assert_twins_equal(twins, rtol=1e-5, atol=1e-7)


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
    assert_twins_equal(twins)


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
    assert_twins_equal(twins)
    for model in twins[:2]:
        model.cuda().float()
        backward(model, seed=1)
    assert_twins_equal(twins)


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
        assert_twins_equal(twins)
        # Without zero_grad() it goes on to add up.
        backward(plain, offloaded, seed=1)
        assert_twins_equal(twins, rtol=1e-4, atol=1e-6)


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

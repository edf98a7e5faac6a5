"""Weights and gradients that more than one has a part in while updates are under way.

The worker updates only while somebody waits (``lazy_worker``), so who does not wait fails.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from overlap_models import LazyWorker, set_ones
from torch import nn

from spillover.optim import SGD, _awaited, _overlap

pytestmark = pytest.mark.usefixtures("lazy_worker")


def test_two_optimizers_of_the_same_weights() -> None:
    model = nn.Linear(8, 8).cuda()
    one, other = (SGD(model.parameters(), lr=1.0, overlap=model) for _ in range(2))
    before = model.weight.detach().clone()
    set_ones(model)
    one.step()
    other.step()
    one.synchronize()
    assert torch.equal(model.weight, before - 1 - 1)


def test_a_model_that_nobody_has_any_more_is_freed(lazy_worker: LazyWorker) -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    set_ones(model)
    optimizer.step()
    lazy_worker.open()
    pending = optimizer._overlap.pending
    pending._wait(functools.partial(getattr, pending, "_is_over"), _overlap._ALL)
    weight = weakref.ref(model.weight)
    del model, optimizer, pending
    gc.collect()
    assert weight() is None
    assert not _awaited.is_any_awaited()


# ---- gradients ---------------------------------------------------------------------------------


def test_a_backward_whose_forward_came_before_the_step() -> None:
    """Autograd adds to the gradients that the step is still to read, and in C++."""

    def run(overlaps: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(64, 64).cuda()
        options = {"overlap": model} if overlaps else {}
        optimizer = SGD(model.parameters(), lr=1.0, **options)
        losses = [scale * model(torch.ones(2, 64, device="cuda")).sum() for scale in (1, 3)]
        for loss in losses:
            loss.backward()
            optimizer.step()
        optimizer.synchronize()
        return [each.detach().clone() for p in model.parameters() for each in (p, p.grad)]

    assert all(map(torch.equal, run(True), run(False)))


def test_a_backward_does_not_wait_for_gradients_that_it_does_not_add_to(
    lazy_worker: LazyWorker,
) -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    loss = model(torch.ones(2, 64, device="cuda")).sum()
    set_ones(model)
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    assert lazy_worker.batches == 0
    optimizer.synchronize()
    assert not any(each._backward_hooks for each in model.parameters())


def of_another_parameter(model: nn.Module) -> list[Any]:
    """Whose backward adds to it."""
    other = nn.Parameter(torch.zeros(64, 64, device="cuda"))
    other.grad = model.weight.grad
    return [other, lambda: other.sum().backward()]


def of_two_weights(model: nn.Module) -> list[Any]:
    model.again.grad = model.weight.grad
    return []


def of_an_array(model: nn.Module) -> list[Any]:
    """As cupy would have it."""
    return [model.weight.grad.__dlpack__()]


def a_weight(model: nn.Module) -> list[Any]:
    model.weight.grad = model.again
    return []


@pytest.mark.parametrize(
    "share",
    [of_another_parameter, of_two_weights, of_an_array, a_weight],
    ids=lambda one: one.__name__,
)
def test_gradients_that_somebody_else_has_too(share: Callable[[nn.Module], list[Any]]) -> None:
    def run(overlaps: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(64, 64).cuda()
        model.again = nn.Parameter(torch.ones(64, 64, device="cuda"))
        options = {"overlap": model} if overlaps else {}
        optimizer = SGD(model.parameters(), lr=1.0, **options)
        for _ in range(2):
            set_ones(model)
            kept = share(model)
            optimizer.step()
            for each in kept:
                if callable(each):
                    each()
        optimizer.synchronize()
        return [each.detach().clone() for each in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))

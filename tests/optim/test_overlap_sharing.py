"""Weights and gradients that more than one has a part in while updates are under way.

The worker updates only while somebody waits (``lazy_worker``), so who does not wait fails.
"""

from __future__ import annotations

import functools
import gc
import weakref

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

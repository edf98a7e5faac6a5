"""Updates under the next forward: the same to the last bit as updates within ``step()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair
from overlap_models import LazyWorker, Net, assert_same_run, loss_of, train

from spillover.optim import AdamW, _awaited

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offloads", [False, True])
def test_runs_are_the_same(
    pair: Pair, dtype: torch.dtype, offloads: bool, lazy_worker: LazyWorker
) -> None:
    options: dict[str, Any] = {k: v for k, v in pair.options.items() if k != "lr"}
    options |= {"make": pair.ours, "dtype": dtype, "offload_gradients": offloads}
    for set_to_none, micro_steps in ((True, 1), (False, 2)):
        options |= {"set_to_none": set_to_none, "micro_steps": micro_steps}
        assert_same_run(train(overlaps=True, **options), train(overlaps=False, **options))


def awaited(model: torch.nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if _awaited.is_awaited(weight)}


def test_a_layer_waits_only_for_what_comes_before_it(lazy_worker: LazyWorker) -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), overlap=model)
    trained = {name for name, _ in model.named_parameters() if "unused" not in name}
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert awaited(model) == trained
        assert lazy_worker.batches == 0
        model.table(torch.tensor([1], device="cuda"))
        assert awaited(model) == trained - {"table.weight"}
        assert 1 <= lazy_worker.batches <= 2
        before = lazy_worker.batches
        model.attention(*[torch.ones(1, 2, 32, device="cuda")] * 3)
        left = awaited(model)
        assert {name for name in trained if not name.startswith(("table", "attention"))} == left
        model.layers[2](torch.ones(32, device="cuda"))
        assert "scale" in awaited(model)
        assert lazy_worker.batches > before
        optimizer.synchronize()
        assert not awaited(model)
        lazy_worker.batches = 0

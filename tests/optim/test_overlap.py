"""Updates under the next forward: the same to the last bit as updates within ``step()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair
from overlap_models import LazyWorker, Net, assert_same_run, loss_of, train

import spillover
from spillover import ConfigError
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


@pytest.mark.parametrize("offloads", [False, True])
def test_a_grad_scaler_and_closures(offloads: bool, lazy_worker: LazyWorker) -> None:
    def run(overlaps: bool) -> list[torch.Tensor]:
        model = Net()
        options: dict[str, Any] = {"overlap": model} if overlaps else {}
        optimizer = AdamW(model.parameters(), lr=0.01, offload_gradients=offloads, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        for step in range(4):
            loss = loss_of(model, step)
            scaler.scale(loss * float("inf") if step == 2 else loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 9)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).detach() for _ in range(3)]
        optimizer.synchronize()
        return [*losses, *(each.detach().clone() for each in model.parameters())]

    assert all(map(torch.equal, run(True), run(False)))


def test_waits_are_counted_by_cause(lazy_worker: LazyWorker) -> None:
    def counts() -> dict[str, int]:
        return {one.what: one.count for one in spillover.stats().stalls if one.part == "optimizer"}

    model = Net()
    optimizer = AdamW(model.parameters(), overlap=model)
    loss_of(model, 0).backward()
    before = counts()
    optimizer.step()
    model.table(torch.tensor([1], device="cuda"))
    model.scale.sum()
    optimizer.synchronize()
    after = counts()
    for what in (
        "forward: a weight's update",
        "something else that uses a weight: its update",
        "all updates of the last step",
    ):
        assert after[what] > before.get(what, 0)


def test_wrong_modules() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    for wrong in (True, [weight], lambda: None):
        with pytest.raises(ConfigError, match="overlap must be the module"):
            AdamW([weight], overlap=wrong)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    model = torch.nn.Linear(2, 2)
    assert type(AdamW(model.parameters(), overlap=model)) is torch.optim.AdamW

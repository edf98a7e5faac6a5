"""Updates under the next forward: the same to the last bit as updates within ``step()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair
from overlap_models import assert_same_run, train

from spillover.optim import _staging


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights pass in several batches."""
    monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", 8 << 10)
    monkeypatch.setattr(_staging, "_stagings", {})


@pytest.mark.parametrize("pair", CLASSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offloads", [False, True])
def test_runs_are_the_same(pair: Pair, dtype: torch.dtype, offloads: bool) -> None:
    options: dict[str, Any] = {k: v for k, v in pair.options.items() if k != "lr"}
    options |= {"make": pair.ours, "dtype": dtype, "offload_gradients": offloads}
    for set_to_none, micro_steps in ((True, 1), (False, 2)):
        options |= {"set_to_none": set_to_none, "micro_steps": micro_steps}
        assert_same_run(train(overlaps=True, **options), train(overlaps=False, **options))

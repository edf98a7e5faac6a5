"""Gradients of whole model families, bit for bit those of the plain run, on every schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
from activation_contexts import check_equal
from activation_networks import NETWORKS, check_network, step_of


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_bitwise_equal(name: str, tier: str, tmp_path: Path) -> None:
    check_network(name, tmp_path if tier == "disk" else None)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_bitwise_equal_with_the_default_budgets(name: str) -> None:
    step = step_of(name)
    check_equal(step, steps=2, model=step.model)  # type: ignore[attr-defined]


def test_running_statistics_without_the_model() -> None:
    """Batch normalization saves them, and the next step changes them in place."""
    check_network("unet", model=None)

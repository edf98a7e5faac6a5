"""Fixtures of the tests of offloading hooks."""

from __future__ import annotations

from typing import Any

import pytest

#: What comes back when: before it is asked for, in part, or not before.
BUDGETS: dict[str, dict[str, Any]] = {
    "ample": {},
    "tight": {"in_flight_max": "16KiB", "prefetch": "16KiB"},
    "on_demand": {"in_flight_max": "16KiB", "prefetch": 0},
}


@pytest.fixture(params=["ample", "tight", pytest.param("on_demand", marks=pytest.mark.soak)])
def budgets(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of activation offloading: how much may be under way each way."""
    return BUDGETS[request.param]

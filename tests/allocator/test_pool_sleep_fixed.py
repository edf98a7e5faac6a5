"""Without virtual memory nothing can sleep, which is an error that says so."""

from __future__ import annotations

import pytest

import spillover
from spillover import _core, allocator


@pytest.mark.fixed_memory
def test_memory_at_fixed_addresses_cannot_sleep(pool: _core.Pool) -> None:
    with allocator.tag("weights"):
        pool.alloc(4 << 20)
    with pytest.raises(spillover.ConfigError, match="no virtual memory"):
        allocator.sleep("weights")
    assert allocator.wake() == 0
    pool.check_invariants()

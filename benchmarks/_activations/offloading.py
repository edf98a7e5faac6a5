"""How this benchmark calls Spillover."""

from __future__ import annotations

from typing import Any


def offload_activations(
    *,
    tier: str = "host",
    directory: str | None = None,
    keep_on_device: int | None = None,
    in_flight_max: int | None = None,
    prefetch: int | None = None,
    min_bytes: int | None = None,
    model: Any = None,
) -> Any:
    """``spillover.offload_activations``; None leaves an option at its default."""
    import spillover

    del keep_on_device  # Nothing is kept.
    options = {
        "directory": directory,
        "inflight": in_flight_max,
        "prefetch": prefetch,
        "min_bytes": min_bytes,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return spillover.offload_activations(tier=tier, model=model, **given)

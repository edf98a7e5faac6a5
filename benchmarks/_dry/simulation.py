"""What benchmarks share that time a step of a Llama shape in a dry run under the virtual clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from benchmarks._dry.large import SHAPES

if TYPE_CHECKING:
    import torch

    from benchmarks._dry import models


def run_module(name: str, *arguments: str, host_limit: str = "512GiB") -> dict[str, Any]:
    """What a module prints last, as JSON; of a process that fails, ``{"error": its reason}``.

    ``host_limit`` is the simulated machine's memory: what has no bytes takes none here.
    """
    result = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SPILLOVER_HOST_LIMIT": host_limit},
    )
    if result.returncode != 0:
        return {"error": (result.stderr.strip().splitlines() or ["it failed"])[-1]}
    return dict(json.loads(result.stdout.splitlines()[-1]))


def reason_of(result: dict[str, Any]) -> str:
    """Why a process of ``run_module`` has no result."""
    return f"{result['error']} (make bench-peers installs peers)"


def make_llama(shape: str, dtype: torch.dtype, *, checkpoint: bool = False) -> models.LanguageModel:
    """The model of this shape on the device, its weights in ``dtype``."""
    from benchmarks._dry import models

    return models.make_llama(SHAPES[shape], dtype, checkpoint=checkpoint)


def busy_ns(resource: str = "compute") -> int:
    """How long a resource of the device has worked. Waits, in virtual time, for its work."""
    from spillover import emulator

    return emulator.clock_report().busy_ns(resource)

"""What the programs of this folder share. Importing it gives the process its emulated devices.

Each program is an ordinary script, ``python tests/stacks/programs/NAME.py``, that imports this
module before torch and offers ``run()``. ``python tests/stacks/programs NAME...`` runs several in
one process. ``SPILLOVER_EMULATOR_*`` variables choose other devices than the defaults below.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spillover import emulator

if TYPE_CHECKING:
    from torch import Tensor

#: The exit code of a program whose packages are not installed; what automake's tests use.
SKIPPED = 77

# Nothing is downloaded, and nothing is sent.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
)

# The models are so small that more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if not emulator.is_enabled():
    _options = emulator.Options.from_environment(defaults={"vram": "2GiB", "hazards": "raise"})
    emulator.enable(**dataclasses.asdict(_options))


def missing(needs: Sequence[str]) -> str | None:
    """Say which of the packages are not installed."""
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def check(run: Callable[[], None]) -> None:
    """Run a program and fail if the checker reported anything."""
    import torch

    emulator.clear_hazards()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    torch.cuda.synchronize()
    found = emulator.hazards()
    assert not found, "hazards were reported:\n" + "\n".join(found)


def main(run: Callable[[], None], *, needs: Sequence[str] = ()) -> None:
    """Run one program as a script."""
    reason = missing(needs)
    if reason is not None:
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)
    check(run)
    print("ok")


def assert_learns(losses: Sequence[float]) -> None:
    """The second half of the losses lies below the first."""
    half = len(losses) // 2
    assert sum(losses[-half:]) < sum(losses[:half]), losses


def assert_close(
    actual: Sequence[float], expected: Sequence[float], *, tolerance: float = 1e-5
) -> None:
    """The losses of two runs agree."""
    assert len(actual) == len(expected)
    difference = max(abs(a - e) for a, e in zip(actual, expected, strict=True))
    assert difference <= tolerance, f"{difference} apart: {actual} and {expected}"


def assert_equal_tensors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Tensors agree bit for bit, wherever they are."""
    import torch

    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.cpu(), e.cpu()), f"tensor {index} differs by {(a.cpu() - e.cpu())}"

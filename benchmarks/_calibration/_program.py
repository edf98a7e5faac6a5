"""``python -m benchmarks._calibration._program CASE``: a training step, run under the clock.

The program is run dry, at the published run's full size, on the case's card: the time is that of
the operators that torch really calls, with their launches, the batch's copy and the optimizer. It
prints the step's nanoseconds. What it has of the published runs and what not is said in
``docs/cost-model.md``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks import _calibration
from spillover import emulator

#: More than any card has: a published run that fits its card by means that are not here still runs.
_VRAM = "1TiB"
_STEPS = 2


def main() -> None:
    """Run the case that is named and print its step's time."""
    case = next(case for case in _calibration.cases() if case.name == sys.argv[1])
    emulator.enable(dry=True, vram=_VRAM, hazards="off", profile=case.card)
    import torch

    torch.manual_seed(0)
    step = _step_of(case.kind, case.model)
    ends = []
    for _ in range(_STEPS):
        step()
        torch.cuda.synchronize()
        ends.append(emulator.now_ns())
    print(json.dumps({"step_ns": ends[-1] - ends[-2]}))


def _step_of(kind: str, model: dict[str, Any]) -> Any:
    # torch is imported after the emulator is enabled, so these are as well.
    if kind == "resnet50":
        from benchmarks._calibration import _resnet_program

        return _resnet_program.new_step(model)
    from benchmarks._calibration import _transformer, _transformer_program

    return _transformer_program.new_step(_transformer.Transformer(**model))


if __name__ == "__main__":
    main()

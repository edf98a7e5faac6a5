"""Whether training with our optimizers is training with torch's.

In a process of its own, on the machine's device where there is one, else on an emulated one.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks import _harness


def measure(*, quick: bool) -> tuple[dict[str, float], list[str]]:
    """Metrics, and what they are."""
    arguments = ("1", "1") if quick else ("4", "5")
    command = [sys.executable, "-m", __name__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    metrics: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return metrics, [
        "equality: a GPT in bfloat16, two micro-steps a step, clipped, cosine schedule; gradients "
        "leave in backward and add up on the host. Errors are ||ours - float64|| / ||float64||: "
        "one_step, of the worst tensor of masters and moments, each tenth step from the same "
        "state; 200_steps, of all masters together; the worst of AdamW and, unless quick, Adam, "
        "SGD and Adagrad",
        "equality_bitwise: 1 where weights and state of that way are those of the first one",
        "closed_loop_distance: ||weights - foreach's|| / ||foreach's|| after 200 steps in which "
        "each run makes its own gradients (float32 weights, bfloat16 autocast), median of "
        f"{arguments[1]} seeds. torch_fused on an emulated device is the CPU's kernel, which "
        "rounds as foreach does; torch_fused_cuda has the arithmetic of that for CUDA",
    ]


def _main(classes: int, seeds: int) -> None:
    from spillover import _core, emulator

    if not _core.driver_available():
        emulator.enable(vram="1GiB", schedule="eager", poison=False, hazards="off")
    from benchmarks._optimizer import training

    _harness.end_measurement({**training.recorded(classes), **training.distances(seeds)})


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))

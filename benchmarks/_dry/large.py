"""Models that no machine without a large GPU could run: dry, in a process of their own.

Printed as one JSON object: seconds, resident memory, and the report of the dry run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

#: Width, heads, blocks, vocabulary; the units are wider than Llama's, so there are fewer blocks.
SHAPES = {
    "quick": (1024, 8, 2, 4000),
    "1b": (2048, 16, 16, 32000),
    "7b": (4096, 32, 27, 32000),
    "70b": (8192, 64, 69, 32000),
}


def run_large(
    shape: str, *, low_rank: bool = False, checkpoint: bool = False, vram: str = "1TiB"
) -> dict[str, Any]:
    """Two steps of AdamW on a model of this shape, 2,048 tokens each."""
    options = {"shape": shape, "low_rank": low_rank, "checkpoint": checkpoint, "vram": vram}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._dry.large", json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the dry run of {options} failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _train(shape: str, low_rank: bool, checkpoint: bool) -> int:
    import torch
    import torch.nn.functional as F

    from benchmarks._dry import models

    vocabulary = SHAPES[shape][3]
    model = models.make_llama(
        SHAPES[shape], torch.bfloat16, checkpoint=checkpoint, low_rank=low_rank
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _ in range(2):
        tokens = torch.randint(0, vocabulary, (1, 2049), device="cuda")
        scores = model(tokens[:, :-1])
        F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return sum(parameter.numel() for parameter in model.parameters())


def _main(shape: str, low_rank: bool, checkpoint: bool, vram: str) -> None:
    start = time.monotonic()
    import spillover.emulator

    spillover.emulator.enable(dry=True, vram=vram)
    import torch

    parameters, failure = 0, ""
    try:
        parameters = _train(shape, low_rank, checkpoint)
    except torch.OutOfMemoryError as error:
        failure = str(error)
    report = spillover.emulator.dry_report()
    print(
        json.dumps(
            {
                "seconds": time.monotonic() - start,
                "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "parameters": parameters,
                "failure": failure,
                "report": asdict(report),
            }
        )
    )


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))

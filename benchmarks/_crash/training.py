"""Trainings with optimizer state on disk that are killed at random instants and started again.

A launcher loads torch and forks a process for each run, so that a kill costs no import. The first
run of a trial is killed; the second resumes and trains to the end. A trial is survived when the
second began at the last commit that the first one was told of, or at the one under way, and ended
with the weights of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 12
_FROZEN_STEPS = 5  # Of the first layer.
_ROOT = Path(__file__).resolve().parents[2]


def train(folder: str, tell: Callable[..., None], tier: str) -> None:
    """Train to the end, from what is committed; ``tell`` hears of commits and of the weights."""
    import torch
    from torch import nn

    from spillover import optim

    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(
        nn.Linear(64, 200), nn.BatchNorm1d(200), nn.GELU(), nn.Dropout(0.2), nn.Linear(200, 8)
    ).to("cuda", torch.bfloat16)
    model[0].requires_grad_(False)
    optimizer = optim.AdamW(
        model.named_parameters(),
        lr=1e-2,
        tier=tier,  # type: ignore[arg-type]
        directory=folder,
        host_budget=100_000 if tier == "auto" else None,
        commit_every=None,
        module=model,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    resumed = optim.resume(folder, optimizer)
    if resumed is not None:
        scheduler.load_state_dict(resumed.extra["scheduler"])
    first = 0 if resumed is None else resumed.step
    tell("begin", first)
    for step in range(first, STEPS):
        # Its state gets places on disk by then.
        model[0].requires_grad_(step >= _FROZEN_STEPS)
        value = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16) * random.random()
        model(value).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 2 or step == STEPS - 1:  # Steps between update the uncommitted slot in place.
            optimizer.commit({"scheduler": scheduler.state_dict()})
            tell("commit", step + 1)
    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), *_tensors(optimizer.state_dict())):
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    tell("end", digest.hexdigest())


def _tensors(state: dict[str, Any]) -> list[Any]:
    entries = (entry for _, entry in sorted(state["state"].items()))
    return [value for entry in entries for value in entry.values()]


def _fork(
    folder: Path, tier: str, delay_s: float | None = None, *, from_step: bool = False
) -> tuple[list[list[Any]], float]:
    """What a run told, and the seconds from its first step to its end.

    It is killed ``delay_s`` after its start, or after its first step begins.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            train(
                str(folder), lambda *what: os.write(writing, f"{json.dumps(what)}\n".encode()), tier
            )
        except BaseException as error:
            os.write(writing, f"{json.dumps(['error', repr(error)])}\n".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.readline() if from_step or delay_s is None else b""
        begin = time.monotonic()
        if delay_s is not None:
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        told += pipe.read()
    duration_s = time.monotonic() - begin
    os.waitpid(child, 0)
    return [json.loads(line) for line in told.splitlines()], duration_s


def _problem(folder: Path, tier: str, told: list[list[Any]], expected: str) -> str | None:
    """What is wrong with the run that follows one that was killed, or None."""
    errors = [what for kind, what in told if kind == "error"]
    if errors:
        return f"the run to be killed ended by itself: {errors[0]}"
    least = max((what for kind, what in told if kind == "commit"), default=0)
    told, _ = _fork(folder, tier)
    found = dict(reversed(told))
    if "error" in found:
        return f"the second run: {found['error']}"
    if not least <= found["begin"] <= least + 2:
        return f"resumed at step {found['begin']}, and {least} was committed"
    return None if found.get("end") == expected else "the second run ended with other weights"


def _launch(root: str, kills: int) -> None:
    from spillover import emulator

    emulator.enable()
    # What a run imports, so that it costs a fork; nothing is called, for a fork copies no threads.
    import torch._dynamo  # noqa: F401

    import spillover.optim  # noqa: F401

    problems: list[str] = []
    in_training = 0
    begin = time.monotonic()
    told, training_s = _fork(Path(root, "disk"), "disk")
    whole_s = time.monotonic() - begin
    expected = dict(told)["end"]
    told, _ = _fork(Path(root, "auto"), "auto")
    assert dict(told)["end"] == expected, "the tiers end with other weights"
    for number in range(kills):
        tier = "auto" if number % 5 == 4 else "disk"
        # Some while the store is made.
        from_step = number % 4 != 3
        delay_s = random.Random(number).uniform(0, training_s if from_step else whole_s)
        folder = Path(root, f"trial{number}")
        told, _ = _fork(folder, tier, delay_s, from_step=from_step)
        kinds = [kind for kind, _ in told]
        in_training += "begin" in kinds and "end" not in kinds
        problem = _problem(folder, tier, told, expected)
        if problem is not None:
            problems.append(f"kill {number} after {delay_s:.3f} s ({tier}): {problem}")
    print(
        json.dumps({"problems": problems, "window_s": whole_s, "in_training": in_training}),
        flush=True,
    )
    os._exit(0)


def kill_many(root: Path | None, kills: int) -> dict[str, Any]:
    """So many trials; ``problems`` are those that were not survived."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        result = subprocess.run(
            [sys.executable, "-m", __name__, folder, str(kills)],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    _launch(sys.argv[1], int(sys.argv[2]))

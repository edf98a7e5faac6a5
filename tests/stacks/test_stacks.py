"""Common stacks run unmodified on the emulated device, without a report of the checker.

The programs are scripts in ``programs/``. Starting a process and importing a stack takes longer
than running it, so those that share a stack share a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spillover.emulator import Options, Schedule

PROGRAMS = Path(__file__).with_name("programs")

#: What fits the time that `make test` has; `make soak` runs every group.
SAMPLED = ("spillover",)
GROUPS = {
    "huggingface": (
        "transformers_generate",
        "transformers_trainer",
        "accelerate_loop",
        "peft_lora",
        "diffusers_unet",
        "host_optimizers",
    ),
    "torch": (
        "torch_allocator",
        "torch_autocast",
        "torch_checkpoint",
        "torch_compile",
        "torch_data_loader",
        "torchvision_boxes",
        "torchvision_resnet",
        "lightning_fit",
    ),
    "spillover": ("spillover_llama", "offloaded_activations"),
    # They fork ranks, which a process that used CUDA before cannot.
    "ddp": ("ddp_gloo",),
    "ddp_optimizers": ("ddp_host_optimizers",),
    "ddp_gradients": ("ddp_offloaded_gradients",),
    "sharded": ("sharded_activations",),
    "fsdp2": ("fsdp2_gloo",),
}
NAMES = sorted(path.stem for path in PROGRAMS.glob("[a-z]*.py"))


def run_programs(names: tuple[str, ...], options: Options, *, ours: bool = False) -> None:
    """Run them in one process; skip, after the others have run, for those that cannot.

    With ``ours``, under ``spillover run``: the allocator is ours, from before the script starts.
    """
    run = ("-m", "spillover", "run") if ours else ()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *run, str(PROGRAMS), *names],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **options.environment()},
        check=False,
    )
    outcomes = [
        json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"program"')
    ]
    failed = [f"{o['program']}:\n{o['reason']}" for o in outcomes if o["outcome"] == "failed"]
    assert not failed, "\n".join(failed) + result.stderr[-4000:]
    assert result.returncode == 0, result.stdout + result.stderr
    assert [o["program"] for o in outcomes] == list(names)
    if ours:
        assert all(o.get("allocator", "spillover") == "spillover" for o in outcomes)
    skipped = [f"{o['program']}: {o['reason']}" for o in outcomes if o["outcome"] == "skipped"]
    if skipped:
        passed = len(names) - len(skipped)
        pytest.skip(f"{'; '.join(skipped)}" + (f" ({passed} others passed)" if passed else ""))


def test_each_program_is_in_a_group() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == NAMES


SAMPLE = [
    group if group in SAMPLED else pytest.param(group, marks=pytest.mark.soak) for group in GROUPS
]


@pytest.mark.parametrize("group", SAMPLE)
def test_stacks(group: str) -> None:
    run_programs(GROUPS[group], Options(vram="2GiB", schedule="late", hazards="raise"))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("schedule", "seed"), [("eager", 0), ("threaded", 0), ("random", 1), ("random", 2)]
)
@pytest.mark.parametrize("group", GROUPS)
def test_stacks_on_other_schedules(group: str, schedule: Schedule, seed: int) -> None:
    run_programs(GROUPS[group], Options(vram="2GiB", schedule=schedule, seed=seed, hazards="raise"))


#: What people run most; `make soak` runs every program that brings no allocator of its own.
POPULAR = ("transformers_trainer", "lightning_fit", "torchvision_resnet")


@pytest.mark.parametrize(
    "names",
    [
        POPULAR,
        *(pytest.param(GROUPS[group], marks=pytest.mark.soak) for group in GROUPS),
    ],
    ids=["popular", *GROUPS],
)
def test_unmodified_scripts_run_on_our_allocator(names: tuple[str, ...]) -> None:
    run_programs(names, Options(vram="2GiB", schedule="late", hazards="raise"), ours=True)


@pytest.mark.soak
@pytest.mark.parametrize("program", NAMES)
def test_each_program_is_a_script(program: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAMS / f"{program}.py")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode in (0, 77), result.stderr

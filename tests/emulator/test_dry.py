"""Dry runs: as much memory as a run that computes, right control flow, and a report.

One process makes all checks of a policy (``dry_checks.py``), one process a way runs the models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import dry_checks
import pytest
from benchmarks._dry import compare_cases
from benchmarks._dry.compare import (
    COUNTS,
    DEVICE_BOUND_PROFILE,
    INEXACT,
    PEAKS,
    PROFILE,
    VARIANTS,
)

from spillover import ConfigError, StateError, emulator

ROOT = Path(__file__).resolve().parents[2]
#: A sample of benchmarks/_dry/cases.py, which the soak has all of: what is least like the others.
SAMPLE = (
    "gpt fp32 dropout",
    "gpt amp fp16 with GradScaler",
    "gpt checkpointing",
    "conv net channels-last amp",
    "lstm and gru",
    "fsdp2 CPUOffloadPolicy",
    "spillover AdamW on the host",
    "spillover gradients on the host",
    "spillover offloaded activations",
    "spillover streamed parameters",
)
TRAIN = """
import torch
from torch import nn

def build(width):
    with torch.device("cuda"):
        return nn.Sequential(*[nn.Linear(width, width) for _ in range(4)])

model = build(4096)
optimizer = torch.optim.Adam(model.parameters())
for _ in range(2):
    loss = model(torch.randn(512, 4096, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR")},
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    found: dict[str, str] = {}
    for policy in dry_checks.CHECKS:
        result = python("-m", "tests.emulator.dry_checks", policy)
        assert result.returncode == 0, result.stderr
        found |= json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [name for checks in dry_checks.CHECKS.values() for name in checks])
def test_in_a_dry_process(outcomes: dict[str, str], name: str) -> None:
    assert not outcomes[name], outcomes[name]


def compare(names: tuple[str, ...] | None, profile: str, *, variant: str = "default") -> None:
    comparisons = compare_cases(names, profile=profile, variant=variant)
    assert comparisons
    assert names is None or len(comparisons) == len(names)
    for comparison in comparisons:
        assert isinstance(comparison.computed, dict), f"{comparison.name}: {comparison.computed}"
        assert isinstance(comparison.dry, dict), f"{comparison.name}: {comparison.dry}"
        assert comparison.computed["allocation.all.allocated"] > 100
        for statistic in (*PEAKS, *COUNTS):
            if statistic in VARIANTS[comparison.variant].ignored:
                continue
            assert comparison.computed[statistic] == comparison.dry[statistic], (
                f"{comparison.name}: {statistic}"
            )
        if profile:
            assert comparison.computed["makespan_ns"] > comparison.computed["compute_ns"] > 0
            assert comparison.schedule_error() == 0, comparison


def test_memory_and_schedule_equal_a_computed_run() -> None:
    compare(SAMPLE, DEVICE_BOUND_PROFILE)


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param("expandable segments", "gpt amp fp16 with GradScaler", marks=pytest.mark.soak),
        pytest.param(
            "spillover allocator", "spillover offloaded activations", marks=pytest.mark.soak
        ),
        pytest.param("routing of 1.5", "mixture of experts", marks=pytest.mark.soak),
    ],
)
def test_memory_equals_a_computed_run_in_other_set_ups(variant: str, case: str) -> None:
    compare((case,), "", variant=variant)


@pytest.mark.soak
@pytest.mark.parametrize("profile", ["", PROFILE, DEVICE_BOUND_PROFILE])
def test_memory_and_schedule_equal_a_computed_run_for_every_case(profile: str) -> None:
    compare(None, profile)


@pytest.mark.soak
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"default", *INEXACT}))
def test_memory_equals_a_computed_run_in_every_set_up(variant: str) -> None:
    compare(None, "", variant=variant)


@pytest.mark.soak
def test_an_untrained_router_is_close_to_uniform() -> None:
    pytest.importorskip("transformers")
    (found,) = compare_cases(profile="", variant="untrained router")
    assert isinstance(found.computed, dict)
    assert isinstance(found.dry, dict)
    assert found.dry[PEAKS[0]] == pytest.approx(found.computed[PEAKS[0]], rel=0.01)


def dry(
    tmp_path: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    script, report = tmp_path / "train.py", tmp_path / "report.json"
    script.write_text(TRAIN)
    result = python(
        "-m", "spillover", "emulate", "--dry", "--report", str(report), *arguments, "--", "python",
        str(script),
    )  # fmt: skip
    return result, json.loads(report.read_text())[0]


def test_report_of_a_script_that_fits(tmp_path: Path) -> None:
    result, report = dry(tmp_path, "--vram", "8GiB")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "loss unknown\n" * 2
    weights = 4 * (4096 * 4096 + 4096) * 4
    assert report["fits"] is True
    assert report["steps"] == 2
    classes = report["by_class"]
    assert classes["parameters"] == classes["gradients"] == weights
    assert classes["optimizer state"] == 2 * weights
    workspaces = [group for group in report["top"] if group["kind"] == "workspace"]
    assert [group["operator"] for group in workspaces] == ["aten::addmm"]
    assert classes["workspace"] == workspaces[0]["size_bytes"]
    assert sum(classes.values()) == report["peak_allocated_bytes"]
    assert report["peak"]["phase"] == "optimizer step"
    assert "train.py:14" in report["peak"]["line"]
    assert any("train.py:7 (build" in group["line"] for group in report["top"])
    # The gradients come from a backward pass, on a thread without Python frames.
    gradients = [group for group in report["top"] if group["kind"] == "gradients"]
    assert gradients
    for group in gradients:
        assert "backward of " in group["line"]
        assert "train.py:12 (<module>)" in group["line"]
    assert "fits into 8.00 GiB" in result.stderr
    assert "optimizer state" in result.stderr


def test_report_of_a_script_that_does_not_fit(tmp_path: Path) -> None:
    result, report = dry(tmp_path, "--vram", "400MiB")
    assert result.returncode == 1
    assert "torch.OutOfMemoryError" in result.stderr
    assert "does not fit into 400.00 MiB" in result.stderr
    shortage = report["shortage"]
    assert report["fits"] is False
    assert shortage["short_bytes"] == shortage["requested_bytes"] - shortage["free_bytes"] > 0
    assert report["by_class"]["parameters"] == 4 * (4096 * 4096 + 4096) * 4
    assert report["peak_reserved_bytes"] <= 400 << 20


def test_report_of_simulated_times(tmp_path: Path) -> None:
    result, report = dry(tmp_path, "--profile", "rtx3060", "--tokens-per-step", "512")
    assert result.returncode == 0, result.stderr
    assert report["capacity_bytes"] == 12 << 30
    assert report["profile"].startswith("rtx3060")
    # Four products of 512 x 4096 x 4096 forward and seven backward, in fp32, and AdamW's passes.
    floor_s = 11 * 2 * 512 * 4096**2 / 12.7e12
    assert floor_s < report["step_time_s"] < report["simulated_s"]
    assert report["tokens_per_second"] == pytest.approx(512 / report["step_time_s"])
    assert report["limited_by"] == next(iter(report["limits"]))
    assert report["limited_by"] in ("compute", "memory bandwidth")
    assert sum(report["limits"].values()) == pytest.approx(1)
    for text in ("512 a step", f"Limited by {report['limited_by']}", "4.4 % (median)"):
        assert text in result.stderr


LANGUAGE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(1000, 256), nn.Embedding(64, 256)
        self.head = nn.Linear(256, 1000)

    def forward(self, tokens):
        hidden = self.words(tokens) + self.places(torch.arange(64, device="cuda"))
        return torch.utils.checkpoint.checkpoint(self.head, hidden, use_reentrant=False)

model = Model().cuda()
optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
for _ in range(STEPS):
    for _ in range(2):
        tokens = torch.randint(0, 1000, (3, 64), device="cuda")
        model(tokens).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model(torch.randint(0, 1000, (50, 64), device="cuda"))
"""


@pytest.mark.parametrize(
    "steps", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.soak), 3]
)
def test_steps_and_tokens_are_counted(steps: int) -> None:
    program = (
        "from spillover import emulator\n"
        "emulator.enable(dry=True, profile='rtx4090')\n"
        + LANGUAGE.replace("STEPS", str(steps))
        + "print(emulator.dry_report().to_json())"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["steps"] == steps
    assert report["simulated_s"] > 0
    if steps == 0:
        assert report["step_time_s"] is report["tokens_per_second"] is report["limited_by"] is None
    else:
        assert report["tokens_per_step"] == 2 * 3 * 64  # neither the places nor the evaluation
        assert report["limited_by"] == "host: Python and launches"


def test_a_shortage_is_of_the_step_that_met_it() -> None:
    program = """
from spillover import emulator

emulator.enable(dry=True, vram="1GiB")
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(2, 8, device="cuda")).sum().backward()
    optimizer.step()
    if not emulator.dry_report().shortage:
        try:
            torch.empty(2 << 40, device="cuda")
        except torch.OutOfMemoryError:
            pass
from spillover.emulator._dry import headline

report = emulator.dry_report()
assert report.steps == 3
assert report.shortage.step == 2
assert "in step 2" in headline(report)
assert "--vram" not in headline(report)  # there is no device that large
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr


def test_the_peak_outlives_a_reset_of_the_statistics() -> None:
    program = """
from spillover import emulator

emulator.enable(dry=True)
import torch

for size in (256 << 20, 1 << 20):
    torch.cuda.reset_peak_memory_stats()
    torch.accelerator.reset_peak_memory_stats()
    data = torch.empty(size, dtype=torch.uint8, device="cuda")
    del data
    torch.cuda.empty_cache()
report = emulator.dry_report()
assert torch.cuda.max_memory_allocated() == 1 << 20
assert report.peak_allocated_bytes == 256 << 20
assert report.peak_reserved_bytes == 256 << 20
assert sum(report.by_class.values()) == report.peak_allocated_bytes
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr


def test_the_report_shows_any_path(tmp_path: Path) -> None:
    (tmp_path / "runs[/red]").mkdir(parents=True)
    script = tmp_path / "runs[/red]" / "[bold]train.py"
    script.write_text("import torch\ntorch.ones(3, device='cuda')\n")
    result = python("-m", "spillover", "emulate", "--dry", "--", "python", str(script))
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert "[/red]/[bold]train.py:2 (<module>)" in result.stderr


def test_a_workspace_that_does_not_fit_is_no_shortage() -> None:
    """Torch takes another of cuDNN's kernels then, and the program sees no error."""
    program = """
from spillover import emulator

emulator.enable(dry=True, vram="72MiB")
import torch

images, weight = (torch.empty(*s, device="cuda").half() for s in ((10, 64, 80, 80), (64, 64, 3, 3)))
torch.cuda.empty_cache()
images = torch.nn.functional.conv2d(images, weight, padding=1)
assert torch.cuda.memory_stats()["num_ooms"] == 0
images = torch.empty(10, 64, 128, 128, device="cuda", dtype=torch.half)
torch.cuda.empty_cache()
images = torch.nn.functional.conv2d(images, weight, padding=1)
assert torch.cuda.memory_stats()["num_ooms"] == 1
assert emulator.dry_report().shortage is None
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="unknown='two' is not known; choose one of error, zero"):
        emulator.Options(unknown="two")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dry must be True or False"):
        emulator.Options(dry=1)  # type: ignore[arg-type]
    for routing in ("even", "0.5", "nan"):
        with pytest.raises(ConfigError, match="use uniform, or how many times the mean load"):
            emulator.Options(routing=routing)
    with pytest.raises(StateError, match="there is no dry run in this process"):
        emulator.dry_report()
    result = python("-m", "spillover", "emulate", "--report", "x.json", "--", "python", "-c", "1")
    assert result.returncode == 2
    assert "--report is for dry runs; add --dry" in result.stderr
    result = python(
        "-m", "spillover", "emulate", "--tokens-per-step", "9", "--", "python", "-c", "1"
    )
    assert result.returncode == 2
    assert "--tokens-per-step is for dry runs; add --dry" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routing", "uniform"], "--routing is for dry runs; add --dry"),
        (["--unknown", "zero"], "--unknown is for dry runs; add --dry"),
        (["--no-clock", "--profile", "rtx4090"], "--no-clock contradicts --profile and --trace"),
        (["--no-clock", "--trace", "x.json"], "--no-clock contradicts --profile and --trace"),
        (["--dry", "--report", "/no/such/r.json"], "in a folder that does not exist"),
        (["--dry", "--report", "/"], "/ is a folder; name a file"),
        (["--trace", "/no/such/t.json"], "in a folder that does not exist"),
        (["--trace", "/"], "/ is a folder; name a file"),
    ],
)
def test_options_that_cannot_work_stop_the_command(arguments: list[str], message: str) -> None:
    result = python(
        "-m", "spillover", "emulate", *arguments, "--", "python", "-c", "print('started')"
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert not result.stdout


def test_relative_paths_are_of_the_folder_that_the_command_was_given_in(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "card.toml").write_text('[gpu]\nname = "card"\nextends = "rtx4090"\n')
    script.write_text(
        "import os, subprocess, sys\n"
        "os.chdir('elsewhere')\n"
        "import torch\n"
        "torch.ones(3, device='cuda')\n"
        "subprocess.run([sys.executable, '-c', 'import torch'], check=True)\n"
    )
    result = subprocess.run(
        [
            sys.executable, "-m", "spillover", "emulate", "--dry", "--profile", "card.toml",
            "--trace", "trace.json", "--report", "report.json", "--", "python", "train.py",
        ],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "trace.json").is_file()
    assert (tmp_path / "report.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())

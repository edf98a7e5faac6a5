"""``spillover bench`` writes profiles that load: of this host and disk, of the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spillover import ConfigError, emulator
from spillover.bench import BenchOptions, measure_profile, write_profile
from spillover.bench._timing import fastest_seconds

SMALL = {"size": "1MiB", "matmul_size": 64, "rounds": 1}


def bench(*arguments: str, emulated: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"SPILLOVER_EMULATOR": "1"} if emulated else {})}
    command = [sys.executable, "-m", "spillover"]
    if emulated:
        command += ["emulate", "--vram", "256MiB", "--", sys.executable, "-m", "spillover"]
        environment.pop("SPILLOVER_EMULATOR")
    return subprocess.run(
        [*command, "bench", "--size", "1MiB", "--matmul-size", "64", "--rounds", "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def disk_folder(tmp_path: Path) -> Path:
    """A folder whose file system takes O_DIRECT."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip(f"the file system of {tmp_path} refuses unnamed files with O_DIRECT")
    return tmp_path


def test_host_and_disk_are_measured(tmp_path: Path) -> None:
    folder, out = disk_folder(tmp_path), tmp_path / "here.toml"
    found = measure_profile(BenchOptions(gpu=False, folders=(folder, folder), **SMALL))
    write_profile(found, out)
    profile = emulator.load_profile(f"rtx4090+{out}")
    assert profile.name == "rtx4090+here+here"
    assert profile.host.cores == len(os.sched_getaffinity(0))
    assert profile.disk.drives == 2
    for part, name in (
        (profile.host, "memory_bandwidth_gb_s"),
        (profile.host, "optimizer_bandwidth_gb_s"),
        (profile.disk, "read_gb_s"),
        (profile.disk, "write_gb_s"),
        (profile.disk, "read_latency_us"),
    ):
        assert getattr(part, name) > 0
        assert part.sources[name].startswith("measured on ")
    # What needs a device comes from the profile that the host's extends, with its source.
    assert profile.host.pin_gb_s == emulator.load_profile("rtx4090+desktop").host.pin_gb_s
    assert profile.host.sources["pin_gb_s"].startswith("estimate: ")
    assert [path.name for path in tmp_path.iterdir()] == ["here.toml"]


def test_emulated_device_is_refused_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "emulated.toml"
    refused = bench("--profile-out", str(out))
    assert refused.returncode == 2
    assert "is emulated, and emulated time says nothing about a GPU" in refused.stderr
    assert "--no-gpu" in refused.stderr
    assert not out.exists()
    forced = bench("--profile-out", str(out), "--allow-emulated")
    assert forced.returncode == 0, forced.stderr
    profile = emulator.load_profile(str(out))
    assert profile.gpu.memory_gib == 0.25
    for part, name in (
        (profile.gpu, "pcie_to_device_gb_s"),
        (profile.gpu, "peak_bf16_tflops"),
        (profile.host, "operator_us"),
    ):
        assert part.sources[name].startswith("EMULATED, says nothing about a GPU")
    assert profile.host.sources["memory_bandwidth_gb_s"].startswith("measured on ")


def test_wrong_input_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    wrong = bench("--profile-out", str(tmp_path / "profile.json"), emulated=False)
    assert (wrong.returncode, "must end in .toml" in wrong.stderr) == (2, True)
    missing = bench("--profile-out", str(tmp_path / "no" / "p.toml"), emulated=False)
    assert (missing.returncode, "there is no folder" in missing.stderr) == (2, True)
    with pytest.raises(ConfigError, match="there is no gpu profile 'rtx9090'; there are a100"):
        BenchOptions(like="rtx9090")
    with pytest.raises(ConfigError, match="size must be at least"):
        BenchOptions(size=1)
    with pytest.raises(ConfigError, match="matmul_size must be at least"):
        BenchOptions(matmul_size=2)
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        BenchOptions(rounds=0)
    with pytest.raises(ConfigError, match="there is no folder"):
        measure_profile(BenchOptions(gpu=False, folders=(tmp_path / "no",), **SMALL))


def test_fastest_round_counts_and_the_first_does_not() -> None:
    calls: list[int] = []
    assert fastest_seconds(lambda: calls.append(1), rounds=3, calls=2) > 0
    assert len(calls) == (3 + 1) * 2


@pytest.mark.gpu
def test_a_real_card_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "card.toml"
    write_profile(
        measure_profile(BenchOptions(size="64MiB", matmul_size=2048, rounds=2)),
        out,
    )
    gpu = emulator.load_profile(str(out)).gpu
    assert gpu.sources["peak_bf16_tflops"].startswith("measured on ")
    assert gpu.peak_bf16_tflops > gpu.peak_fp32_tflops
    assert gpu.memory_bandwidth_gb_s > gpu.pcie_to_device_gb_s > gpu.pageable_to_device_gb_s / 2

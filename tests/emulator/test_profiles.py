"""Hardware profiles: what comes with the package is complete and sourced; wrong files are named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spillover import ConfigError
from spillover.emulator import load_profile, profile_names
from spillover.emulator._profiles import load_part

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("gpu", "host", "disk")
EVERY = [(section, name) for section in SECTIONS for name in profile_names(section)]


def test_the_promised_profiles_are_there() -> None:
    assert {
        "h100-pcie", "h100-sxm", "a100-sxm", "rtx4090", "rtx3090", "rtx3060", "gh200",
    } <= set(profile_names("gpu"))  # fmt: skip
    assert {"desktop", "server"} <= set(profile_names("host"))
    assert {"sata", "gen4x1", "gen4x4", "gen5x1"} <= set(profile_names("disk"))


@pytest.mark.parametrize(("section", "name"), EVERY)
def test_every_number_is_positive_and_has_a_source(section: str, name: str) -> None:
    part = load_part(section, name)
    assert part.name == name
    for number in part.numbers():
        assert getattr(part, number) > 0
        assert len(part.sources[number]) > 10, number


@pytest.mark.parametrize("name", profile_names("gpu"))
def test_cards_are_consistent(name: str) -> None:
    gpu = load_profile(name).gpu
    assert gpu.peak_fp64_tflops <= gpu.peak_fp32_tflops <= gpu.peak_tf32_tflops
    assert gpu.peak_tf32_tflops < gpu.peak_bf16_tflops == gpu.peak_fp16_tflops
    assert gpu.peak_fp16_tflops <= gpu.peak_fp8_tflops <= gpu.peak_int8_tops
    both = gpu.pcie_to_device_gb_s + gpu.pcie_to_host_gb_s
    assert max(gpu.pcie_to_device_gb_s, gpu.pcie_to_host_gb_s) <= gpu.pcie_duplex_gb_s <= both
    assert gpu.pageable_to_device_gb_s < gpu.pcie_to_device_gb_s
    assert gpu.memory_bandwidth_gb_s * gpu.memory_efficiency < gpu.l2_bandwidth_gb_s


def test_the_clock_has_no_number_of_its_own() -> None:
    """What it asks of a profile is in every profile, with a source."""
    text = (ROOT / "csrc/emulator/core/clock/profile.cpp").read_text(encoding="utf-8")
    asked = set(re.findall(r'^    \{"((?:gpu|host|disk)\.\w+)", [\d.]+\},$', text, re.MULTILINE))
    given = {line.split("=")[0] for line in load_profile("rtx4090").flatten().splitlines()}
    assert len(asked) > 40
    assert asked <= given
    unused = {"memory_gib", "clock_mhz", "sustained_efficiency", "cores", "drives", "name"}
    assert {key.split(".")[1] for key in given - asked} == unused


def test_parts_are_joined_in_any_order_and_filled_in() -> None:
    assert load_profile("rtx4090").name == "rtx4090+desktop+gen4x1"
    assert load_profile("gen5x1+rtx4090").name == "rtx4090+desktop+gen5x1"
    assert load_profile("sata + server + a100-sxm").name == "a100-sxm+server+sata"


def test_flat_text_has_every_number_once() -> None:
    profile = load_profile("gh200")
    lines = profile.flatten().splitlines()
    items = dict(line.split("=", 1) for line in lines)
    assert len(items) == len(lines) == 3 + sum(len(part.numbers()) for part in profile.parts())
    assert items["gpu.name"] == "gh200"
    assert float(items["gpu.pcie_to_device_gb_s"]) == profile.gpu.pcie_to_device_gb_s
    assert items["gpu.sm_count"] == "132"
    assert float(items["disk.read_gb_s"]) == profile.disk.read_gb_s
    # The clock's formulas know no sustained efficiency: it is in the rates.
    assert float(items["gpu.sustained_efficiency"]) == 1
    share = profile.gpu.sustained_efficiency
    assert float(items["gpu.matmul_efficiency"]) == profile.gpu.matmul_efficiency * share


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


NUMBER = '[{section}.{key}]\nvalue = {value}\nsource = "measured on my machine"\n'


def number(section: str, key: str, value: float | str) -> str:
    return NUMBER.format(section=section, key=key, value=value)


def test_a_file_extends_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.toml",
        '[gpu]\nname = "mine"\nextends = "rtx4090"\n'
        + number("gpu", "pcie_to_device_gb_s", 12.5)
        + '[disk]\nname = "slow"\nextends = "sata"\n'
        + number("disk", "read_gb_s", 0.3),
    )
    profile = load_profile(path)
    assert profile.name == "mine+desktop+slow"
    assert profile.gpu.pcie_to_device_gb_s == 12.5
    assert profile.gpu.sources["pcie_to_device_gb_s"] == "measured on my machine"
    assert profile.gpu.pcie_to_host_gb_s == load_profile("rtx4090").gpu.pcie_to_host_gb_s
    assert load_profile(f"{path}+gen4x4").name == "mine+desktop+gen4x4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gpu\n", "is not TOML"),
        ("[card]\n", "unknown table 'card'; there are gpu, host and disk"),
        ("gpu = 3\n", r"gpu must be a table"),
        ("", "has none of the tables"),
        ('[gpu]\nname = "x"\n', "missing; write them, or extends"),
        ('[gpu]\nextends = "rtx9090"\n', "no gpu profile 'rtx9090'; there are a100"),
        ('[gpu]\nextends = "rtx4090"\nsm = 3\n', "unknown key 'sm'"),
        ('[gpu]\nextends = "rtx4090"\nsm_count = 3\n', "not a number with its source"),
        ('[gpu]\nextends = "rtx4090"\ntitle = ""\n', "title must be a line of text"),
        ('[gpu]\nextends = "rtx4090"\nname = "a\\nb"\n', "name must be a line of text"),
        (
            '[gpu]\nextends = "rtx4090"\n[gpu.l2_mib]\nvalue = 3\nsource = " "\n',
            "l2_mib has no source",
        ),
        ('[gpu]\nextends = "rtx4090"\n' + number("gpu", "l2_mib", 0), "must be above 0"),
        ('[gpu]\nextends = "rtx4090"\n' + number("gpu", "l2_mib", "nan"), "must be above 0"),
        ('[gpu]\nextends = "rtx4090"\n' + number("gpu", "l2_mib", "true"), "must be a number"),
        ('[gpu]\nextends = "rtx4090"\n' + number("gpu", "sm_count", 1.5), "a whole number"),
        (
            '[gpu]\nextends = "rtx4090"\n' + number("gpu", "memory_efficiency", 1.2),
            "at most 1, not 1.2",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "wrong.toml", text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_profile(path)
    assert "wrong.toml" in str(raised.value) or "rtx9090" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx9090", "'rtx9090' is no profile and no file"),
        ("desktop", "has no card; begin with one of a100"),
        ("rtx4090+rtx3090", "names two of gpu"),
        ("rtx4090+sata+gen4x1", "names two of disk"),
        ("", "is no profile"),
        ("nowhere.toml", "cannot be read: No such file"),
    ],
)
def test_wrong_names_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(text)


def test_command_lists_and_shows() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "spillover", "profiles", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    listed = run()
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for _, name in EVERY)
    shown = run("show", "rtx3060+gen5x1")
    assert "pcie_duplex_gb_s" in shown.stdout
    assert "read_latency_us" in shown.stdout
    flat = run("show", "rtx3060", "--flat")
    assert flat.stdout == load_profile("rtx3060").flatten()
    wrong = run("show", "rtx9090")
    assert wrong.returncode == 2
    assert "rtx3060" in wrong.stderr

"""``spillover doctor``: every part, as a table and as JSON, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spillover import _core
from spillover.cli import _doctor_device, _doctor_disks, _doctor_host, _gpu_direct
from spillover.cli._doctor_part import Part

PARTS = [
    "CUDA driver",
    "device 0",
    "allocator's settings",
    "PyTorch",
    "PyTorch adapter",
    "host memory",
    "locked memory",
    "huge pages",
    "NUMA nodes",
    "io_uring",
    "GPUDirect Storage",
]


def doctor(
    *arguments: str, emulated: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spillover"]
    if emulated:
        command += ["emulate", "--vram", "64MiB", "--", sys.executable, "-m", "spillover"]
    return subprocess.run(
        [*command, "doctor", *arguments],
        env={**os.environ, "COLUMNS": "400", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def rows(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(result.stdout)["parts"]}


def test_every_part_as_json(tmp_path: Path) -> None:
    result = doctor("--json", "--disk", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows(result)
    assert set(found) == {*PARTS, f"disk {tmp_path}"}
    assert json.loads(result.stdout)["works"] is True
    assert found["device 0"]["facts"]["memory_bytes"] == 64 << 20
    assert found["PyTorch adapter"]["facts"]["adapter"] in ("compiled", "to compile")
    assert found["host memory"]["facts"]["total_bytes"] >= 1 << 30
    assert found[f"disk {tmp_path}"]["facts"]["engine"] in ("io_uring", "threads")
    assert found["GPUDirect Storage"]["facts"]["works"] is False
    assert found["GPUDirect Storage"]["detail"].startswith("off: ")
    assert list(tmp_path.iterdir()) == []


def test_the_same_as_a_table(tmp_path: Path) -> None:
    result = doctor("--disk", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    for name in PARTS:
        assert name in result.stdout


def test_without_a_driver_nothing_fails() -> None:
    result = doctor("--json", emulated=False)
    found = rows(result)
    if found["CUDA driver"]["state"] != "missing":
        pytest.skip("this machine has a driver")
    assert result.returncode == 0
    assert "spillover emulate" in found["CUDA driver"]["detail"]
    assert "device 0" not in found
    assert "no CUDA driver" in found["GPUDirect Storage"]["detail"]


def test_what_fails_decides_the_exit_code(tmp_path: Path) -> None:
    result = doctor("--json", "--disk", str(tmp_path / "missing"), SPILLOVER_ALLOCATOR="limit=much")
    assert result.returncode == 1
    assert json.loads(result.stdout)["works"] is False
    found = rows(result)
    assert found["allocator's settings"]["state"] == "fails"
    assert "limit=much" in found["allocator's settings"]["detail"]
    assert found[f"disk {tmp_path / 'missing'}"]["state"] == "fails"
    assert "GPUDirect Storage" not in found
    assert doctor("--no-such-option").returncode == 2


def test_without_a_compiler_and_a_cache_torch_is_plugged(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    environment = {"SPILLOVER_CACHE_DIR": str(cache), "CXX": "no-such-compiler"}
    found = rows(doctor("--json", emulated=False, **environment))["PyTorch adapter"]
    assert found["state"] == "limited"
    assert found["facts"] == {"adapter": "fallback"}
    assert "no-such-compiler" in found["detail"]
    environment.pop("CXX")
    found = rows(doctor("--json", emulated=False, **environment))["PyTorch adapter"]
    assert found["facts"] == {"adapter": "to compile"}
    assert list(cache.iterdir()) == []


def test_device_without_virtual_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "supports_virtual_memory", lambda device: False)
    [device] = [part for part in _doctor_device.parts() if part.name == "device 0"]
    assert device.state == "limited"
    assert "stays at its addresses" in device.detail


FILES = {
    "/proc/self/cgroup": "0::/a/b\n",
    "/sys/fs/cgroup/a/b/memory.max": "max\n",
    "/sys/fs/cgroup/a/memory.max": "4096000\n",
    "/sys/fs/cgroup/memory.max": "8192000\n",
}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        (FILES, 4096000),
        ({**FILES, "/sys/fs/cgroup/a/memory.max": "max\n"}, 8192000),
        ({"/proc/self/cgroup": "0::/\n"}, None),
        (
            {
                "/proc/self/cgroup": "5:cpu:/x\n4:memory:/x\n0::/\n",
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "123456\n",
            },
            123456,
        ),
    ],
)
def test_control_groups(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None
) -> None:
    monkeypatch.setattr(_doctor_host, "_read", lambda file: files.get(str(file), ""))
    assert _doctor_host.control_group_limit() == limit


def test_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor_host, "_read", lambda file: "")
    assert {part.state for part in _doctor_host.parts()} <= {"works", "limited"}


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("import os; os.abort()", "ended with -6"),
        ("raise SystemExit('no luck')", "ended with 1: no luck"),
    ],
)
def test_probe_that_ends_badly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, detail: str
) -> None:
    (tmp_path / "bad_probe.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(_gpu_direct, "__name__", "bad_probe")
    part: Part = _doctor_disks._direct(tmp_path)
    assert part.state == "missing"
    assert detail in part.detail


def test_probe_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "good_probe.py").write_text(
        "print('a line of the library'); print('gpu_direct [true, 1150, \"\"]')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(_gpu_direct, "__name__", "good_probe")
    part = _doctor_disks._direct(tmp_path)
    assert (part.state, part.facts) == ("works", {"works": True, "version": 1150})
    assert "does not use it yet" in part.detail
